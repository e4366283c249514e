"""`aqaa bench speed`: how long each part takes, and when the first sound comes; with --busy also on a busy machine."""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from statistics import median

REPEATS = 5
COLD = 3  # fresh processes of each kind, in turns
SIDE_BY_SIDE = ("total_s", "real_time_factor", "stream_first_audio_s", "stream_real_time_factor", "tokens_per_s")


def main(args):
    """Measure and report. args: preset, device, seed, busy, json, out, limit (how many questions are asked)."""
    from aqaa.records import about, report

    found = speed(args.preset, args.device, args.limit or REPEATS, args.seed, args.busy)
    results = {**about("speed", args.device), **found}
    report(args, results, [f"{name:28} {value}" for name, value in results.items()])


def speed(source="mini", device="cpu", repeats=REPEATS, seed=0, busy=False):
    """A dict of numbers; times are medians over `repeats` questions, in seconds.

    busy: measure again while every core also runs somebody else's endless loop; "busy" then holds those numbers, and
    "busy_over_idle" how many times as long an answer takes.
    """
    from aqaa import loading
    from aqaa.weights import model_folder

    questions = _questions(repeats)
    cold = _cold(questions[0], source, device) if isinstance(questions[0], str) else {}
    began = time.perf_counter()
    model = loading.load(source, device=device)
    model.ask(questions[0], seed=seed)
    cold["load_and_first_answer_s"] = round(time.perf_counter() - began, 3)
    results = {"hardware": _hardware(device), **cold, **answering(model, questions, seed)}
    if busy:
        with busy_machine():
            loaded = answering(model, questions, seed)
        results["busy"] = {name: loaded[name] for name in SIDE_BY_SIDE}
        results["busy_loops"] = os.cpu_count()
        results["busy_over_idle"] = round(loaded["total_s"] / results["total_s"], 2)
    networks = {name: getattr(model, "decoder" if name == "backbone" else name) for name in model_folder.PARTS}
    parts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return {**results, "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "parameters": parts}  # fmt: skip


def answering(model, questions, seed=0):
    """Medians over questions, each answered in one go and as a stream."""
    asked = [model.ask(question, seed=seed) for question in questions]
    streamed = [model.stream(question, seed=seed).answer for question in questions]
    return {
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
    }


@contextmanager
def busy_machine(loops=None):
    """Every core also has another program to run: `loops` endless loops (one a core) in processes of their own."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(loops or os.cpu_count())]
    try:
        time.sleep(0.2)  # until they run
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _questions(count):
    """Shipped questions, as paths; where there are none, three seconds of a buzzing tone."""
    import torch

    from aqaa import files

    found = sorted((files.data_folder() / "questions").glob("*.wav"))
    if found:
        return [str(found[i % len(found)]) for i in range(count)]
    phase = torch.arange(48_000) / 16_000 * 150
    return [(0.5 * (phase % 1 - 0.5), 16_000)] * count


def _median(values):
    return round(median(values), 3)


def _cold(question, source, device):
    """Fresh processes, in turns so that a machine that slows down slows all of them: medians in seconds.

    "ask_cold_to_wav_s" is the whole command, from the shell's view; the imports are measured the same way.
    """
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/answer.wav"
        commands = {
            "import_nothing_s": ["-c", "pass"],
            "import_aqaa_s": ["-c", "import aqaa"],
            "import_torch_s": ["-c", "import torch"],
            "ask_cold_to_wav_s": ["-m", "aqaa", "ask", question, "--preset", source, "--device", device, "-o", wav],
        }
        times = {name: [] for name in commands}
        for _ in range(COLD):
            for name, command in commands.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - began)
    start = median(times["import_nothing_s"])
    found = {name: round(median(seconds), 3) for name, seconds in times.items()}
    return found | {"import_aqaa_s": round(max(0.0, found["import_aqaa_s"] - start), 3)}


def _hardware(device):
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    from aqaa.doctor import devices

    return f"{devices()['cpu']}, {platform.system()}"
