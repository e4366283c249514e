"""`aqaa doctor`: what this machine has, and what is missing for asking, for training, for judging."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path

PACKAGES = ("torch", "torchaudio", "transformers", "soundfile", "safetensors", "numpy", "scipy", "tqdm", "pocketsphinx")
ENGINES = {  # program: what it is for, and the Debian packages that bring it and its voices
    "espeak-ng": ("questions in many voices", "espeak-ng"),
    "flite": ("questions and the answer voice", "flite"),
    "festival": ("questions", "festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts"),
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def main(args):
    """Print the report. Returns 0 if `aqaa ask` can work here, 1 if not."""
    report = {
        "versions": versions(), "devices": devices(), "speech engines": engines(), "weights": weights(args.preset),
    }
    if args.json:
        print(json.dumps(report))
    else:
        for title, rows in report.items():
            print(title)
            for name, value in rows.items():
                print(f"  {name:14} {value}")
    if fault := report["weights"].get("fault"):
        print("aqaa:", fault, file=sys.stderr)
    return int(fault is not None)


def versions():
    """Version of Python and of every package that matters here."""
    found = {"python": platform.python_version()}
    for name in ("aqaa", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices():
    """Processors, and what they can compute in bf16."""
    import torch

    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = [flag for flag in CPU_FLAGS if f" {flag} " in info.replace("\n", " ")]
    found = {
        "cpu": f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {' '.join(flags) or 'no wide vectors'}"
    }
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}"
    if len(found) == 1:
        found["cuda"] = "none"
    return found


def engines():
    """Where each speech engine is, or how to get it; only `aqaa train corpus` and `aqaa bench accuracy` need them."""
    return {
        name: shutil.which(name) or f"missing (for {purpose}): apt-get install {packages}"
        for name, (purpose, packages) in ENGINES.items()
    }


def weights(source):
    """Size and hash of every weight file, or {"fault": one sentence}."""
    from aqaa import checkpoints

    try:
        folder = checkpoints.find(source)
        checkpoints.read_config(folder)
        found = {"folder": str(folder)}
        for name, facts in checkpoints.inspect(folder).items():
            known = "as recorded" if facts["as_recorded"] else "NOT as recorded"
            found[name] = f"{facts['bytes'] / 1e6:6.1f} MB  sha256 {facts['sha256'][:16]}  {known}"
        return found
    except checkpoints.ModelError as fault:
        return {"fault": str(fault)}
