"""One training loop for every part: seeded by step, logged to a CSV and a plot, interruptible at any point.

A task knows its data and its loss; the loop knows time. Because the batch of step `n` is a function of (seed, n)
alone, a run that was interrupted and resumed sees what an uninterrupted one would have seen.

A task has
  modules()            dict of name -> nn.Module, everything that must be saved
  batch(rng)           dict of tensors, drawn with a numpy Generator
  loss(batch, step)    (scalar loss, dict of numbers to log)
and, only if it needs more than one optimizer (HiFT and its discriminators),
  optimizers()         dict of name -> torch optimizer
  train_step(batch, step, progress)   dict of numbers to log
Optional: `event(progress)` is called before each step (the semantic tokenizer turns its quantiser on there);
`lr`, `warmup` and `floor` (share of the rate that is left at the end) override the defaults below.
"""

import csv
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

LOG_EVERY = 20  # steps between two rows of the CSV
SAVE_SECONDS = 60.0


def cosine(progress, warmup=0.03, floor=0.02):
    """Factor on the learning rate at `progress` in [0, 1]: linear warm-up, then a cosine down to `floor`."""
    if progress < warmup:
        return progress / warmup
    along = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0)))


def build_optimizers(modules, lr, weight_decay=0.01):
    """Muon for the matrices inside a network, AdamW for the rest (embeddings, heads, norms, convolutions)."""
    matrices, others = [], []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and not any(key in name for key in ("embed", "head", "_out_"))
            (matrices if hidden else others).append(parameter)
    found = {"adamw": torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)}
    if matrices:
        found["muon"] = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return found


class Trainer:
    """Runs `task` for `steps` steps in `folder`/`name`.* and leaves name.ckpt, name.csv and name.png there.

    With `minutes` the run, its schedule included, ends after that much training time if the steps take longer.
    """

    def __init__(self, task, folder, name, steps, *, minutes=None, seed=0, device="cpu", resume=False, quiet=False):
        self.task, self.name, self.steps, self.minutes, self.seed = task, name, steps, minutes, seed
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device, self.quiet = torch.device(device), quiet
        for module in task.modules().values():
            module.to(self.device)
        self.own = not hasattr(task, "train_step")
        self.lr = getattr(task, "lr", 1e-3)
        self.optimizers = build_optimizers(task.modules(), self.lr) if self.own else task.optimizers()
        self.step, self.seconds = 0, 0.0
        if resume and self.checkpoint.exists():
            self._restore()
        elif self.csv_path.exists():
            self.csv_path.unlink()

    @property
    def checkpoint(self):
        return self.folder / f"{self.name}.ckpt"

    @property
    def csv_path(self):
        return self.folder / f"{self.name}.csv"

    @property
    def progress(self):
        """How much of the run is done, 0 to 1, by steps or by time, whichever is further."""
        spent = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, spent))

    def run(self):
        """Train to the last step. Ctrl-C saves a checkpoint first, so that `--resume` goes on from that step."""
        saved = started = time.monotonic()
        before, sums, count = self.seconds, {}, 0
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", disable=self.quiet, mininterval=5)
        try:
            while self.progress < 1:
                logs = self._one_step()
                self.step += 1
                self.seconds = before + time.monotonic() - started
                for key, value in logs.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
                count += 1
                bar.update(1)
                if self.step % LOG_EVERY == 0 or self.progress >= 1:
                    row = {key: value / count for key, value in sums.items()}
                    self._log(row)
                    bar.set_postfix({key: f"{value:.3g}" for key, value in list(row.items())[:5]})
                    sums, count = {}, 0
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        finally:
            bar.close()
            self._save()
        self._plot()
        return {"steps": self.step, "seconds": round(self.seconds, 1), "seed": self.seed}

    def _one_step(self):
        progress = self.progress
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        rng = np.random.default_rng((self.seed, self.step))
        if hasattr(self.task, "event"):
            self.task.event(progress)
        batch = {key: value.to(self.device) if torch.is_tensor(value) else value
                 for key, value in self.task.batch(rng).items()}
        if not self.own:
            return self.task.train_step(batch, self.step, progress)
        factor = cosine(progress, getattr(self.task, "warmup", 0.03), getattr(self.task, "floor", 0.02))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.lr * factor
            optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            loss, logs = self.task.loss(batch, self.step)
        loss.backward()
        parameters = [p for o in self.optimizers.values() for g in o.param_groups for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):  # a batch that overflows is dropped, not learned from
            for optimizer in self.optimizers.values():
                optimizer.step()
        return {"loss": loss.detach(), **logs}

    def _save(self):
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "progress": self.progress,
            "modules": {key: module.state_dict() for key, module in self.task.modules().items()},
            "optimizers": {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
        }
        atomic_save(state, self.checkpoint)

    def _restore(self):
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        for key, module in self.task.modules().items():
            module.load_state_dict(state["modules"][key])
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.csv_path.exists():  # rows after the checkpoint are run again, so they leave the log
            rows = [row for row in read_log(self.csv_path) if int(row["step"]) <= self.step]
            self.csv_path.unlink()
            for row in rows:
                append_row(self.csv_path, row)

    def _log(self, row):
        row = {"step": self.step, "seconds": round(self.seconds, 1), **{k: round(v, 5) for k, v in row.items()}}
        append_row(self.csv_path, row)

    def _plot(self):
        try:
            import matplotlib
        except ImportError:  # the plot is a convenience of the [notebooks] and [train] extras; the CSV has it all
            return
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = read_log(self.csv_path)
        if not rows:
            return
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for key in [k for k in rows[0] if k not in ("step", "seconds")]:
            points = [(int(r["step"]), float(r[key])) for r in rows if r.get(key) not in (None, "")]
            axis.plot(*zip(*points, strict=True), label=key)
        axis.set(xlabel="step", ylabel="value", title=f"{self.name}: training", yscale="log")
        axis.legend(fontsize="small")
        figure.savefig(self.folder / f"{self.name}.png", dpi=100)
        plt.close(figure)


def autocast(device, enabled=True):
    """bf16 where the matrices are multiplied: on a GPU, and on a CPU that has bf16 units (AMX or AVX512-BF16)."""
    device = torch.device(device)
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def atomic_save(state, path):
    """torch.save that never leaves half a file: written beside, then renamed."""
    path = Path(path)
    temporary = path.with_suffix(path.suffix + ".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def append_row(path, row):
    """Append one row to a CSV whose header may grow (a task that logs more once its second phase begins)."""
    rows = read_log(path) if path.exists() else []
    names = list(rows[0]) if rows else []
    fresh = [key for key in row if key not in names]
    if fresh:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names + fresh, restval="")
            writer.writeheader()
            writer.writerows(rows)
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, names + fresh, restval="").writerow(row)


def read_log(path):
    """Rows of a training log as dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class LengthBuckets:
    """Draws batches of items of similar length, so that little is padded, as a pure function of the generator.

    lengths: (N,) frames. budget: frames in a batch. weights: relative chance of each item (default equal).
    """

    def __init__(self, lengths, budget, weights=None):
        self.lengths = np.asarray(lengths)
        self.order = np.argsort(self.lengths, kind="stable")
        self.budget = budget
        chance = np.ones(len(self.lengths)) if weights is None else np.asarray(weights, dtype=float)
        self.chance = chance / chance.sum()
        self.rank = np.empty(len(self.order), dtype=int)
        self.rank[self.order] = np.arange(len(self.order))

    def draw(self, rng):
        """Indices of one batch: an anchor by weight, then weighted picks from its neighbourhood in length."""
        anchor = rng.choice(len(self.lengths), p=self.chance)
        size = max(1, int(self.budget // max(self.lengths[anchor], 1)))
        width = min(max(16 * size, 64), len(self.order))
        low = int(np.clip(self.rank[anchor] - width // 2, 0, len(self.order) - width))
        near = self.order[low:low + width]
        chance = self.chance[near] / self.chance[near].sum()
        count = min(size, np.count_nonzero(chance))
        picks = rng.choice(near, size=count, replace=False, p=chance)
        picks = picks[np.argsort(self.lengths[picks], kind="stable")]
        while len(picks) > 1 and len(picks) * self.lengths[picks[-1]] > self.budget:  # the longest sets the padding
            picks = picks[:-1]
        return picks
