"""`aqaa convert`: a language model of 16 bits to one of 4 or 8, a decoder layer at a time.

A layer goes from the mapped shards into a shard of its own, so memory holds one layer and what its
rounding needs. progress.json has the hashes of finished shards; a conversion that was cut off is
called again and goes on behind the last whole one. The names are the published ones. int4 is
written as compressed-tensors' W4A16, which transformers and vLLM load as well, the bytes of
Int4Linear; 8 bits have `qweight` and `scale` in place of `weight`: "quantization" in config.json.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import aqaa
from aqaa import files, loading
from aqaa.backbone.layers import Step1DecoderLayer
from aqaa.backbone.memory import resident_bytes
from aqaa.backbone.quantized_linear import empty_linears, format_of
from aqaa.backbone.step1 import Step1Config
from aqaa.config import BackboneConfig
from aqaa.files import AGAIN, ModelError, read_json, reading, replacing, write_json
from aqaa.scale.quantize import Calibration, group_for, quantize_, replace_linears
from aqaa.weights import model_folder, released, shards, sources, verify
from aqaa.weights.packing import packed_config

METHODS = ("rtn", "gptq")
OWN = "backbone.safetensors"  # of a folder like data/mini
PROGRESS = "progress.json"
WORD = 8  # codes of 4 bits in an int32
SPARE = 1.02  # room on the disk beyond the weights
DIALOGUES = 128  # to calibrate with
COMPANIONS = ("tokenizer.model", "tokenizer_config.json", "LICENSE")  # copied beside the shards


@dataclass(frozen=True)
class Origin:
    """A released language model: sizes, {our name: theirs}, {theirs: Entry}, Entries left out."""

    folder: Path
    config: BackboneConfig
    names: dict
    tensors: dict
    dropped: list

    def tensor(self, name):
        """On the CPU, a view of the mapped file. Raises ModelError for a NaN or an infinity."""
        theirs = self.names[name]
        path = self.tensors[theirs].path
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(theirs)
        verify.all_finite({theirs: tensor}, path)
        return tensor

    def parts(self):
        """Names converted together: the embedding, each layer, the last norm and lm_head."""
        parts = [[] for _ in range(self.config.num_hidden_layers + 2)]
        for name in self.names:
            kind, *rest = name.removeprefix("model.").split(".")
            place = int(rest[0]) + 1 if kind == "layers" else 0 if kind == "embed_tokens" else -1
            parts[place].append(name)
        return parts


def convert(source, out, weights="int4", group=None, method="rtn", *, rows=None, device="cpu",
            quiet=False, gpus=1):  # fmt: skip
    """Quantise the language model in `source` into the folder `out`; returns the record there.

    source: "mini", a folder like it (its other parts come along), or a released language model's.
    weights: int4, int8 or fp8; group: of int4, see group_for; method: rtn (to the nearest) or gptq,
    which needs rows: dialogues (lists of ids). gpus: that will share a layer, in whole groups.
    Raises ValueError or OSError before anything is written if it cannot be done."""
    device = loading.device_of(device)
    folder, out = sources.find(source), Path(out)
    if out.resolve() == folder.resolve():
        raise ModelError(f"{out} is the source itself: name another folder.")
    own = (folder / OWN).is_file()
    origin = None if own else _released(folder)
    config, cls = _own(folder) if own else origin.config, format_of(weights)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if group and weights != "int4":
        raise ValueError(f"{weights} has one scale for each output: leave --group out.")
    widths = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size")}
    group = group_for(cls, group, widths, gpus)
    if group and group % WORD and not own:
        raise ValueError(f"groups of {group} do not fill words of {WORD} codes: use 32, 64 or 128.")
    if method == "gptq":
        _check_rows(rows, config)
    parent = next(path for path in (out, *out.resolve().parents) if path.is_dir())
    need = SPARE * resident_bytes(config, weights, group) - _stored(out)
    if need > (free := shutil.disk_usage(parent).free):
        raise OSError(f"{out} needs {need / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free: "
                      "choose another place.")
    recipe = {"weights": weights, "group": group, "method": method}
    rows = rows if method == "gptq" else None
    started = {"source": str(folder), "recipe": recipe}
    if own:
        return _write_own(folder, out, started, rows, device)
    return _write_shards(_Work(origin, recipe, rows, device, quiet), out, started)


def _own(folder):
    """BackboneConfig of a folder like data/mini, of which every weight has been looked at."""
    config, path = model_folder.read_config(folder), folder / OWN
    if any(name.endswith("qweight") for name in shards.header(path)):
        raise ModelError(f"{path} is quantised already: convert the original.")
    model_folder.check_parts(folder)  # the others come along as they are
    return config.backbone


def _released(folder):
    """A published language model; pictures' tensors are left out."""
    files.check_file(folder / "config.json", AGAIN)
    if read_quantization(folder):
        raise ModelError(f"{folder} is quantised already: convert the original.")
    config = released.backbone(folder).sizes["backbone"]  # looks at every header
    tensors = shards.scan(folder)
    names, others = shards.language_model(tensors, folder)
    return Origin(folder, config, names, tensors, [tensors[name] for name in others])


def read_quantization(folder):
    """What a folder's config.json says of quantised weights, in either way; None for 16 bits."""
    try:
        data = read_json(Path(folder) / "config.json")
        return data.get("quantization") or data.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None


def _check_rows(rows, config):
    if not rows:
        raise ValueError("gptq needs dialogues to calibrate with: name a file of them with "
                         "--calibration, or use rtn.")
    highest = max((max(row) for row in rows if row), default=-1)
    longest = max(map(len, rows))
    most, n_ids = config.max_seq_len, config.vocab_size
    if not all(rows) or highest >= n_ids or longest > most:
        raise ValueError(f"the dialogues hold id {highest} or an empty or over-long row: the model "
                         f"has {n_ids} ids and takes rows of 1 to {most}.")


def _stored(folder):  # bytes of weights; the folder need not be there
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class _Work:
    """Converts the parts in order; `skip` takes a part that is there already."""

    def __init__(self, origin, recipe, rows, device, quiet):
        self.origin, self.rows, self.device = origin, rows, device  # no rows: to the nearest
        self.format = {name: recipe[name] for name in ("weights", "group") if recipe[name]}
        self.parts, self.calibration = origin.parts(), None
        self.bar = tqdm(total=len(self.parts), desc=recipe["weights"], unit="part",
                        disable=True if quiet else None)  # fmt: skip

    def convert(self, number):
        """{name: tensor} of a part as it is written."""
        state = {name: self.origin.tensor(name) for name in self.parts[number]}
        layer = None
        if 0 < number <= self.origin.config.num_hidden_layers:
            layer = self._layer(state)
            hessians = self.calibration.hessians(layer) if self.calibration else None
            cls = format_of(self.format["weights"])
            replace_linears(layer, cls, self.format.get("group"), hessians=hessians)
            head = f"model.layers.{number - 1}."
            made = {head + name: value for name, value in layer.state_dict().items()}
            state = {name: state.get(name, made[name]) for name in made}  # norms as stored
        self._calibrate(number, state, layer)
        return {name: value.cpu().contiguous() for name, value in state.items()}

    def skip(self, number, path):
        """A part that was converted before: only the dialogues have to go through it."""
        self._calibrate(number, shards.own(load_file(path)) if self.rows else {})

    def _calibrate(self, number, state, layer=None):
        """Dialogues go on: embedded by the part that holds the embedding, through each layer."""
        embedding = state.get("model.embed_tokens.weight")  # (V, D)
        if embedding is not None and self.rows:
            heads = self.origin.config.num_attention_heads
            self.calibration = Calibration(self.rows, self._computable(embedding), heads)
        elif self.calibration and number <= self.origin.config.num_hidden_layers:
            self.calibration.advance(layer or self._layer(state, quantized=True))
        self.bar.update()

    def _layer(self, state, quantized=False):
        """A decoder layer that holds `state`, in a dtype that self.device computes well."""
        config = Step1Config(**asdict(self.origin.config), attn_implementation="sdpa")
        with torch.device("meta"):
            layer = Step1DecoderLayer(config, 0)
        if quantized:
            empty_linears(layer, **self.format)
        for name, value in state.items():
            owner, _, leaf = name.split(".", 3)[3].rpartition(".")
            if leaf == "weight":
                value = nn.Parameter(self._computable(value), requires_grad=False)
            else:  # codes and scales keep their dtype
                value = value.to(self.device)
            setattr(layer.get_submodule(owner), leaf, value)
        return layer

    def _computable(self, value):
        """On the device; in fp32 where a CPU computes, whose half precision is slow."""
        value = value.to(self.device)
        return value.float() if self.rows and self.device.type == "cpu" else value


def _write_own(folder, out, started, rows, device):
    """A whole folder of aqaa whose backbone says in its header how it is quantised."""
    config, recipe = model_folder.read_config(folder), started["recipe"]
    module = model_folder.read_part(folder, "backbone", config, device, None)
    quantize_(module, recipe["weights"], recipe["group"], rows=rows)
    parts = {name: folder / f"{name}.safetensors" for name in model_folder.parts_in(folder)}
    parts["backbone"] = model_folder.save_part(out, "backbone", module)
    record = {"quantization": _about(started, rows)}
    model_folder.gather(out, config, folder / "tokenizer.json", parts, record)
    return record


def _write_shards(work, out, started):
    """Shards and an index, config.json, tokenizer.model, record.json: what `--backbone` reads."""
    out.mkdir(parents=True, exist_ok=True)
    done = _resume(out, started)
    for number in range(len(work.parts)):
        path = out / f"model-{number + 1:05d}.safetensors"
        if path.name in done:
            work.skip(number, path)
            continue
        state = work.convert(number)
        if work.format["weights"] == "int4":
            state = shards.standard(state)
        with replacing(path) as part:
            save_file(state, part, {"format": "pt"})
        done[path.name] = files.fingerprint(path)
        write_json(out / PROGRESS, {**started, "files": done})
    work.bar.close()
    _describe(work.origin, started["recipe"], out, done)
    record = _about(started, work.rows, work.origin.dropped) | {"files": dict(sorted(done.items()))}
    write_json(out / "record.json", record)
    (out / PROGRESS).unlink(missing_ok=True)  # now that all of it is there
    return record


def _resume(out, started):
    """{file: fingerprint} of the shards that are whole. Raises ModelError if of something else."""
    path = next((out / name for name in ("record.json", PROGRESS) if (out / name).is_file()), None)
    if path is None:
        if any(out.glob("*.safetensors")):
            raise ModelError(f"{out} holds weights of something else: name another folder.")
        return {}
    with reading(path, f"remove {out} and convert again"):
        record = read_json(path)
        begun = {"source": str(record["source"]), "recipe": dict(record["recipe"])}
        made = dict(record["files"])
    if begun != started:
        raise ModelError(f"{out} holds a conversion by {begun['recipe']} of {begun['source']}: "
                         "name another folder.")
    return {name: facts for name, facts in made.items() if Path(name).name == name
            and (out / name).is_file() and files.fingerprint(out / name) == facts}  # fmt: skip


def _describe(origin, recipe, out, done):
    """Write what stands beside the shards: config.json, their index, COMPANIONS."""
    rows = [row for name in sorted(done) for row in shards.header(out / name).items()]
    whole = {"metadata": {"total_size": sum(entry.bytes for _, entry in rows)},
             "weight_map": {name: entry.path.name for name, entry in rows}}  # fmt: skip
    config = Step1Config(**asdict(origin.config)).to_dict()
    config |= {"architectures": ["Step1ForCausalLM"], "tie_word_embeddings": False}
    if recipe["weights"] == "int4":
        config |= {"dtype": "bfloat16", "quantization_config": packed_config(recipe["group"])}
    else:
        config["quantization"] = {name: value for name, value in recipe.items() if value}
    write_json(out / "config.json", config)
    write_json(out / "model.safetensors.index.json", whole)
    for name in COMPANIONS:
        if (origin.folder / name).is_file():
            with replacing(out / name) as part:
                shutil.copyfile(origin.folder / name, part)


def _about(started, rows, dropped=()):
    return {**started, "aqaa": aqaa.__version__, "torch": torch.__version__,
            "dialogues": len(rows or ()), "dropped": len(dropped),
            "dropped_values": sum(entry.numel for entry in dropped)}  # fmt: skip


def main(args):
    """`aqaa convert`; args: source, out, weights, group, method, calibration, device, json."""
    rows = None
    if args.method == "gptq" and args.calibration:
        rows = read_rows(args.calibration)
    elif args.method == "gptq" and (sources.find(args.source) / OWN).is_file():
        from aqaa.corpus.dialogues import dialogues

        rows = [dialogue.ids for dialogue in dialogues(args.source, "train", DIALOGUES)]
    record = convert(args.source, args.out, args.weights, args.group, args.method, rows=rows,
                     device=args.device, quiet=args.json, gpus=args.gpus)  # fmt: skip
    if args.json:
        return print(json.dumps(record))
    facts = record.get("quantization", record)
    dropped, group = facts["dropped"], facts["recipe"]["group"]
    left = f"; left out {dropped} tensors that see pictures" if dropped else ""
    groups = f" in groups of {group}" if group else ""
    print(f"{args.out}: {args.weights}{groups} by {args.method}, "
          f"{_stored(Path(args.out)) / 1e9:.3f} GB of weights{left}.")


def read_rows(path):
    """Dialogues of a JSON file: a list of lists of ids. Raises ValueError."""
    try:
        rows = read_json(Path(path))
        whole = bool(rows) and all(type(i) is int and i >= 0 for row in rows for i in row)
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a JSON list of lists of ids: write one for each dialogue.")
    return rows
