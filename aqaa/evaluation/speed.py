"""`aqaa bench speed`: how long each part takes and when sound begins; --busy also under load."""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch

from aqaa import files, loading
from aqaa.doctor import devices
from aqaa.weights import model_folder

REPEATS = 5
COLD = 3  # fresh processes of each kind, in turns
SIDE_BY_SIDE = ("total_s", "real_time_factor", "stream_first_audio_s", "stream_real_time_factor",
                "tokens_per_s")  # measured on a busy machine too  # fmt: skip


def measure(preset="mini", device="cpu", seed=0, limit=REPEATS, busy=False):
    """A dict of numbers; times are medians over `limit` questions, in seconds. busy: measure again
    while every core also runs somebody else's endless loop; "busy" then holds those numbers, and
    "busy_over_idle" how many times as long an answer takes."""
    questions = _questions(limit)
    # Fresh processes are started first, before this one takes memory and caches.
    cold = _cold(questions[0], preset, device) if isinstance(questions[0], str) else {}
    began = time.perf_counter()
    model = loading.load(preset, device=device)
    model.ask(questions[0], seed=seed)
    cold["load_and_first_answer_s"] = round(time.perf_counter() - began, 3)
    cuda, cpu = device.startswith("cuda"), f"{devices()['cpu']}, {platform.system()}"
    hardware = torch.cuda.get_device_name(device) if cuda else cpu
    results = {"hardware": hardware, **cold, **answering(model, questions, seed)}
    if busy:
        with busy_machine():
            loaded = answering(model, questions, seed)
        results["busy"] = {name: loaded[name] for name in SIDE_BY_SIDE}
        results["busy_loops"] = os.cpu_count()
        results["busy_over_idle"] = round(loaded["total_s"] / results["total_s"], 2)
    results["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    networks = {name: "decoder" if name == "backbone" else name for name in model_folder.PARTS}
    sizes = {part: sum(p.numel() for p in getattr(model, network).parameters())
             for part, network in networks.items()}  # fmt: skip
    return {**results, "parameters": sizes}


def turns(runs, rounds, clock=time.perf_counter, warm_up=1):
    """{name: its times} of runs {name: function}, after `warm_up` rounds that do not count. They
    take turns: a machine that slows down slows all."""
    times = {name: [] for name in runs}
    for turn in range(rounds + warm_up):
        for name, run in runs.items():
            began = clock()
            run()
            if turn >= warm_up:
                times[name].append(clock() - began)
    return times


def answering(model, questions, seed=0):
    """Medians over questions, each answered in one go and as a stream."""
    asked = [model.ask(question, seed=seed) for question in questions]
    streamed = [model.stream(question, seed=seed).answer for question in questions]
    parts = ("linguistic", "semantic", "generate", "vocode", "total")
    values = {
        "answer_s": [a.seconds for a in asked],
        **{f"{part}_s": [a.timings[part] for a in asked] for part in parts},
        "real_time_factor": [a.real_time_factor for a in asked],
        "tokens_per_s": [len(a.tokens["answer"]) / a.timings["generate"] for a in asked],
        "stream_first_audio_s": [a.timings["first_audio"] for a in streamed],
        "stream_first_audio_share": [a.timings["first_audio_share"] for a in streamed],
        "stream_real_time_factor": [a.real_time_factor for a in streamed],
    }
    return {name: round(median(row), 3) for name, row in values.items()}


@contextmanager
def busy_machine(loops=None):
    """`loops` endless loops (one a core) run in processes of their own, until the end."""
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
    paths = sorted((files.data_folder() / "questions").glob("*.wav"))
    if paths:
        return [str(paths[i % len(paths)]) for i in range(count)]
    phase = torch.arange(48_000) / 16_000 * 150
    return [(0.5 * (phase % 1 - 0.5), 16_000)] * count


def _cold(question, preset, device):
    """Fresh processes, in turns: medians in seconds. "ask_cold_to_wav_s" is the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--preset", preset, "--device", device, "-o", f"{folder}/answer.wav"]
        commands = {"import_nothing_s": ["-c", "pass"], "import_aqaa_s": ["-c", "import aqaa"],
                    "import_torch_s": ["-c", "import torch"],
                    "ask_cold_to_wav_s": ["-m", "aqaa", "ask", question, *options]}  # fmt: skip
        start = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        runs = {name: partial(start, [sys.executable, *words]) for name, words in commands.items()}
        times = turns(runs, COLD, warm_up=0)
    results = {name: round(median(seconds), 3) for name, seconds in times.items()}
    own = results["import_aqaa_s"] - median(times["import_nothing_s"])
    return results | {"import_aqaa_s": round(max(0.0, own), 3)}
