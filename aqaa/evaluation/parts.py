"""`aqaa bench parts`: what each part costs at the sizes of a preset, beside the implementations that it comes from.

Weights and sounds are random and seeded: neither changes the work. All who do the same work take turns in one run, on
the same weights, and their results are compared. "as trained" is our module before `prepared.prepare`: for HiFT, which
no package holds, that is the published order of work (weight norms in every call, every convolution direct).
"AMX" stands for linear layers on the matrix units of a Xeon that has them: fp32 in three products of bf16.
"""

import contextlib
import gc
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median

import torch

from aqaa.config import PRESETS, SAMPLE_RATE, preset
from aqaa.evaluation import peers
from aqaa.fast import prepared
from aqaa.processor import has_bf16
from aqaa.weights import model_folder
from aqaa.weights.verify import skip_init

ROUNDS = 5
LAYER_VOCABULARY = 1024  # rows of the embedding around a single layer, which is all that is timed


@dataclass
class Case:
    """One line of the table: `run` does `seconds` of sound; `others` do the same; compare() -> dict of differences."""

    name: str
    seconds: float
    run: Callable
    others: dict
    compare: Callable = dict


def main(args):
    """Measure and print. args: preset, seed, only, limit (rounds), json, out."""
    from aqaa.records import about, report

    if args.preset not in PRESETS:
        raise ValueError(f"bench parts draws its own weights: --preset is {' or '.join(PRESETS)}, not {args.preset}.")
    chosen = list(PARTS) if args.only is None else [args.only]
    if args.only is None and args.preset == "full":
        chosen.remove("backbone")  # 3 GB for a single layer: only when asked for
    results = {**about("parts"), "preset": args.preset, "seed": args.seed, "peers": versions(), "parts": []}
    for name in chosen:
        torch.manual_seed(args.seed)
        for case in PARTS[name](preset(args.preset)):
            results["parts"].append(case if isinstance(case, dict) else measure(case, args.limit or ROUNDS))
            gc.collect()
    report(args, results, [table(results)])


def versions():
    """Versions of the peers' packages, None where one is missing."""
    return {package: version(package) if peers.installed(package) else None for package in peers.PACKAGES}


def measure(case, rounds=ROUNDS):
    """A Case -> a dict: CPU-seconds (one thread) and wall-seconds (all threads) for a second of sound, and ratios."""
    runs, threads = {"aqaa": case.run, **case.others}, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            differences = case.compare()
            cpu = _turns(runs, rounds, time.process_time)
            torch.set_num_threads(threads)
            wall = _turns(runs, 1, time.perf_counter)
    finally:
        torch.set_num_threads(threads)
    ratios = {
        name: round(median(theirs / ours for theirs, ours in zip(cpu[name], cpu["aqaa"], strict=True)), 2)
        for name in case.others
    }
    return {
        "part": case.name, "seconds": case.seconds, "threads": threads,
        "cpu": {name: round(min(times) / case.seconds, 4) for name, times in cpu.items()},
        "wall": {name: round(min(times) / case.seconds, 4) for name, times in wall.items()},
        "times_faster": ratios, **differences,
    }  # fmt: skip


def _turns(runs, rounds, clock):
    """name -> its times, the runs taking turns; a first round warms up."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = clock()
            run()
            if turn:
                times[name].append(clock() - began)
    return times


# ---- the parts ------------------------------------------------------------------------------------------------------


def _random(name, config, change=lambda module: None):
    """A part with random weights, as trained."""
    plain = model_folder.build(name, config).eval().requires_grad_(False)
    change(plain)
    return plain


def _prepared(plain):
    """The same part ready for inference: {"": …, ", AMX": …}, the second where the processor allows it."""
    ways = {"": prepared.prepare(deepcopy(plain))}
    with contextlib.suppress(ValueError):
        ways[", AMX"] = prepared.prepare(deepcopy(plain), amx=True)
    return ways


def _sound(seconds):
    return 0.2 * torch.randn(int(seconds * SAMPLE_RATE))


def _codes(ours, theirs, hidden, wanted):
    return {"max_error": _error(hidden, wanted), "codes": len(ours), "codes_equal": int((ours == theirs).sum())}


def _error(a, b):
    return float(f"{(a.float() - b.float()).abs().max().item():.1e}")


def linguistic(config):
    """Front end, encoder and nearest centroid; the peer encodes chunk by chunk."""
    def scale(model):
        model.centroids.normal_()
        model.add_shift.fill_(-10)
        model.rescale.fill_(0.2)

    plain = _random("linguistic", config, scale)
    peer = peers.funasr(plain) if peers.installed("funasr") else None
    wav = _sound(5)
    for how, ready in _prepared(plain).items():
        yield _linguistic(f"linguistic{how}", plain, ready, peer, wav)


def _linguistic(name, plain, ready, peer, wav):
    others, compare = {"as trained": lambda: plain.encode(wav, energy_norm=False)}, dict
    if peer:
        others["funasr"] = lambda: plain.quantize(peer(wav))

        def compare():
            hidden, wanted = ready(ready.features(wav)[None])[0], peer(wav)
            return _codes(ready.quantize(hidden), plain.quantize(wanted), hidden, wanted)

    return Case(name, 5, lambda: ready.encode(wav, energy_norm=False), others, compare)


def semantic(config):
    """Log-mel, encoder and nearest entry."""
    def fill(model):
        model.quantizer._codebook.embed.normal_()
        model.quantizer._codebook.embed /= model.quantizer._codebook.embed.norm(dim=1, keepdim=True)

    plain = _random("semantic", config, fill)
    ways = _prepared(plain)
    peer = peers.s3tokenizer(plain) if peers.installed("s3tokenizer") else None
    for seconds in (5, 30):
        wav = _sound(seconds)
        for how, ready in ways.items():
            yield _semantic(f"semantic{how}", plain, ready, peer, wav, seconds)


def _semantic(name, plain, ready, peer, wav, seconds):
    others, compare = {"as trained": lambda: plain.encode(wav, energy_norm=False)}, dict
    if peer:
        others["s3tokenizer"] = lambda: peer(wav)

        def compare():
            hidden, (wanted, codes) = ready.hidden(ready.features(wav)[None])[0][0], peer(wav)
            return _codes(ready.encode(wav, energy_norm=False), codes, hidden, wanted)

    return Case(name, seconds, lambda: ready.encode(wav, energy_norm=False), others, compare)


def flow(config):
    """Ten Euler steps with guidance: the whole, then the decoder beside matcha's, then both in bfloat16."""
    plain = _random("flow", config)
    ways = _prepared(plain)
    token, rate = torch.randint(0, config.ids.n_audio, (1, 210)), 0.7
    seconds, frames, n = 5.04, plain.frames(210), config.flow.output_size
    noise = torch.randn(1, n, frames)

    def whole(model):
        return lambda: model.inference(token, noise=noise, n_timesteps=10, cfg_rate=rate)

    for how, ready in ways.items():
        yield Case(f"flow{how}", seconds, whole(ready), {"as trained": whole(plain)})
    tensors = noise, torch.randn(1, n, frames), torch.randn(1, n), torch.zeros(1, n, frames)
    for how, ready in ways.items():
        yield _decoder(f"flow decoder{how}", seconds, plain, ready, tensors, rate)
    if has_bf16():
        half = [tensor.bfloat16() for tensor in tensors]
        yield _decoder("flow decoder, bfloat16", seconds, plain.bfloat16(), ways[""].bfloat16(), half, rate)


def _decoder(name, seconds, plain, ready, tensors, rate):
    noise, *told = tensors
    others, compare = {}, dict
    if peers.installed("matcha-tts"):
        peer = peers.matcha(plain)
        others["matcha-tts"] = lambda: peer(noise, None, *told, 10, rate)

        def compare():
            few = 2  # steps: what ten steps make of a difference is the weights' doing
            ours, theirs = ready.decoder(noise, None, *told, few, rate), peer(noise, None, *told, few, rate)
            return {"max_error": _error(ours, theirs)}

    return Case(name, seconds, lambda: ready.decoder(noise, None, *told, 10, rate), others, compare)


def hift(config):
    """Mel to wave; then the pitch alone."""
    plain = _random("hift", config)
    ready = prepared.prepare(deepcopy(plain))
    mel = torch.randn(1, config.mel.num_mels, 5 * config.mel.sampling_rate // config.mel.hop_size)

    def compare():
        source = plain.source(plain.f0_predictor(mel), plain.m_source.start(0))
        return {"max_error": _error(ready.decode(mel, source), plain.decode(mel, source))}

    seconds = round(mel.shape[2] * config.mel.hop_size / config.mel.sampling_rate, 3)
    others = {"as trained": lambda: plain.inference(mel, plain.m_source.start(0))}
    yield Case("hift", seconds, lambda: ready.inference(mel, ready.m_source.start(0)), others, compare)
    others = {"as trained": lambda: plain.f0_predictor(mel)}
    yield Case("f0", seconds, lambda: ready.f0_predictor(mel), others)


def backbone(config):
    """One token after another: all layers of the mini in fp32; of the full one a single layer, in bfloat16."""
    from aqaa.backbone.generation import Decoder

    whole, sizes = config.name == "mini", config.backbone
    if not whole:
        sizes = replace(sizes, num_hidden_layers=1, vocab_size=LAYER_VOCABULARY)
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32 if whole else torch.bfloat16)
        with skip_init():
            model = model_folder.build("backbone", replace(config, backbone=sizes)).requires_grad_(False)
            prepared.prepare(model)
    finally:
        torch.set_default_dtype(usual)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    past, steps = 128, 64 if whole else 4
    with torch.inference_mode():
        decoder = Decoder(model, 1, past + steps + 1)
        decoder.feed(model.model.embed_tokens(torch.zeros(1, past, dtype=torch.long)))
        token, times = model.model.embed_tokens(torch.zeros(1, 1, dtype=torch.long)), []
        for _ in range(steps):
            began = time.perf_counter()
            hidden = decoder.feed(token)
            if whole:
                model.logits(hidden)
            times.append(1000 * (time.perf_counter() - began))
    ms = median(times)
    row = {"part": "backbone", "dtype": str(token.dtype), "layers": sizes.num_hidden_layers, "past": past,
           "threads": torch.get_num_threads(), "ms": round(ms, 3)}
    yield row | ({"tokens_per_s": round(1000 / ms, 1)} if whole else {"ms_per_layer": round(ms, 1)})


PARTS = {"linguistic": linguistic, "semantic": semantic, "flow": flow, "hift": hift, "backbone": backbone}


# ---- the table ------------------------------------------------------------------------------------------------------


def table(results):
    """The results of `main` as Markdown."""
    lines = [
        f"{results['preset']}, {results['hardware']}. Seconds for a second of sound: CPU time of 1 thread (wall, all "
        "threads).", "",
        "| part | sound, s | aqaa | others | aqaa is faster | results agree |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in results["parts"]:
        if "cpu" not in row:
            speed = f"{row['tokens_per_s']} tokens/s" if "tokens_per_s" in row else f"{row['ms_per_layer']} ms a layer"
            lines.append(f"| {row['part']} | | {speed} | | | |")
            continue
        times = {name: f"{cpu} ({row['wall'][name]})" for name, cpu in row["cpu"].items()}
        ours = times.pop("aqaa")
        others = ", ".join(f"{name} {time}" for name, time in times.items())
        ratios = ", ".join(f"{ratio} x {name}" for name, ratio in row["times_faster"].items())
        agree = f"{row['max_error']:.0e}" if "max_error" in row else ""
        if "codes" in row:
            agree += f", {row['codes_equal']} of {row['codes']} codes"
        lines.append(f"| {row['part']} | {row['seconds']} | {ours} | {others} | {ratios} | {agree} |")
    missing = [package for package, found in results["peers"].items() if not found]
    if missing:
        lines += ["", f"Not installed: {', '.join(missing)}. pip install 'aqaa[peers]' brings them into the table."]
    return "\n".join(lines)
