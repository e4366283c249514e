"""What is true of the real vLLM, checked against its own classes; no GPU is needed, and no model is served.

    python -m tests.vllm_check data/runs/vllm-signatures.json

in vLLM's environment, where this package can be imported. Each check fills the record with what it saw, or raises.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import importlib.util
import inspect
import json
import pickle
import shlex
import sys
import tempfile
import unittest.mock
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from aqaa.backbone.attention import slopes as attention_slopes
from aqaa.backbone.generation import Step, generate
from aqaa.backbone.step1 import build
from aqaa.config import BackboneConfig, IdsConfig
from aqaa.scale.vllm import launch
from aqaa.scale.vllm.client import ATTENTION, EngineError, InProcess, _event, _tokens
from aqaa.scale.vllm.rules import KEY, Rules
from aqaa.tokenizers import dialogue
from tests.stub_server import Handler

NOT_RUN = (
    "vllm serve itself: tests.vllm_served does, on a CPU", "TRITON_ATTN, which needs a GPU",
    "quantisation while loading", "tensor parallelism", "AsyncLLM itself", "the V2 runner's buffers: stood in for",
)  # fmt: skip
HOWS = {
    "tp": {}, "dp": {"copies": 2}, "pp": {"nodes": 2}, "dp_nodes": {"nodes": 2, "copies": 4},
    "ray": {"nodes": 2, "ray": True}, "dp_ray": {"nodes": 2, "copies": 4, "ray": True},
}  # fmt: skip
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_size_local",
            "data_parallel_start_rank", "nnodes", "node_rank", "headless", "distributed_executor_backend",
            "data_parallel_backend")  # fmt: skip
PARSERS = "vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args"  # where 0.33 and 0.32 have it
SAID = [(50, -0.5), (51, -1.25), (3, -0.125)]  # ids and logprobs of a made-up answer


def installed():
    return importlib.util.find_spec("vllm") is not None


@cache
def vllm():
    """The package, made to believe in a CPU: its wheel is for CUDA and would find no device at all."""
    import vllm
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    if vllm.platforms.current_platform.is_unspecified():
        vllm.platforms._current_platform = CpuPlatform()
    return vllm


@cache
def small():
    """(backbone, ids, prompt): a Step-1 of random weights."""
    ids = IdsConfig(first_text=42, n_text=128, n_linguistic=16, n_semantic=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build(BackboneConfig(ids.end, 32, 64, 2, 4, 2, 512)).eval()
        for weight in backbone.parameters():
            weight.data.mul_(5)  # far from uniform: greedy choices are clear
    return backbone, ids, [1, 4, 60, 61, *range(ids.n_text, ids.n_text + 2), *range(150, 153), 3, 4]


def expected(layout, n=60, said=()):
    """The local generator's greedy answer."""
    backbone, ids, prompt = small()
    layout = dialogue.Resumed(layout, tuple(said)) if said else layout
    steps = generate(backbone, [*prompt, *said], ids, layout, temperature=0, max_tokens=n, min_audio=15)
    return [step.id for step in steps]


def params(layout, said=()):
    """A real SamplingParams that carries rules."""
    layout = dialogue.Resumed(layout, tuple(said)) if said else layout
    return vllm().SamplingParams(temperature=0, extra_args={KEY: Rules.of(layout, small()[1], 15).to_json()})


def scores(rows):
    """Logits (len(rows), V) fp32 of the ids that follow each row."""
    with torch.no_grad():
        return torch.stack([small()[0](torch.tensor([row])).logits[0, -1].float() for row in rows])


def config(**changes):
    """Stands in for a VllmConfig."""
    model = SimpleNamespace(get_vocab_size=lambda: small()[1].end)
    return SimpleNamespace(model_config=model, speculative_config=None, **changes)


def processor_interfaces(record):
    """Both runners' base classes: every abstract method is there, with the parameters that it is called with."""
    vllm()
    from aqaa.scale.vllm.plugin import PROCESSORS, Layouts

    assert not Layouts.__abstractmethods__
    for base in Layouts.__bases__:
        assert base.__module__.startswith(PROCESSORS), base
        methods = {}
        for name in ("__init__", "validate_params", "apply", "is_argmax_invariant", "update_state", "add_request"):
            if name in vars(base):
                theirs, ours = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (base, Layouts))
                methods[name] = theirs
                assert len(ours) >= len(theirs), (base, name)
                assert name in ("__init__", "apply") or ours == theirs, (base, name, ours, theirs)
        record.setdefault("processors", {})[base.__module__] = methods
    assert len(Layouts.__bases__) == 2
    with contextlib.suppress(ValueError):
        Layouts(config() and SimpleNamespace(speculative_config=True), None)
        raise AssertionError("speculative decoding was let through")


def request(record):
    """/v1/completions' own class takes our request and makes the SamplingParams that we mean."""
    vllm()
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.sampling_params import SamplingParams

    from aqaa.scale.vllm.plugin import Layouts

    rules = params(dialogue.layout()).extra_args[KEY]
    body = {
        "temperature": 0.3, "top_p": 0.9, "top_k": 0, "seed": 7, "logprobs": 0, "max_tokens": 99,
        "stop_token_ids": [3], "model": "m", "prompt": [1, 4, 60], "stream": True, "add_special_tokens": False,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "vllm_xargs": {KEY: rules},
    }  # fmt: skip
    made = CompletionRequest(**body).to_sampling_params(99, {"top_k": 50, "temperature": 0.7})
    assert CompletionRequest(**body).model_extra in (None, {}), "a field is unknown"
    assert (made.temperature, made.top_p, made.top_k, made.seed, made.max_tokens) == (0.3, 0.9, 0, 7, 99)
    assert made.logprobs == 0 and made.stop_token_ids == [3] and made.extra_args == {KEY: rules}
    Layouts.validate_params(made)
    Layouts.validate_params(SamplingParams())
    for wrong in ("{}", "no"):
        try:
            Layouts.validate_params(SamplingParams(extra_args={KEY: wrong}))
        except ValueError:
            continue
        raise AssertionError("rules that cannot be read were let through")
    record["completion_request_fields"] = sorted(CompletionRequest.model_fields)
    record["sampling_params_fields"] = sorted(SamplingParams.__annotations__)


def stream(record):
    """Server-sent events written by vLLM's own generator, from made-up outputs: our client reads what went in."""
    vllm()
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    def output(part, reason=None):
        said = CompletionOutput(0, "", [i for i, _ in part], 0.0, [{i: Logprob(p)} for i, p in part], reason)
        return RequestOutput("r", "", [1, 4, 60], None, [said], reason is not None)

    async def outputs():
        yield 0, output(SAID[:2])
        yield 0, output(SAID[2:], "stop")

    async def lines():
        wanted = CompletionRequest(prompt=[1, 4, 60], stream=True, logprobs=0, max_tokens=9, return_token_ids=True,
                                   return_tokens_as_token_ids=True)  # fmt: skip
        server = object.__new__(OpenAIServingCompletion)
        quiet = {"enable_log_outputs": False, "request_logger": None, "enable_force_include_usage": False,
                 "system_fingerprint": None, "enable_prompt_tokens_details": False,
                 "enable_per_request_metrics": False, "return_tokens_as_token_ids": False}  # fmt: skip
        for name, value in quiet.items():
            setattr(server, name, value)
        made = server.completion_stream_generator(wanted, [{}], outputs(), "cmpl-0", 0, "stub", 1, None,
                                                  SimpleNamespace())  # fmt: skip
        return [line async for line in made]

    written, found = asyncio.run(lines()), []
    for line in "".join(written).encode().splitlines():
        data = _event(line, "vLLM")
        if data and data != b"[DONE]":
            found += _tokens(json.loads(data), "vLLM")
    assert [pair[:2] for pair in found] == SAID and found[0][2] == dict(SAID[:1]) and written[-1] == "data: [DONE]\n\n"
    record["completion_stream"], record["completion_stream_of"] = written, SAID


def engine_signatures(record):
    """AsyncLLM.generate, and the arguments that InProcess gives to AsyncEngineArgs and SamplingParams."""
    vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    found = list(inspect.signature(AsyncLLM.generate).parameters)
    assert found[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert inspect.isasyncgenfunction(AsyncLLM.generate) and callable(AsyncLLM.from_engine_args)
    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert {"model", "hf_overrides", "attention_backend", "logits_processors", "skip_tokenizer_init"} <= fields
    SamplingParams(temperature=0.3, top_p=0.9, top_k=0, seed=0, logprobs=0, max_tokens=9, stop_token_ids=[3],
                   detokenize=False, output_kind=RequestOutputKind.DELTA, extra_args={})  # fmt: skip
    record["async_llm_generate"] = found


def in_process(record):
    """InProcess with real arguments, parameters and outputs, but an AsyncLLM that only pretends; it may also die."""
    vllm()
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    _, ids, prompt = small()
    layout, seen = dialogue.layout(), []

    class Pretender:
        model_config = SimpleNamespace(max_model_len=512)

        async def generate(self, given, params, request_id):
            seen.append((given, params))
            for i, token in enumerate(expected(layout)):
                if params.max_tokens == 30 and i == 20:
                    raise RuntimeError("EngineCore encountered an issue")
                await asyncio.sleep(0)
                said = CompletionOutput(0, "", [token], 0.0, [{token: Logprob(-0.5)}], None)
                yield RequestOutput(request_id, None, given["prompt_token_ids"], None, [said], False)

    def start(args):
        seen.append(args)
        return Pretender()

    with unittest.mock.patch.object(AsyncLLM, "from_engine_args", start):
        engine = InProcess("somewhere", max_model_len=512)
    args = seen.pop()
    assert args.skip_tokenizer_init and args.max_model_len == 512 and args.attention_backend == "TRITON_ATTN"
    steps = list(engine.generate(prompt, ids, layout, temperature=0, max_tokens=60, min_audio=15))
    assert [step.id for step in steps] == expected(layout) and steps[0].logprob == -0.5
    (given, params), rules = seen[0], Rules.of(layout, ids, 15)
    assert given == {"prompt_token_ids": prompt} and params.extra_args == {KEY: rules.to_json()}
    assert params.detokenize is False and params.stop_token_ids == [ids.eot] and params.output_kind.name == "DELTA"
    try:
        list(engine.generate(prompt, ids, layout, max_tokens=30))
        raise AssertionError("the fault was lost")
    except EngineError as fault:
        assert "EngineCore encountered an issue" in str(fault)


def launch_flags(record):
    """vLLM's own parser takes the launch command, and its ModelConfig the released configurations."""
    vllm()
    from vllm.config import ModelConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from aqaa.scale.vllm import plugin

    plugin.register()
    home = next(name for name in PARSERS if importlib.util.find_spec(name))
    make_arg_parser = importlib.import_module(home).make_arg_parser
    vision = {"vision_tower_config": {"hidden_size": 1024}, "understand_projector_stride": 2, "image_token_id": 13}
    for kind, extra in (("step1", {}), ("mmgpt_step1_v2", {**vision, "eos_token_id": [2, 3]})):
        with tempfile.TemporaryDirectory() as folder:
            given = {**asdict(BackboneConfig()), "model_type": kind, "architectures": ["Step1ForCausalLM"], **extra}
            Path(folder, "config.json").write_text(json.dumps(given), encoding="utf-8")
            command = launch.serve_command(folder, 8, "fp8")
            args = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(command)[2:])
            model = ModelConfig(
                model=folder, skip_tokenizer_init=args.skip_tokenizer_init, hf_overrides=args.hf_overrides,
                max_model_len=args.max_model_len, dtype=args.dtype, logits_processors=args.logits_processors,
                generation_config=args.generation_config,
            )  # fmt: skip
            for how, given in HOWS.items():
                for _, line in launch.serve_lines(folder, 8, "fp8", **given):
                    if line.startswith("vllm"):
                        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(line)[2:])
                        found = [getattr(parsed, name) for name in PARALLEL]
                        record.setdefault("serve_lines", {}).setdefault(how, []).append(found)
        assert args.quantization == "fp8_per_channel" and args.tensor_parallel_size == 8
        assert args.attention_backend == "TRITON_ATTN"
        assert pickle.loads(pickle.dumps(model.hf_config)).to_dict() == model.hf_config.to_dict()  # goes to workers
        assert model.hf_config.tie_word_embeddings is False and model.get_vocab_size() == 74_752
        eight = SimpleNamespace(tensor_parallel_size=8)
        record.setdefault("model_configs", {})[kind] = {
            "command": command.replace(folder, "FOLDER"), "architectures": list(model.architectures),
            "kv_heads_of_8": model.get_num_kv_heads(eight), "head_size": model.get_head_size(),
        }  # fmt: skip
        assert record["model_configs"][kind]["kv_heads_of_8"] == 1 and model.get_head_size() == 128


def model_class(record):
    """Our class for AQAA's checkpoint is vLLM's, and its names are those that vLLM's loader stacks."""
    vllm()
    from vllm.model_executor.models.step1 import Step1ForCausalLM
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from aqaa.scale.vllm.model import Step1AQAAForCausalLM

    stacked = Step1ForCausalLM.hf_to_vllm_mapper.orig_to_new_stacked
    assert set(stacked) == {".q_proj", ".k_proj", ".v_proj", ".gate_proj", ".up_proj"}
    assert issubclass(Step1AQAAForCausalLM, Step1ForCausalLM) and AttentionBackendEnum[ATTENTION]
    record["stacked"] = {name: list(to) for name, to in stacked.items()}


def logits(record):
    """AQAA's class loads a checkpoint with vision beside it and gives our logits; attention is stood in for."""
    from vllm.config import CompilationConfig, DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.models import step1

    from aqaa.scale.vllm import plugin
    from aqaa.scale.vllm.model import Step1AQAAForCausalLM

    plugin.register()
    backbone, _, prompt = small()
    ours, eyes = backbone.config, ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "vit_downsampler.weight")
    state = [(f"language_model.{name}", weight.data) for name, weight in backbone.named_parameters()]
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(step1, "Attention", attention()):
        given = {name: value for name, value in ours.to_dict().items() if isinstance(value, (int, float, str))}
        given |= {"model_type": "mmgpt_step1_v2", "architectures": ["Step1AQAAForCausalLM"], "dtype": "float32"}
        Path(folder, "config.json").write_text(json.dumps(given), encoding="utf-8")
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=512,
                            generation_config="vllm", enforce_eager=True)  # fmt: skip
        whole = VllmConfig(model_config=model, compilation_config=CompilationConfig(custom_ops=["none"]),
                           device_config=DeviceConfig("cpu"))  # fmt: skip
        with set_current_vllm_config(whole), set_forward_context(None, whole), torch.no_grad():
            init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
            initialize_model_parallel(1)
            far = Step1AQAAForCausalLM(vllm_config=whole)
            loaded = far.load_weights([*state, *((name, torch.zeros(3)) for name in eyes)])
            for part in far.modules():
                if hasattr(method := getattr(part, "quant_method", None), "process_weights_after_loading"):
                    method.process_weights_after_loading(part)
            hidden = far(torch.tensor(prompt), torch.arange(len(prompt)), None)
            scores = far.lm_head.quant_method.apply(far.lm_head, hidden)[:, : ours.vocab_size]
            error = float((scores - backbone(torch.tensor([prompt])).logits[0]).abs().max())
    assert len(loaded) == len(dict(far.named_parameters())) and error < 1e-4
    assert whole.attention_config.backend.name == "TRITON_ATTN"
    record["logits_max_error"] = error


def attention():
    """Stands in for vLLM's Attention, whose kernels need a GPU: the same arguments, the sums written out."""
    class Eager(torch.nn.Module):
        def __init__(self, heads, width, scale, *, num_kv_heads, alibi_slopes, use_alibi_sqrt, **_):
            super().__init__()
            assert use_alibi_sqrt
            self.shape, self.groups, self.scale = (-1, heads, width), num_kv_heads, scale
            self.slope = torch.tensor(alibi_slopes)[:, None, None]

        def forward(self, q, k, v):
            q = q.view(self.shape).transpose(0, 1)  # (H, T, D)
            each = q.shape[0] // self.groups
            k, v = (x.view(-1, self.groups, q.shape[2]).transpose(0, 1).repeat_interleave(each, 0) for x in (k, v))
            place = torch.arange(q.shape[1])
            distance = place[:, None] - place
            bias = (-self.slope * distance.clamp(min=0).float().sqrt()).masked_fill(distance < 0, -torch.inf)
            heard = (q @ k.mT * self.scale + bias).softmax(-1) @ v
            return heard.transpose(0, 1).flatten(1)

    return Eager


def slopes(record):
    """vLLM's slopes of the distance bias are ours, for every number of heads."""
    vllm()
    from vllm.model_executor.models.step1 import _get_step_alibi_slopes

    errors = (_get_step_alibi_slopes(n) - attention_slopes(n) for n in range(1, 129))
    record["slopes_max_error"] = max(float(error.abs().max()) for error in errors)
    assert record["slopes_max_error"] < 1e-6


def older_runner(record):
    """Layouts driven by real BatchUpdates: requests come, swap places and go; each gets the local greedy answer."""
    vllm()
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from aqaa.scale.vllm.plugin import Layouts

    prompt, cot = small()[2], dialogue.layout("text_cot")
    wanted = [expected(dialogue.layout()), None, expected(cot)]
    said = wanted[2][:9]
    drawn = [[], [], []]
    prompts = [prompt, prompt, prompt + said]
    processor, free = Layouts(config(), "cpu", False), vllm().SamplingParams()
    given = [params(dialogue.layout()), free, params(cot, said)]
    batch = [0, 1]  # which request is in which row
    update = BatchUpdate(2, [], [(row, given[i], prompts[i], drawn[i]) for row, i in enumerate(batch)], [])
    for step in range(40):
        if step == 10:
            batch = [0, 1, 2]
            update = BatchUpdate(3, [], [(2, given[2], prompts[2], drawn[2])], [])
        if step == 15:
            batch = [2, 1, 0]
            update = BatchUpdate(3, [], [], [(0, 2, MoveDirectionality.SWAP)])
        if step == 20:  # the one without rules goes; the last row moves into its place
            batch = [2, 0]
            update = BatchUpdate(2, [1], [], [(2, 1, MoveDirectionality.UNIDIRECTIONAL)])
        processor.update_state(update)
        logits = scores([prompts[i] + drawn[i] for i in batch])
        before, masked, update = logits.clone(), processor.apply(logits), None
        for row, i in enumerate(batch):
            assert given[i] is not free or masked[row].equal(before[row]), "a request without rules was touched"
            drawn[i].append(int(masked[row].argmax()))
    assert drawn[0] == wanted[0][:40] and said + drawn[2] == wanted[2][: 9 + len(drawn[2])]
    record["older_runner"] = {"ids": [len(ids) for ids in drawn], "swapped": True, "resumed": len(said)}


def newer_runner(record):
    """Layouts driven as the V2 runner does, with its LogitsContext; the buffers that need a GPU are stood in for."""
    vllm()
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

    from aqaa.scale.vllm.plugin import Layouts

    prompt, layout = small()[2], dialogue.layout()
    tokens, lengths = torch.zeros(4, 256, dtype=torch.int32), np.zeros(4, dtype=np.int32)
    held = SimpleNamespace(gpu=tokens)
    state = LogitsProcRequestState("cpu", 4, small()[1].end, held, SimpleNamespace(np=lengths), None, None)
    processor, wanted = Layouts(config(), state), expected(layout)
    rows = {2: [], 0: [], 3: []}  # slot: drawn ids; 0 has no rules, 3 goes on from what was said
    prompts = {2: prompt, 0: prompt, 3: prompt + wanted[:9]}
    given = {2: params(layout), 0: vllm().SamplingParams(), 3: params(layout, wanted[:9])}

    def enter(slot):
        lengths[slot] = len(prompts[slot])
        tokens[slot, : len(prompts[slot] + rows[slot])] = torch.tensor(prompts[slot] + rows[slot])
        return processor.add_request(slot, given[slot])

    assert [enter(slot) for slot in rows] == [True, False, True]
    for step in range(40):
        if step == 20:
            enter(2)  # it had to wait, and is filled in again with what it has said
        order = list(rows) if step % 2 else [3, 2, 0]  # rows of the batch change places at every step
        known = np.array([len(prompts[slot]) + len(rows[slot]) for slot in order], dtype=np.int32)
        slots = np.array(order, dtype=np.int32)
        ctx = LogitsContext(torch.tensor(slots), torch.tensor(slots), slots, torch.zeros(3), None, None, known)
        logits = scores([prompts[slot] + rows[slot] for slot in order])
        before, masked = logits.clone(), processor.apply(logits, ctx)
        for row, slot in enumerate(order):
            assert slot or masked[row].equal(before[row]), "a request without rules was touched"
            rows[slot].append(int(masked[row].argmax()))
            tokens[slot, known[row]] = rows[slot][-1]
    assert rows[2] == wanted[:40] and rows[3] == wanted[9 : 9 + 40][: len(rows[3])]
    record["newer_runner"] = {"ids": [len(ids) for ids in rows.values()], "entered_again": True, "resumed": 9}


CHECKS = (processor_interfaces, request, stream, engine_signatures, in_process, launch_flags, model_class, logits,
          slopes, older_runner, newer_runner)  # fmt: skip


def stub_chunks(model):
    """One chunk of an answer as tests/stub_server.py writes it, to be compared with a recorded one."""
    yield json.loads(json.dumps(Handler._chunk(None, [Step(50, "text", -0.5)], None, True, {"prompt_token_ids": [1]})))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="JSON file for the record")
    args, record, results = parser.parse_args(argv), {}, []

    for check in CHECKS:
        fault = None
        try:
            check(record)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        results.append({"name": check.__name__, "what": inspect.getdoc(check).splitlines()[0], "ok": fault is None})
        print(check.__name__, fault or "ok", flush=True)
    head = {
        "date": datetime.date.today().isoformat(), "command": "python -m tests.vllm_check " + args.out,
        "vllm": vllm().__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "cuda": torch.cuda.is_available(), "platform": vllm().platforms.current_platform.device_type,
        "failed": [result["name"] for result in results if not result["ok"]],
        "not_run": list(NOT_RUN), "checks": results,
    }  # fmt: skip
    Path(args.out).write_text(json.dumps({**head, **record}, indent=1) + "\n", encoding="utf-8")
    return int(bool(head["failed"]))


if __name__ == "__main__":
    sys.exit(main())
