"""`aqaa bench speed`: how long each part takes, and when the first sound comes."""

import platform
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

REPEATS = 5


def main(args):
    """Measure and print. args: preset, device, seed, json, out, limit (how many questions are asked)."""
    from aqaa.evaluation.accuracy import report
    from aqaa.records import about

    results = {**about("speed", args.device), **speed(args.preset, args.device, args.limit or REPEATS, args.seed)}
    report(args, results, [f"{name:28} {value}" for name, value in results.items()])


def speed(source="mini", device="cpu", repeats=REPEATS, seed=0):
    """A dict of numbers; times are medians over `repeats` questions, in seconds."""
    from aqaa import checkpoints

    questions = _questions(repeats)
    cold = {"import_aqaa_s": _command("import aqaa"), "import_torch_s": _command("import torch")}
    if isinstance(questions[0], str):
        cold["ask_cold_to_wav_s"] = _cold(questions[0], source, device)
    began = time.perf_counter()
    model = checkpoints.load(source, device=device)
    model.ask(questions[0], seed=seed)
    cold["load_and_first_answer_s"] = time.perf_counter() - began
    asked = [model.ask(question, seed=seed) for question in questions]
    streamed = [model.stream(question, seed=seed).answer for question in questions]
    return {
        "hardware": _hardware(device),
        **{name: round(seconds, 3) for name, seconds in cold.items()},
        "answer_s": _median(a.seconds for a in asked),
        "linguistic_s": _median(a.timings["linguistic"] for a in asked),
        "semantic_s": _median(a.timings["semantic"] for a in asked),
        "generate_s": _median(a.timings["generate"] for a in asked),
        "vocode_s": _median(a.timings["vocode"] for a in asked),
        "total_s": _median(a.timings["total"] for a in asked),
        "real_time_factor": _median(a.real_time_factor for a in asked),
        "tokens_per_s": _median(len(a.tokens["answer"]) / a.timings["generate"] for a in asked),
        "stream_first_audio_s": _median(a.timings["first_audio"] for a in streamed),
        "stream_first_audio_share": _median(a.timings["first_audio_share"] for a in streamed),
        "stream_real_time_factor": _median(a.real_time_factor for a in streamed),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "parameters": {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in checkpoints.PARTS},
    }


def _questions(count):
    """Shipped questions, as paths; where there are none, three seconds of a buzzing tone."""
    import torch

    from aqaa import checkpoints

    found = sorted((checkpoints.data_folder() / "questions").glob("*.wav"))
    if found:
        return [str(found[i % len(found)]) for i in range(count)]
    phase = torch.arange(48_000) / 16_000 * 150
    return [(0.5 * (phase % 1 - 0.5), 16_000)] * count


def _median(values):
    return round(median(values), 3)


def _command(code):
    """Seconds that a fresh interpreter needs for `code`, its own start left out."""
    def once(text):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", text], check=True)
        return time.perf_counter() - began

    return max(0.0, min(once(code) for _ in range(2)) - min(once("pass") for _ in range(2)))


def _cold(question, source, device):
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "aqaa", "ask", question, "--preset", source, "--device", device]
        subprocess.run([*command, "-o", f"{folder}/answer.wav"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began


def _hardware(device):
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    from aqaa.doctor import devices

    return f"{devices()['cpu']}, {platform.system()}"
