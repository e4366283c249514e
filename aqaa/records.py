"""Where a recorded number comes from: date, commit, hardware and command."""

import datetime
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from aqaa.files import write_json
from aqaa.processor import cpuinfo


def commit():
    """Short hash of the code's commit: $AQAA_COMMIT (for a copy without history), or git's."""
    if named := os.environ.get("AQAA_COMMIT"):
        return named
    command, folder = ["git", "rev-parse", "--short", "HEAD"], Path(__file__).parent
    try:
        return subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, encoding="utf-8").strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(device="cpu"):
    """Date, commit and hardware of a result: the GPU, or the processor and torch's threads."""
    if str(device).startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        model = cpuinfo("model name") or platform.processor() or platform.machine()
        name = f"{model}, {torch.get_num_threads()} thread(s)"
    today = datetime.date.today().isoformat()
    return {"date": today, "commit": commit(), "hardware": name, "torch": torch.__version__}


def about(name, device="cpu"):
    """The head of a recorded result: its name, its provenance and the command that made it."""
    return {"what": name, **provenance(device), "command": " ".join(["aqaa", *sys.argv[1:]])}


class Record:
    """A JSON file that grows; written anew, and whole, with each number."""

    def __init__(self, path, head):
        self.path, self.data = path and Path(path), {**head, "faults": {}}
        self.write()

    def add(self, **values):
        self.data |= values
        self.write()
        for name, value in values.items():
            print(f"{name:24} {json.dumps(value)}", flush=True)

    def write(self):
        if self.path:
            write_json(self.path, self.data)

    @contextmanager
    def measuring(self, name):
        """A fault inside is noted, and the measurements that follow are still made."""
        try:
            yield
        except Exception as fault:  # of any kind: time on such a GPU is rare
            text = f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0]}"
            self.data["faults"][name] = text
            self.write()
            print(f"aqaa: {name} was not measured ({text})", file=sys.stderr, flush=True)
