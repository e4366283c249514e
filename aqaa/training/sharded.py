"""Training of a backbone that many GPUs share: `torchrun … -m aqaa train full --model FOLDER …`.

The tasks are those of the mini (objectives.py, preference.py). transformers loads the model in
shares: FSDP2 divides weights, gradients and moments among all processes, tensor parallelism each
layer among `ranks` of them. Checkpoints are torch's sharded ones; a run that was cut off goes on
from the last whole one. With `adapt` only LoRA's matrices learn (PEFT), beside bf16 or, where the
folder is int4 (`aqaa convert`), beside int4 that each process holds whole. One process will do.

Data: a JSON object a line, {"prompt": [ids], "answer": [ids]}, for next-token training; for
preference training a pairs.npz (pairs.py). Sizes of a full run: `aqaa plan --train all`."""

import json
import shutil
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as shares_of

from aqaa import config as presets
from aqaa.files import ModelError, WriteError, brief, probe, read_json, write_json, writing
from aqaa.loading import device_of
from aqaa.records import provenance
from aqaa.scale import parallel
from aqaa.scale.plan_table import read_model
from aqaa.training.loop import Trainer, autocast, cosine
from aqaa.training.objectives import LanguageTask, NextToken
from aqaa.training.pairs import read_pairs
from aqaa.training.preference import OBJECTIVES, PreferenceTask

LOGGED = ("loss", "text", "linguistic", "semantic", "accuracy", "margin", "anchor")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEXT_TOKEN = "next_token"
BROKEN = (OSError, RuntimeError, ValueError, KeyError)
STATE = "state.json"  # written last: a checkpoint without it is not whole
RATES = {"whole": 1e-5, "adapted": 1e-4}  # not published


class Lines:
    """Examples of a file of lines, drawn evenly; as `Examples.draw`. ModelError for a bad line."""

    def __init__(self, path, ids):
        self.examples = []
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    self.examples.append(self._example(json.loads(line), ids))
        except (ValueError, KeyError, TypeError) as fault:
            number = len(self.examples) + 1
            raise ModelError(f"line {number} of {path} is no example ({brief(fault)}): write "
                             '{"prompt": [ids], "answer": [ids]}.') from None  # fmt: skip
        except OSError as fault:
            raise ModelError(f"{path} cannot be read ({brief(fault)}): name a file.") from None
        if not self.examples:
            raise ModelError(f"{path} holds no line: write one an example.")

    @staticmethod
    def _example(data, ids):
        row = np.array([*data["prompt"], *data["answer"]], dtype=np.int64)
        weights = np.arange(len(row)) >= len(data["prompt"])
        if not data["prompt"] or not data["answer"] or row.ndim != 1:
            raise ValueError("prompt and answer must be lists of ids, neither of them empty")
        if row.min() < 0 or row.max() >= ids.end:
            raise ValueError(f"an id lies outside 0..{ids.end - 1}")
        return row, weights.astype(np.float32)

    def draw(self, rng):
        return self.examples[rng.integers(len(self.examples))]


class Shared:
    """What a task does otherwise where processes have rows of their own and a share of the weights.

    A class of a task mixes it in, then calls `share`."""

    def share(self, model, ranks, lr, decay):
        """Take the outermost module, whose weights that learn AdamW moves; `ranks` processes work
        on the same rows. Returns the task."""
        self.wrapped, self.lr = model, lr
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        rank = distributed.get_rank() if world > 1 else 0
        self.index, self.count = rank // ranks, world // ranks  # of processes with other rows
        self.rows *= self.count
        self.learning = [p for p in model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(self.learning, lr, betas=(0.9, 0.95), weight_decay=decay)
        self.optimizers = {"adamw": adamw}
        return self

    def scores(self, batch):
        """All logits, as the outermost module has to be called: it gathers what others hold."""
        logits = self.wrapped(input_ids=batch["input_ids"], segment_ids=batch["segments"],
                              use_cache=False).logits  # fmt: skip
        return lambda at, rows: logits[at][:, rows]

    def total(self, weights):
        """Mean over processes: divided by it, the mean of all losses counts each target alike."""
        return self.mean(weights.sum().float())

    def mean(self, value):
        """Of a tensor over the processes with rows of their own; those that share one agree."""
        if self.count > 1:
            distributed.all_reduce(value)
            value = value / distributed.get_world_size()
        return value

    def batch(self, rng):
        """This process' rows of the batch that one process alone would have."""
        whole = super().batch(rng)
        units = len(whole.get("reference", whole["input_ids"]))  # a pair has two rows
        if units % self.count:
            raise ValueError(f"{units} pairs cannot be divided among {self.count} processes: give "
                             "more pairs, or fewer --rows.")  # fmt: skip
        return {key: value.unflatten(0, (units, -1))[self.index :: self.count].flatten(0, 1)
                for key, value in whole.items()}  # fmt: skip

    def logprobs(self, numbers):
        """As PreferenceTask.logprobs, each process computing its share."""
        padded = [*numbers, *[numbers[0]] * (-len(numbers) % self.count)]
        own = super().logprobs(padded[self.index :: self.count])
        if self.count == 1:
            return own
        own = own.to(self.device)
        gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, own)
        one_each = gathered[:: len(gathered) // self.count]  # of those that share rows
        return torch.stack(one_each, 1).flatten(0, 1)[: len(numbers)].cpu()

    @property
    def device(self):
        return self.learning[0].device

    def train_step(self, batch, step, progress):
        """One step of AdamW; the logs are means over all processes."""
        (optimizer,) = self.optimizers.values()
        for group in optimizer.param_groups:
            group["lr"] = self.lr * cosine(progress, self.warmup, self.floor)
        with autocast(self.device):
            loss, logs = self.loss(batch, step)
        optimizer.zero_grad()
        loss.backward()
        for weight in self.learning:  # what is whole on every process is averaged here
            if type(weight.grad) is torch.Tensor and self.count > 1:
                weight.grad.copy_(self.mean(weight.grad))
        if torch.isfinite(clip(self.learning, 1.0)):  # as in loop.update
            optimizer.step()
        logs["loss"] = loss.detach()
        table = torch.tensor([[float(logs.get(name, 0.0)), name in logs] for name in LOGGED])
        table = self.mean(table.to(self.device)).tolist()
        return {name: value / there for name, (value, there) in zip(LOGGED, table, strict=True)
                if there}  # fmt: skip


class SharedLanguage(Shared, LanguageTask):
    """Next-token prediction on Lines, packed in `rows` rows of `length` ids a process."""

    def __init__(self, config, lines, model, *, rows=1, length=2048, floor=0.1):
        NextToken.__init__(self, config, model)
        self.examples, self.rows, self.length, self.floor = lines, rows, length, floor


class SharedPreference(Shared, PreferenceTask):
    """Preference training on `rows` pairs a process."""


def clip(weights, most):
    """Cut the norm of all gradients to `most`, in place; returns it as it was. Some gradients are
    whole, others shared among one set of processes or another."""
    kinds = defaultdict(list)
    for weight in weights:
        if weight.grad is not None:
            kinds[getattr(weight.grad, "device_mesh", None)].append(weight.grad)
    norms = [nn.utils.get_total_norm(grads) for grads in kinds.values()]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    norm = torch.stack(norms).norm()
    for grads in kinds.values():
        for grad in grads:
            grad.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


class SharedTrainer(Trainer):
    """A Trainer whose processes agree when to save and stop; each writes its share of a checkpoint.

    name-STEP.ckpt folders in `folder`, which all processes see; the last two are kept."""

    @property
    def main(self):
        return not distributed.is_initialized() or distributed.get_rank() == 0

    def _kept(self):
        """Whole checkpoints, the newest first."""
        found = sorted(self.folder.glob(f"{self.name}-*.ckpt"), reverse=True)
        return [path for path in found if (path / STATE).exists()]

    def _clear(self):
        self.wait()
        for path in self.folder.glob(f"{self.name}-*.ckpt") if self.main else ():
            shutil.rmtree(path)
        self.wait()

    def agreed(self, value):
        """Whether any process says so."""
        if not distributed.is_initialized():
            return value
        flag = torch.tensor(float(value), device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def wait(self):
        if distributed.is_initialized():
            distributed.barrier()

    def _state(self):
        """What a checkpoint holds: this process' share of what learns, and of its moments."""
        (optimizer,) = self.optimizers.values()
        model, moments = shares_of.get_state_dict(
            self.task.wrapped, optimizer,
            options=shares_of.StateDictOptions(ignore_frozen_params=True),
        )  # fmt: skip
        return {"model": model, "optimizer": moments}

    def _save(self):
        path = self.folder / f"{self.name}-{self.step:08d}.ckpt"
        try:
            dcp.save(self._state(), checkpoint_id=path, no_dist=not distributed.is_initialized())
        except (OSError, RuntimeError, dcp.api.CheckpointException) as fault:
            raise WriteError(path, brief(fault)) from None
        self.wait()
        if self.main:
            log = {"rows": self.rows, "sums": self.sums, "count": self.count}
            write_json(path / STATE, {"step": self.step, "seconds": self.seconds, "log": log})
            for old in self._kept()[2:]:
                shutil.rmtree(old)
        self.wait()

    def _restore(self, kept):
        state, path = self._state(), kept[0]
        try:
            dcp.load(state, checkpoint_id=path, no_dist=not distributed.is_initialized())
        except (*BROKEN, dcp.api.CheckpointException) as fault:
            raise ModelError(f"{path} is no checkpoint of this task ({brief(fault)}): remove it, "
                             "the one before it is taken, or name another folder.") from None
        (optimizer,) = self.optimizers.values()
        shares_of.set_state_dict(
            self.task.wrapped, optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=shares_of.StateDictOptions(ignore_frozen_params=True, strict=False),
        )  # fmt: skip
        told = read_json(path / STATE)
        self.step, self.seconds, log = told["step"], told["seconds"], told["log"]
        self.rows, self.sums, self.count = log["rows"], log["sums"], log["count"]
        self._write_log()

    def _check_room(self):
        """Two checkpoints must fit the disk of the folder. Raises WriteError."""
        size = sum(weight.nbytes for weight in self.task.learning)
        probe(self.folder, 2 * 3 * size)  # of all processes: weights and two moments, twice

    def _write_log(self):
        if self.main:
            super()._write_log()

    def _plot(self):
        if self.main:
            super()._plot()


def load(folder, packed, ranks, adapt, device, seed=0):
    """(what is called, its Step1ForCausalLM): shared by all processes; with `adapt` LoRA of that
    rank is in it. packed: how its weights are quantised, {} if they are not. Raises ModelError for
    what cannot be trained so."""
    from transformers.distributed import DistributedConfig

    from aqaa.backbone.step1 import Step1ForCausalLM
    from aqaa.weights import released

    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if packed and not adapt:
        raise ModelError(f"{folder} is {packed['weights']}, of which no weight can learn: give "
                         "--adapt RANK, or the folder of 16 bits.")
    if world % ranks or adapt and ranks > 1:
        raise ModelError(f"{ranks} GPUs cannot share a layer here: --ranks divides the number of "
                         "processes, and is 1 with --adapt.")
    if packed:
        model = released.backbone(folder).load(device, torch.bfloat16)
    else:
        dtype = torch.bfloat16 if adapt and device.type == "cuda" else torch.float32
        options = {}
        if world > 1:
            options["distributed_config"] = DistributedConfig(
                tp_size=ranks, fsdp_size=world // ranks,
                fsdp_mixed_precision=device.type == "cuda",
            )  # fmt: skip
        model = Step1ForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device)
    if device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not adapt:
        return model.train(), model
    torch.manual_seed(seed)  # the same matrices on every process
    return adapted(model, adapt).train(), model


def adapted(model, rank):
    """A PeftModel: LoRA of a rank beside every linear layer of the decoder, quantised or not.
    Raises ModelError without PEFT."""
    try:
        import peft
        from peft.tuners.lora import Linear
    except ImportError:
        raise ModelError("--adapt needs peft: pip install 'aqaa[train]'.") from None
    from aqaa.backbone.quantized_linear import QuantizedLinear

    how = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR)
    kinds = {type(part) for part in model.modules() if isinstance(part, QuantizedLinear)}
    how._register_custom_module(dict.fromkeys(kinds, Linear))
    with warnings.catch_warnings():  # it does not know our layers, and need not
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, how)


def config_of(vocabulary, folder):
    """The AQAAConfig of a vocabulary's size. Raises ModelError for none of ours."""
    for name in ("full", "mini"):
        config = presets.preset(name)
        if config.backbone.vocab_size == vocabulary:
            return config
    raise ModelError(f"{folder} has {vocabulary} ids, as neither the published model nor the mini "
                     "does: name the folder of a language model with audio ids.")  # fmt: skip


def main(
    model, data, *, objective=NEXT_TOKEN, adapt=0, ranks=1, rows=1, length=2048, lr=None, beta=0.1,
    steps=100, out="work/full", resume=False, device="cpu", seed=0, quiet=False,
):  # fmt: skip
    """`aqaa train full`: train the language model in folder `model` on the file `data`.

    objective: "next_token" or a name of OBJECTIVES. adapt: rank of LoRA, 0 for all weights; ranks:
    processes that share a layer; rows: of a process at a time. Leaves model/ or adapters/, full.csv
    and full.json in `out`. Raises ModelError, ValueError, WriteError, each in one sentence."""
    if objective not in (NEXT_TOKEN, *OBJECTIVES):
        known = ", ".join((NEXT_TOKEN, *OBJECTIVES))
        raise ValueError(f"unknown objective {objective!r}: choose one of {known}")
    own, met = device_of(device), distributed.is_initialized()
    if distributed.is_torchelastic_launched():
        own = parallel.join(own.type)[2]
    _, sizes, packed = read_model(str(model))
    config = config_of(sizes.vocab_size, model)
    plain = objective == NEXT_TOKEN
    examples = Lines(data, config.ids) if plain else read_pairs(data, config.ids)  # may be refused
    outer, inner = load(model, packed, ranks, adapt, own, seed)
    lr = lr or RATES["adapted" if adapt else "whole"]
    if plain:
        task = SharedLanguage(config, examples, inner, rows=rows, length=length)
        task.share(outer, ranks, lr, decay=0.1)
    else:
        task = SharedPreference(config, examples, objective=objective, beta=beta, rows=rows,
                                model=inner)  # fmt: skip
        task.share(outer, ranks, lr, decay=0.0).refer()
    task.modules = {"model": outer}
    quiet |= distributed.is_initialized() and distributed.get_rank() > 0
    trainer = SharedTrainer(task, out, "full", steps, seed=seed, device=own, resume=resume,
                            quiet=quiet)  # fmt: skip
    result = trainer.run()
    if not plain:
        result |= task.finish(seed)
    folder = Path(out) / ("adapters" if adapt else "model")
    with writing(folder):
        outer.save_pretrained(folder)
    if trainer.main:
        loss = trainer.rows[-1]["loss"]
        result |= {"loss": loss, "adapt": adapt, "processes": task.count * ranks}
        write_json(Path(out) / "full.json", result | provenance(own))
        print(f"full: {result['steps']} steps, loss {loss:.4f}; {folder}")
    trainer.wait()
    if distributed.is_initialized() and not met:
        distributed.destroy_process_group()
