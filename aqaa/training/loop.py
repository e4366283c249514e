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
import signal
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aqaa.fast import prepare_training
from aqaa.files import ModelError, WriteError, brief, probe, reading, replacing, sweep, writing
from aqaa.processor import has_bf16, precision

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
        found["muon"] = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return found


class Muon(torch.optim.Muon):
    """torch's Muon with `match_rms_adamw`, but orthogonalised in bf16 only where the processor has it: else in fp32."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step from the gradients. In bf16 its bits are those of torch.optim.Muon."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in (p for p in group["params"] if p.grad is not None):
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = orthogonal(weight.grad.lerp(average, momentum), precision(weight.device))
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-(rate * (0.2 * math.sqrt(max(weight.shape)))))


def orthogonal(matrix, dtype, rounds=5):
    """(N, K) -> (N, K) in `dtype`: U S' Vᵀ of the matrix U S Vᵀ, with S' between about 0.7 and 1.2 (Newton–Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # of Keller Jordan's Muon: steepest at zero
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=1e-7))  # no singular value above 1
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Trainer:
    """Runs `task` for `steps` steps in `folder`/`name`.* and leaves name.ckpt, name.csv and name.png there.

    With `minutes` the run, its schedule included, ends after that much training time if the steps take longer.
    A checkpoint is only ever taken between two steps, and holds the log up to there; the one before it is kept as
    name.ckpt.previous. Raises WriteError before the first step if the folder cannot hold them, ModelError if there is a
    checkpoint to resume from but neither it nor the one before it can be read, or it is of other modules.
    """

    def __init__(self, task, folder, name, steps, *, minutes=None, seed=0, device="cpu", resume=False, quiet=False):
        self.task, self.name, self.steps, self.minutes, self.seed = task, name, steps, minutes, seed
        self.folder = Path(folder)
        probe(self.folder)
        sweep(self.folder)
        self.device, self.quiet = torch.device(device), quiet
        for module in task.modules().values():
            prepare_training(module.to(self.device))
        self.own = not hasattr(task, "train_step")
        self.lr = getattr(task, "lr", 1e-3)
        self.optimizers = build_optimizers(task.modules(), self.lr) if self.own else task.optimizers()
        self.step, self.seconds = 0, 0.0
        self.rows, self.sums, self.count = [], {}, 0  # the log, and what its next row will be the mean of
        kept = [path for path in (self.checkpoint, self.previous) if path.exists()]
        if resume and kept:
            self._restore(kept)
        else:
            with writing(self.csv_path):
                for path in (self.csv_path, *kept):
                    path.unlink(missing_ok=True)
        self._check_room()

    @property
    def checkpoint(self):
        return self.folder / f"{self.name}.ckpt"

    @property
    def previous(self):
        return self.folder / f"{self.name}.ckpt.previous"

    @property
    def csv_path(self):
        return self.folder / f"{self.name}.csv"

    @property
    def progress(self):
        """How much of the run is done, 0 to 1, by steps or by time, whichever is further."""
        spent = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, spent))

    def run(self):
        """Train to the last step; returns {"steps", "seconds", "seed"}.

        Ctrl-C lets the step end, saves and raises KeyboardInterrupt, so that `--resume` goes on from there; a second
        Ctrl-C, like any other fault in mid-step, ends at once and saves nothing. Raises WriteError when the disk fails.
        """
        if self.step == 0:
            self._save()  # the disk is tried before there is anything to lose
        saved = started = time.monotonic()
        before = self.seconds
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", disable=self.quiet, mininterval=5)
        with bar, stop_asked() as asked:
            while self.progress < 1 and not asked:
                logs = self._one_step()
                self.step += 1
                self.seconds = before + time.monotonic() - started
                for key, value in logs.items():
                    self.sums[key] = self.sums.get(key, 0.0) + float(value)
                self.count += 1
                bar.update(1)
                if self.step % LOG_EVERY == 0 or self.progress >= 1:
                    row = {key: value / self.count for key, value in self.sums.items()}
                    self._log(row)
                    bar.set_postfix({key: f"{value:.3g}" for key, value in list(row.items())[:5]})
                    self.sums, self.count = {}, 0
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
            self._save()
        if asked:
            if not self.quiet:
                print(f"{self.name}: stopped after step {self.step} and saved; --resume goes on there", file=sys.stderr)
            raise KeyboardInterrupt
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
            "log": {"rows": self.rows, "sums": self.sums, "count": self.count},
            "modules": {key: module.state_dict() for key, module in self.task.modules().items()},
            "optimizers": {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
        }
        atomic_save(state, self.checkpoint, self.previous)

    def _restore(self, kept):
        for path in kept:
            try:
                remedy = "train anew without --resume" if path == kept[-1] else "the one before it is taken"
                state = load_checkpoint(path, self.device, remedy)
                break
            except ModelError as fault:
                if path == kept[-1]:
                    raise
                print(f"aqaa: {fault}", file=sys.stderr)
        try:
            for key, module in self.task.modules().items():
                module.load_state_dict(state["modules"][key])
            for key, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][key])
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, ValueError, LookupError, TypeError) as fault:
            why = (str(fault).splitlines()[1:2] or [brief(fault)])[0].strip(" \t.")
            raise ModelError(f"{path} is no checkpoint of this task ({why}): name another folder.") from None
        log = state.get("log") or {"rows": self._earlier_rows(), "sums": {}, "count": 0}
        self.rows, self.sums, self.count = log["rows"], log["sums"], log["count"]
        with writing(path):
            if path == self.previous:  # the next save may not remove the only good one
                os.replace(path, self.checkpoint)
            write_rows(self.csv_path, self.rows)  # rows after the checkpoint are run again

    def _earlier_rows(self):
        """Rows up to this step from the CSV, for a checkpoint that was written before they were kept in it."""
        rows = read_log(self.csv_path) if self.csv_path.exists() else []
        return [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) <= self.step]

    def _check_room(self):
        """Two checkpoints and the finished part must fit. Raises WriteError."""
        held = sum(path.stat().st_size for path in (self.checkpoint, self.previous) if path.exists())
        module = sum(t.nbytes for m in self.task.modules().values() for t in m.state_dict().values())
        moments = sum(
            p.nbytes * (1 if isinstance(optimizer, torch.optim.Muon) else 2)
            for optimizer in self.optimizers.values() for group in optimizer.param_groups for p in group["params"]
        )  # fmt: skip
        probe(self.folder, 2 * (module + moments) + module // 2 - held)

    def _log(self, row):
        row = {"step": self.step, "seconds": round(self.seconds, 1), **{k: round(v, 5) for k, v in row.items()}}
        self.rows.append(row)
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
        with replacing(self.folder / f"{self.name}.png") as part:
            figure.savefig(part, dpi=100, format="png")
        plt.close(figure)


@contextmanager
def stop_asked():
    """Within it the first Ctrl-C (or SIGTERM) only fills the list that is handed out; the next one interrupts."""
    asked = []
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield asked
        return

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def autocast(device, enabled=True):
    """bf16 where the matrices are multiplied: on a GPU, and on a CPU that has bf16 units (AMX or AVX512-BF16)."""
    device = torch.device(device)
    if device.type == "cpu" and not has_bf16():
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def atomic_save(state, path, previous=None):
    """torch.save that never leaves half a file; what was at `path` is kept as `previous`. Raises WriteError."""
    path = Path(path)
    if previous and path.exists():  # its room is needed: there are never more than two
        with writing(previous):
            previous.unlink(missing_ok=True)
    with replacing(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as fault:
            raise WriteError(path, brief(fault)) from None
        if previous and path.exists():
            os.replace(path, previous)


def load_checkpoint(path, device, remedy):
    """What `atomic_save` wrote. Raises ModelError, which ends in the remedy, if it is not whole."""
    with reading(path, remedy):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)


def append_row(path, row):
    """Append one row to a CSV whose header may grow (a task that logs more once its second phase begins)."""
    with writing(path):
        rows = read_log(path) if path.exists() else []
        names = list(rows[0]) if rows else []
        if any(key not in names for key in row):
            write_rows(path, [*rows, row])
            return
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, names, restval="").writerow(row)


def write_rows(path, rows):
    """Write a CSV anew, whole or not at all; its header has every name in the order of appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


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
