"""`aqaa bench parts`: what each part costs at a preset's sizes, beside the code that it is from.

Weights and sounds are random and seeded: neither changes the work. All who do the same work take
turns in one run, on the same weights, and their results are compared. "as trained" is our module
before `prepared.prepare`: for HiFT, which no package holds, that is the published order of work
(weight norms in every call, every convolution direct). "AMX": linear layers on the matrix units of
a Xeon that has them, fp32 in three products of bf16."""

import contextlib
import gc
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import truediv
from statistics import median

import torch

from aqaa.backbone.generation import Decoder
from aqaa.config import PRESETS, SAMPLE_RATE
from aqaa.evaluation import peers
from aqaa.evaluation.speed import turns
from aqaa.fast import prepared
from aqaa.processor import has_bf16
from aqaa.weights import model_folder
from aqaa.weights.verify import skip_init

ROUNDS = 5
LAYER_VOCABULARY = 1024  # rows of the embedding around a single layer, which is all that is timed


@dataclass
class Case:
    """A line of the table: `run` does `seconds` of sound, `others` do the same work."""

    name: str
    seconds: float
    run: Callable
    others: dict
    compare: Callable = dict  # () -> dict of differences between their results


def measure(preset="mini", seed=0, only=None, limit=ROUNDS):
    """{"preset", "seed", "peers", "parts"}: each part, or `only` one, timed in `limit` rounds.
    Raises ValueError for a folder of weights: the bench draws its own."""
    if preset not in PRESETS:
        names = " or ".join(PRESETS)
        raise ValueError(f"bench parts draws its own weights: --preset is {names}, not {preset}.")
    if only and only not in PARTS:
        raise ValueError(f"bench parts knows no {only!r}: choose one of {', '.join(PARTS)}.")
    # A single layer of the full backbone takes 3 GB: only when asked for.
    usual = [name for name in PARTS if preset != "full" or name != "backbone"]
    installed = {name: version(name) if peers.installed(name) else None for name in peers.PACKAGES}
    rows = []
    for name in [only] if only else usual:
        torch.manual_seed(seed)
        for case in PARTS[name](PRESETS[preset]()):
            rows.append(case if isinstance(case, dict) else time_case(case, limit))
            gc.collect()
    return {"preset": preset, "seed": seed, "peers": installed, "parts": rows}


def time_case(case, rounds=ROUNDS):
    """A Case -> a dict: CPU-seconds (one thread) and wall-seconds (all threads) a second of sound.
    times_faster: median ratio of the others' CPU time to ours, within one round."""
    runs, threads = {"aqaa": case.run, **case.others}, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            differences = case.compare()
            cpu = turns(runs, rounds, time.process_time)
            torch.set_num_threads(threads)
            wall = turns(runs, 1, time.perf_counter)
    finally:
        torch.set_num_threads(threads)
    row = {"part": case.name, "seconds": case.seconds, "threads": threads}
    for clock, times in (("cpu", cpu), ("wall", wall)):
        row[clock] = {name: round(min(each) / case.seconds, 4) for name, each in times.items()}
    ours = cpu.pop("aqaa")
    ratios = {name: median(map(truediv, theirs, ours)) for name, theirs in cpu.items()}
    row["times_faster"] = {name: round(ratio, 2) for name, ratio in ratios.items()}
    return row | differences


def _random(name, config):
    """A part with random weights, as trained."""
    return model_folder.build(name, config).eval().requires_grad_(False)


def _prepared(plain):
    """The part ready for inference: {"": …, ", AMX": … where the processor allows it}."""
    ways = {"": prepared.prepare(deepcopy(plain))}
    with contextlib.suppress(ValueError):
        ways[", AMX"] = prepared.prepare(deepcopy(plain), amx=True)
    return ways


def _error(a, b):
    return float(f"{(a.float() - b.float()).abs().max().item():.1e}")


def linguistic(config):
    """Front end, encoder and nearest centroid; the peer encodes chunk by chunk."""
    plain = _random("linguistic", config)
    plain.centroids.normal_()
    plain.add_shift.fill_(-10)
    plain.rescale.fill_(0.2)
    return _tokenizer("linguistic", plain, "funasr", type(plain).__call__, (5,))


def semantic(config):
    """Log-mel, encoder and nearest entry."""
    plain = _random("semantic", config)
    entries = plain.quantizer._codebook.embed
    entries.normal_()
    entries /= entries.norm(dim=1, keepdim=True)
    hidden = type(plain).hidden
    return _tokenizer("semantic", plain, "s3tokenizer", lambda *x: hidden(*x)[0], (5, 30))


def _tokenizer(name, plain, package, encoder, lengths):
    """Cases of a tokenizer, for sounds of several lengths in seconds. package: of the peer;
    encoder(ready, features (1, T, F)) -> our hidden rows (1, T, D)."""
    ways = _prepared(plain)
    peer = getattr(peers, package)(plain) if peers.installed(package) else None
    for seconds in lengths:
        wav = 0.2 * torch.randn(seconds * SAMPLE_RATE)
        for how, ready in ways.items():
            encode = partial(ready.encode, wav, energy_norm=False)
            others = {"as trained": partial(plain.encode, wav, energy_norm=False)}
            if peer:
                others[package] = partial(peer, wav)

            def compare(wav=wav, ready=ready, encode=encode):
                if not peer:
                    return {}
                wanted, codes = peer(wav)
                ours = encode()
                error = _error(encoder(ready, ready.features(wav)[None])[0], wanted)
                equal = int((ours == codes).sum())
                return {"max_error": error, "codes": len(ours), "codes_equal": equal}

            yield Case(name + how, seconds, encode, others, compare)


def flow(config):
    """Ten Euler steps with guidance: the whole, the decoder beside matcha's, both in bfloat16."""
    plain = _random("flow", config)
    ways = _prepared(plain)
    token, rate = torch.randint(0, config.ids.n_audio, (1, 210)), 0.7
    seconds, frames, n = 5.04, plain.frames(210), config.flow.output_size
    noise = torch.randn(1, n, frames)

    def whole(model):
        return partial(model.inference, token, noise=noise, n_timesteps=10, cfg_rate=rate)

    for how, ready in ways.items():
        yield Case(f"flow{how}", seconds, whole(ready), {"as trained": whole(plain)})
    tensors = noise, torch.randn(1, n, frames), torch.randn(1, n), torch.zeros(1, n, frames)
    for how, ready in ways.items():
        yield _decoder(f"flow decoder{how}", seconds, plain, ready, tensors, rate)
    if has_bf16():
        half = [tensor.bfloat16() for tensor in tensors]
        plain, ready = plain.bfloat16(), ways[""].bfloat16()
        yield _decoder("flow decoder, bfloat16", seconds, plain, ready, half, rate)


def _decoder(name, seconds, plain, ready, tensors, rate):
    noise, *told = tensors
    inputs, run = (noise, None, *told), ready.decoder
    case = Case(name, seconds, partial(run, *inputs, 10, rate), {})
    if peers.installed("matcha-tts"):
        peer, few = peers.matcha(plain), 2  # what ten steps make of a difference is the weights'
        case.others["matcha-tts"] = partial(peer, *inputs, 10, rate)
        ours, theirs = (partial(make, *inputs, few, rate) for make in (run, peer))
        case.compare = lambda: {"max_error": _error(ours(), theirs())}
    return case


def hift(config):
    """Mel to wave; then the pitch alone."""
    plain, sizes = _random("hift", config), config.mel
    ready = prepared.prepare(deepcopy(plain))
    mel = torch.randn(1, sizes.num_mels, 5 * sizes.sampling_rate // sizes.hop_size)
    seconds = round(mel.shape[2] * sizes.hop_size / sizes.sampling_rate, 3)

    def compare():
        source = plain.source(plain.f0_predictor(mel), plain.m_source.start(0))
        return {"max_error": _error(ready.decode(mel, source), plain.decode(mel, source))}

    def whole(model):
        return lambda: model.inference(mel, model.m_source.start(0))

    yield Case("hift", seconds, whole(ready), {"as trained": whole(plain)}, compare)
    others = {"as trained": partial(plain.f0_predictor, mel)}
    yield Case("f0", seconds, partial(ready.f0_predictor, mel), others)


def backbone(config):
    """One token after another: the mini in fp32; a layer of the full one, in bfloat16."""
    whole, sizes = config.name == "mini", config.backbone
    if not whole:
        sizes = replace(sizes, num_hidden_layers=1, vocab_size=LAYER_VOCABULARY)
    with torch.device("meta"), skip_init():  # at no time are there more bytes than its own
        model = _random("backbone", replace(config, backbone=sizes))
    model.to(torch.float32 if whole else torch.bfloat16).to_empty(device="cpu")
    prepared.prepare(model)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    past, steps = 128, 64 if whole else 4
    with torch.inference_mode():
        decoder, embed = Decoder(model, 1, past + steps + 1), model.model.embed_tokens
        decoder.feed(embed(torch.zeros(1, past, dtype=torch.long)))
        token = embed(torch.zeros(1, 1, dtype=torch.long))  # (1, 1, D)

        def step():
            hidden = decoder.feed(token)
            if whole:
                model.logits(hidden)

        times = turns({"step": step}, steps, warm_up=0)["step"]
    ms = 1000 * median(times)
    row = {"part": "backbone", "dtype": str(token.dtype), "layers": sizes.num_hidden_layers,
           "past": past, "threads": torch.get_num_threads(), "ms": round(ms, 3)}  # fmt: skip
    speed = {"tokens_per_s": round(1000 / ms, 1)} if whole else {"ms_per_layer": round(ms, 1)}
    yield row | speed


PARTS = {part.__name__: part for part in (linguistic, semantic, flow, hift, backbone)}


def table(result):
    """A result as Markdown."""
    lines = [f"{result['preset']}, {result['hardware']}. Seconds for a second of sound: CPU time "
             "of 1 thread (wall, all threads).", "",
             "| part | sound, s | aqaa | others | aqaa is faster | results agree |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["parts"]:
        if "cpu" not in row:
            ms = row.get("ms_per_layer")
            speed = f"{row['tokens_per_s']} tokens/s" if ms is None else f"{ms} ms a layer"
            lines.append(f"| {row['part']} | | {speed} | | | |")
            continue
        times = {name: f"{cpu} ({row['wall'][name]})" for name, cpu in row["cpu"].items()}
        ours = times.pop("aqaa")
        others = ", ".join(f"{name} {time}" for name, time in times.items())
        ratios = ", ".join(f"{ratio} x {name}" for name, ratio in row["times_faster"].items())
        agree = f"{row['max_error']:.0e}" if "max_error" in row else ""
        if "codes" in row:
            agree += f", {row['codes_equal']} of {row['codes']} codes"
        cells = (row["part"], row["seconds"], ours, others, ratios, agree)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if missing := [package for package, number in result["peers"].items() if not number]:
        lines += ["", f"Not installed: {', '.join(missing)}. "
                      "pip install 'aqaa[peers]' brings them into the table."]  # fmt: skip
    return "\n".join(lines)
