"""One training loop for every part: seeded by step, logged to a CSV and a plot, interruptible.

A task knows its data and its loss; the loop knows time. Because the batch of step `n` is a function
of (seed, n) alone, a run that was interrupted and resumed sees what an unbroken one sees.

A task has
  from_run(run, stage) a class method that makes it for a stage (see run.Run for what it may ask)
  model                the part that is kept in the end
  modules              dict of name -> nn.Module, everything that must be saved
  batch(rng)           dict of tensors, drawn with a numpy Generator
  loss(batch, step)    (scalar loss, dict of numbers to log)
and, only if it needs more than one optimizer (HiFT and its discriminators),
  optimizers           dict of name -> torch optimizer
  train_step(batch, step, progress)   dict of numbers to log
Optional: `event(progress)` is called before each step (the semantic tokenizer turns its quantiser
on there), `finish(seed)` after the last one; it returns what is measured. `lr`, `weight_decay`,
`warmup`, `floor` (share of the rate that is left at the end) and `outer` (factor on the rate of
embeddings and heads) override the defaults below."""

import csv
import math
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

from aqaa import files
from aqaa.fast import prepare_training
from aqaa.files import ModelError, WriteError, brief, probe, reading, replacing, writing
from aqaa.processor import has_bf16, precision

LOG_EVERY = 20  # steps between two rows of the CSV
SAVE_SECONDS = 60.0


def cosine(progress, warmup=0.03, floor=0.02):
    """Factor on the learning rate at `progress` in [0, 1]: warm-up, then a cosine to `floor`."""
    if progress < warmup:
        return progress / warmup
    along = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0)))


def build_optimizers(modules, lr, weight_decay=0.01, outer=1.0):
    """Muon for the matrices inside a network, AdamW for the rest (embeddings, heads, norms, …).
    outer: how many times the rate `lr` embeddings and heads learn with."""
    matrices, others, ends = [], [], []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if any(key in name for key in ("embed", "head", "_out_")):
                (others if outer == 1 else ends).append(parameter)
            else:
                (matrices if parameter.ndim == 2 else others).append(parameter)
    options, groups = {"lr": lr, "weight_decay": weight_decay}, [{"params": others}]
    groups += [{"params": ends, "factor": outer}] if ends else []
    optimizers = {"adamw": torch.optim.AdamW(groups, betas=(0.9, 0.98), **options)}
    if matrices:
        optimizers["muon"] = Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
    return optimizers


class Muon(torch.optim.Muon):
    """torch's Muon with `match_rms_adamw`, but orthogonalised in bf16 only where the processor has
    it, else in fp32. In bf16 its bits are those of torch.optim.Muon."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step from the gradients."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in (p for p in group["params"] if p.grad is not None):
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(average, momentum)
                update = orthogonal(update, precision(weight.device))
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-(rate * (0.2 * math.sqrt(max(weight.shape)))))


def orthogonal(matrix, dtype, rounds=5):
    """(N, K) -> (N, K) in `dtype`: U S' Vᵀ of the matrix U S Vᵀ, with S' between about 0.7 and 1.2.
    The Newton–Schulz iteration x ← a x + b (x xᵀ) x + c (x xᵀ)² x, on the shorter side."""
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
    """Runs `task` for `steps` steps; leaves name.ckpt, name.csv and name.png in `folder`.

    With `minutes` the run, its schedule included, ends after that much training time if the steps
    take longer. A checkpoint is only ever taken between two steps, and holds the log up to there;
    the one before it is kept as name.ckpt.previous. Raises WriteError before the first step if the
    folder cannot hold them, ModelError if there is a checkpoint to resume from but neither it nor
    the one before it can be read, or it is of other modules."""

    def __init__(self, task, folder, name, steps, *, minutes=None, seed=0, device="cpu",
                 resume=False, quiet=False):  # fmt: skip
        self.task, self.name, self.folder = task, name, Path(folder)
        self.steps, self.minutes, self.seed = steps, minutes, seed
        self.device, self.quiet = torch.device(device), quiet
        self.checkpoint = self.folder / f"{name}.ckpt"
        self.previous = self.folder / f"{name}.ckpt.previous"
        self.csv_path = self.folder / f"{name}.csv"
        probe(self.folder)
        files.sweep(self.folder)
        for module in task.modules.values():
            module.to(self.device)
            if self.device.type == "cpu":
                prepare_training(module)  # faster twins, the same gradients
        self.own = not hasattr(task, "train_step")
        self.lr = getattr(task, "lr", 1e-3)
        decay = getattr(task, "weight_decay", 0.01)
        if self.own:
            outer = getattr(task, "outer", 1.0)
            self.optimizers = build_optimizers(task.modules, self.lr, decay, outer)
        else:
            self.optimizers = task.optimizers
        self.step, self.seconds = 0, 0.0
        self.rows = []  # the log
        self.sums, self.count = {}, 0  # the next row of the log will be their mean
        if resume and (kept := self._kept()):
            self._restore(kept)
        else:
            self._clear()
        self._check_room()

    def _kept(self):
        """The checkpoints that are there, the newest first."""
        return [path for path in (self.checkpoint, self.previous) if path.exists()]

    def _clear(self):
        with writing(self.csv_path):
            for path in (self.csv_path, *self._kept()):
                path.unlink(missing_ok=True)

    def agreed(self, value):
        """Whether to do something now: where processes train together, they decide alike."""
        return value

    @property
    def progress(self):
        """Share of the run that is done, 0 to 1, by steps or by time, whichever is further."""
        spent = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, spent))

    def run(self):
        """Train to the last step; returns {"steps", "seconds", "seed"}.

        Ctrl-C lets the step end, saves and raises KeyboardInterrupt, so that `--resume` goes on
        from there; a second Ctrl-C, like any fault in mid-step, ends at once and saves nothing.
        Raises WriteError when the disk fails."""
        if self.step == 0:
            self._save()  # the disk is tried before there is anything to lose
        saved = started = time.monotonic()
        before = self.seconds
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step",
                   disable=self.quiet, mininterval=5)  # fmt: skip
        with bar, stop_asked() as asked:
            while self.progress < 1 and not self.agreed(bool(asked)):
                logs = self._one_step()
                self.step += 1
                self.seconds = before + time.monotonic() - started
                for key, value in logs.items():
                    self.sums[key] = self.sums.get(key, 0.0) + float(value)
                self.count += 1
                bar.update(1)
                if self.step % LOG_EVERY == 0 or self.progress >= 1:
                    row = self._log()
                    bar.set_postfix({key: f"{row[key]:.3g}" for key in list(row)[2:7]})
                if self.agreed(time.monotonic() - saved > SAVE_SECONDS):
                    self._save()
                    saved = time.monotonic()
            self._save()
        if self.agreed(bool(asked)):
            if not self.quiet:
                told = f"{self.name}: stopped after step {self.step} and saved"
                print(f"{told}; --resume goes on there", file=sys.stderr)
            raise KeyboardInterrupt
        self._plot()
        return {"steps": self.step, "seconds": round(self.seconds, 1), "seed": self.seed}

    def _one_step(self):
        progress = self.progress
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        rng = np.random.default_rng((self.seed, self.step))
        if hasattr(self.task, "event"):
            self.task.event(progress)
        batch = self.task.batch(rng)
        batch |= {k: value.to(self.device) for k, value in batch.items() if torch.is_tensor(value)}
        if not self.own:
            return self.task.train_step(batch, self.step, progress)
        warmup, floor = getattr(self.task, "warmup", 0.03), getattr(self.task, "floor", 0.02)
        groups = [group for one in self.optimizers.values() for group in one.param_groups]
        for group in groups:
            group["lr"] = self.lr * group.get("factor", 1.0) * cosine(progress, warmup, floor)
        with autocast(self.device):
            loss, logs = self.task.loss(batch, self.step)
        parameters = [parameter for group in groups for parameter in group["params"]]
        update(loss, parameters, self.optimizers.values(), clip=1.0)
        return {"loss": loss.detach(), **logs}

    def _save(self):
        state = {
            "step": self.step, "seconds": self.seconds, "progress": self.progress,
            "log": {"rows": self.rows, "sums": self.sums, "count": self.count},
            "modules": {key: one.state_dict() for key, one in self.task.modules.items()},
            "optimizers": {key: one.state_dict() for key, one in self.optimizers.items()},
        }  # fmt: skip
        atomic_save(state, self.checkpoint, self.previous)

    def _restore(self, kept):
        """Go on from the first of the `kept` checkpoints that is whole."""
        for path in kept:
            last = path == kept[-1]
            remedy = "train anew without --resume" if last else "the one before it is taken"
            try:
                state = load_checkpoint(path, self.device, remedy)
                break
            except ModelError as fault:
                if last:
                    raise
                print(f"aqaa: {fault}", file=sys.stderr)
        try:
            for key, module in self.task.modules.items():
                module.load_state_dict(state["modules"][key])
            for key, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][key])
            self.step, self.seconds, log = state["step"], state["seconds"], state["log"]
            self.rows, self.sums, self.count = log["rows"], log["sums"], log["count"]
        except (RuntimeError, ValueError, LookupError, TypeError) as fault:
            why = (str(fault).splitlines()[1:2] or [brief(fault)])[0].strip(" \t.")
            told = f"{path} is no checkpoint of this task ({why})"
            raise ModelError(f"{told}: name another folder.") from None
        if path == self.previous:  # the next save may not remove the only good one
            files.restore(self.checkpoint, path)
        self._write_log()  # rows after the checkpoint are run again

    def _check_room(self):
        """Two checkpoints and the finished part must fit. Raises WriteError."""
        modules = self.task.modules.values()
        module = sum(t.nbytes for one in modules for t in one.state_dict().values())
        moments = sum(
            p.nbytes * (1 if isinstance(optimizer, torch.optim.Muon) else 2)
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for p in group["params"]
        )
        need = 2 * (module + moments) + module // 2
        probe(self.folder, need - sum(path.stat().st_size for path in self._kept()))

    def _log(self):
        """End a row of the log: the means since the last one. Returns it."""
        means = {key: round(value / self.count, 5) for key, value in self.sums.items()}
        row = {"step": self.step, "seconds": round(self.seconds, 1), **means}
        self.rows.append(row)
        self.sums, self.count = {}, 0
        self._write_log()
        return row

    def _write_log(self):
        write_rows(self.csv_path, self.rows)

    def _plot(self):
        rows = read_log(self.csv_path)

        def curves(figure):
            axis = figure.subplots()
            for key in [k for k in rows[0] if k not in ("step", "seconds")]:
                points = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
                axis.plot(*zip(*points, strict=True), label=key)
            axis.set(xlabel="step", ylabel="value", title=f"{self.name}: training", yscale="log")
            axis.legend(fontsize="small")

        if rows:
            save_figure(self.folder / f"{self.name}.png", (7, 4), curves)


def save_figure(path, size, fill):
    """Write a PNG that fill(figure) draws; size: its width and height in inches. Nothing is written
    without matplotlib, of the extras [notebooks] and [train]: a file of numbers holds the same."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=size, layout="constrained")
    fill(figure)
    with replacing(path) as part:
        figure.savefig(part, dpi=100, format="png")


@contextmanager
def stop_asked():
    """Within it the first Ctrl-C (or SIGTERM) only fills the list that is handed out; the next one
    interrupts."""
    asked = []
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
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


def autocast(device):
    """bf16 where matrices are multiplied: on a GPU, and on a CPU with bf16 units (AMX, AVX512)."""
    device = torch.device(device)
    if device.type == "cpu" and not has_bf16():
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def update(loss, parameters, optimizers, clip):
    """One step down the gradient of `loss`, whose norm is cut to `clip`."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if torch.isfinite(norm):  # a batch that overflows is dropped, not learned from
        for optimizer in optimizers:
            optimizer.step()


def atomic_save(state, path, keep=None):
    """torch.save, whole or not at all; what was there is kept as `keep`. Raises WriteError."""
    with replacing(path, keep=keep) as part:
        try:
            torch.save(state, part)
        except RuntimeError as fault:
            raise WriteError(path, brief(fault)) from None


def load_checkpoint(path, device, remedy):
    """What `atomic_save` wrote. Raises ModelError, which ends in the remedy, if it is damaged."""
    with reading(path, remedy):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)


def write_rows(path, rows):
    """Write a CSV, whole or not at all; its header has every name in the order of appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_log(path):
    """Rows of a training log as dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
