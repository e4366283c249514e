"""A small training, ended by a signal at one point after another and resumed: does it differ from an unbroken one?

    python -m tests.broken_training FOLDER SIGNAL EVERY

A point is a step, or a moment at which Python opens, renames or removes a file of the run. Prints JSON: the number of
points and, of each that left a trace, the difference.
"""

import csv
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from aqaa.training import loop

STEPS = 5
EVENTS = {"open", "os.rename", "os.remove", "os.chmod"}
FILES = ["toy.ckpt", "toy.ckpt.previous", "toy.csv"]


class Task:
    """A regression with dropout that logs a second number from its third step on."""

    lr = 1e-2

    def __init__(self):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)]
        self.net = torch.nn.Sequential(*layers)
        self.modules = {"net": self.net}

    def batch(self, rng):
        sys.audit("step")
        return {"x": torch.from_numpy(rng.standard_normal((6, 4)).astype(np.float32))}

    def loss(self, batch, step):
        loss = (self.net(batch["x"]) - batch["x"].flip(1)).square().mean()
        sys.audit("step")
        return loss, {"late": loss.detach()} if step > 1 else {}


def train(folder, end=None, at=None):
    """The training in a process of its own, with signal `end` at point `at`; returns (its exit, number of points)."""
    count = folder.with_suffix(".count")
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, int(count.read_text(encoding="utf-8")) if count.exists() else 0
    points = 0

    def watch(event, arguments):
        nonlocal points
        if event == "step" or event in EVENTS and str(arguments[0]).startswith(str(folder)):
            points += 1
            if points == at:
                os.kill(os.getpid(), end)

    code = 1
    try:
        sys.addaudithook(watch)
        loop.Trainer(Task(), folder, "toy", STEPS, resume=True, quiet=True).run()
        count.write_text(str(points), encoding="utf-8")
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def state(folder):
    """(hash of weights and moments, the log without its seconds, the names of the files)."""
    kept = torch.load(folder / "toy.ckpt", weights_only=True)
    tensors = [*kept["modules"]["net"].values()]
    for optimizer in kept["optimizers"].values():
        tensors += [value for moments in optimizer["state"].values() for value in moments.values()]
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
    with open(folder / "toy.csv", newline="", encoding="utf-8") as file:
        rows = [[row[name] for name in row if name != "seconds"] for row in csv.DictReader(file)]
    return digest, rows, sorted(path.name for path in folder.iterdir())


def main(folder, name, every):
    torch.set_num_threads(1)
    loop.SAVE_SECONDS, loop.LOG_EVERY = -1, 2
    loop.Trainer._plot = lambda self: None
    os.fsync = lambda handle: None  # no power cut is tried
    folder, end = Path(folder).resolve(), signal.Signals[name]
    loop.Trainer(Task(), folder / "whole", "toy", STEPS, quiet=True).run()  # here, so that children import nothing more
    wanted, tried, differ = state(folder / "whole"), [], {}
    code, points = train(folder / "again")
    assert code == 0 and state(folder / "again") == wanted and wanted[2] == FILES
    assert [row[0] for row in wanted[1]] == ["2", "4", "5"]
    for point in range(1, points + 1, int(every)):
        broken = folder / "broken"
        first, _ = train(broken, end, point)
        last, _ = train(broken)
        tried.append(first)
        if last or state(broken) != wanted:
            differ[point] = [last, *state(broken)]
        shutil.rmtree(broken)
    print(json.dumps({"points": len(tried), "ends": sorted(set(tried)), "differ": differ}))


if __name__ == "__main__":
    main(*sys.argv[1:])
