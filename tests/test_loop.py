"""The training loop: a batch belongs to its step, an interruption leaves no trace, a bad batch does no harm."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aqaa.files import ModelError, WriteError
from aqaa.training import loop
from aqaa.training.features import LengthBuckets
from aqaa.training.loop import Trainer, atomic_save, build_optimizers, cosine, read_log, write_rows

ROOT = Path(__file__).resolve().parent.parent
STEPS = 45  # rows of the log at 20, 40 and 45


class Task:
    """A small regression with dropout; Ctrl-C comes in step `stop`, `halt` breaks one off, `poison` spoils one."""

    lr = 1e-2

    def __init__(self, stop=None, halt=None, poison=None):
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.LayerNorm(1))
        self.modules = {"net": self.net}
        self.stop, self.halt, self.poison, self.seen, self.at = stop, halt, poison, [], None

    def event(self, progress):
        self.at = round(progress * STEPS)
        if self.at == self.stop:
            signal.raise_signal(signal.SIGINT)
        if self.at == self.halt:
            raise KeyboardInterrupt

    def batch(self, rng):
        x = torch.from_numpy(rng.standard_normal((6, 4)).astype(np.float32))
        self.seen.append(x)
        return {"x": x * (float("nan") if self.at == self.poison else 1), "name": "not a tensor"}

    def loss(self, batch, step):
        x = batch["x"]
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean(), {"double": torch.tensor(2.0 * step)}


class PairTask(Task):
    """The same with an optimizer of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.own = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        self.optimizers = {"own": self.own}

    def train_step(self, batch, step, progress):
        loss, logs = self.loss(batch, step)
        self.own.zero_grad()
        loss.backward()
        self.own.step()
        return {"loss": loss.item(), "progress": progress}


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    if "plot" not in request.node.name:
        monkeypatch.setattr(Trainer, "_plot", lambda self: None)


def trainer(task, folder, steps=STEPS, **options):
    return Trainer(task, folder, "toy", steps, quiet=True, **options)


def train(task, folder, **options):
    runner = trainer(task, folder, **options)
    runner.run()
    return runner


def interrupted(task, folder, **options):
    with pytest.raises(KeyboardInterrupt):
        train(task, folder, **options)
    return task


def weights(task):
    return {key: value.clone() for key, value in task.net.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of both kinds of task: {class: (task, folder)}."""
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_plot", lambda self: None)
        for kind in (Task, PairTask):
            done[kind] = kind(), tmp_path_factory.mktemp("whole")
            train(*done[kind])
    return done


@pytest.mark.parametrize("kind", [Task, PairTask])
@pytest.mark.parametrize("stops", [(1,), (20,), (7, 33), (44,)])
def test_an_interrupted_run_ends_with_the_same_bits(whole, tmp_path, kind, stops):
    seen = []
    for stop in stops:
        seen += interrupted(kind(stop=stop), tmp_path, resume=True).seen
    task = kind()
    train(task, tmp_path, resume=True)
    reference, folder = whole[kind]
    assert equal(weights(task), weights(reference))
    assert all(torch.equal(a, b) for a, b in zip(seen + task.seen, reference.seen, strict=True))
    rows = read_log(tmp_path / "toy.csv")
    assert [row["step"] for row in rows] == [row["step"] for row in read_log(folder / "toy.csv")] == ["20", "40", "45"]


def test_rows_after_the_checkpoint_are_not_doubled(tmp_path):
    """A crash loses what came after the last checkpoint, but its rows are in the log already."""
    interrupted(Task(stop=20), tmp_path)
    early = (tmp_path / "toy.ckpt").read_bytes()
    interrupted(Task(stop=42), tmp_path, resume=True)
    before = read_log(tmp_path / "toy.csv")
    (tmp_path / "toy.ckpt").write_bytes(early)
    train(Task(), tmp_path, resume=True)
    rows = read_log(tmp_path / "toy.csv")
    assert [row["step"] for row in rows] == ["20", "40", "45"]
    assert [row["loss"] for row in rows[:2]] == [row["loss"] for row in before]


def test_a_finished_run_is_not_continued(tmp_path):
    first = train(Task(), tmp_path)
    log = (tmp_path / "toy.csv").read_bytes()
    again = train(Task(), tmp_path, resume=True)
    assert again.task.seen == [] and again.step == STEPS
    assert equal(weights(again.task), weights(first.task)) and (tmp_path / "toy.csv").read_bytes() == log


def test_without_resume_a_run_begins_anew(tmp_path):
    logs = []
    for seed in (3, 4):
        assert len(train(Task(), tmp_path, seed=seed).task.seen) == STEPS
        logs.append(read_log(tmp_path / "toy.csv"))
    assert len(logs[1]) == 3 and logs[0] != logs[1]


def test_resuming_what_never_began_is_a_new_run(tmp_path):
    (tmp_path / "toy.csv").write_text("step,seconds,loss\n20,1,1\n", encoding="utf-8")
    train(Task(), tmp_path, resume=True)
    assert [row["step"] for row in read_log(tmp_path / "toy.csv")] == ["20", "40", "45"]


def test_batches_follow_seed_and_step(whole, tmp_path):
    reference = whole[Task][0]
    for seed, same in ((0, True), (1, False)):
        assert torch.equal(train(Task(), tmp_path, seed=seed).task.seen[9], reference.seen[9]) == same
    assert not torch.equal(reference.seen[0], reference.seen[1])


def test_half_a_checkpoint_never_replaces_a_whole_one(tmp_path, monkeypatch):
    atomic_save({"a": torch.ones(2)}, tmp_path / "x.ckpt")

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_save({}, tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt")["a"].tolist() == [1, 1]


# ---- ended anywhere, resumed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, end, before", [("SIGKILL", -9, -9), ("SIGINT", 130, 130), ("SIGTERM", 130, -15)])
def test_wherever_a_run_ends_it_goes_on_to_the_same_bits_and_the_same_log(tmp_path, name, end, before):
    """before: its exit when the signal comes before the first step."""
    command = [sys.executable, "-m", "tests.broken_training", str(tmp_path), name, "4" if end < 0 else "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["points"] >= 10 and set(found["ends"]) <= {0, end, before} and end in found["ends"], done.stderr
    assert found["differ"] == {}


def test_a_second_interrupt_ends_at_once_and_saves_nothing(tmp_path):
    class Impatient(Task):
        def loss(self, batch, step):
            if step == 10:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().loss(batch, step)

    before = signal.getsignal(signal.SIGINT)
    interrupted(Impatient(), tmp_path)
    assert loop.load_checkpoint(tmp_path / "toy.ckpt", "cpu", "")["step"] == 0
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("place", ["batch", "loss", "backward", "between the optimizers", "after them", "the log"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_breaks_off_is_not_saved(whole, tmp_path, monkeypatch, place, fault):
    def broken(function, late=False):
        def call(*args, **options):
            result = function(*args, **options) if late else None
            if runner.step == 19:
                raise fault
            return result if late else function(*args, **options)

        return call

    task = Task()
    runner = trainer(task, tmp_path)
    last = runner.optimizers["muon"]
    owner, name, late = {
        "batch": (task, "batch", True), "loss": (task, "loss", True),
        "backward": (torch.nn.utils, "clip_grad_norm_", True), "between the optimizers": (last, "step", False),
        "after them": (last, "step", True), "the log": (loop, "write_rows", False),
    }[place]  # fmt: skip
    with monkeypatch.context() as patch:
        call = (lambda *_: (_ for _ in ()).throw(fault)) if owner is loop else broken(getattr(owner, name), late)
        patch.setattr(owner, name, call)
        with pytest.raises(fault):
            runner.run()
    assert equal(weights(train(Task(), tmp_path, resume=True).task), weights(whole[Task][0]))


# ---- bad disks ------------------------------------------------------------------------------------------------------

DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:900]),
    "no tail": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": lambda path: path.write_bytes(flipped(path)),
    "gone": lambda path: path.unlink(),
}


def flipped(path):
    """The file, but one bit of a weight is another one."""
    data = path.read_bytes()
    weight = torch.load(path)["modules"]["net"]["0.weight"].numpy().tobytes()
    place = data.index(weight) + 2
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_torn_checkpoint_gives_way_to_the_one_before(whole, tmp_path, capsys, monkeypatch, damage):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    interrupted(Task(stop=30), tmp_path)
    damage(tmp_path / "toy.ckpt")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 1e9)
    runner = trainer(Task(), tmp_path, resume=True)
    said = capsys.readouterr().err
    assert runner.step == 31 and ("the one before it is taken" in said) == (damage is not DAMAGES["gone"])
    runner.run()
    assert equal(weights(runner.task), weights(whole[Task][0]))
    assert logged(tmp_path) == logged(whole[Task][1])


@pytest.mark.parametrize("damage", [DAMAGES[name] for name in ("empty", "cut", "zeros")])
def test_no_checkpoint_left_is_one_sentence(tmp_path, damage):
    train(Task(), tmp_path)
    for path in tmp_path.glob("toy.ckpt*"):
        damage(path)
    with pytest.raises(ModelError, match="toy.ckpt.previous is cut short or damaged .* anew without --resume.$"):
        trainer(Task(), tmp_path, resume=True)


@pytest.mark.parametrize("other", [nn.Linear(4, 9), nn.Sequential(nn.Linear(4, 8)), nn.Conv1d(4, 8, 1)])
def test_a_checkpoint_of_another_task_is_one_sentence(tmp_path, other):
    train(Task(), tmp_path)
    task = Task()
    task.modules = {"net": other}
    with pytest.raises(ModelError, match="toy.ckpt is no checkpoint of this task .*: name another folder.$"):
        trainer(task, tmp_path, resume=True)


def logged(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_log(folder / "toy.csv")]


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:-1], lambda data: data[:-7], lambda data: data + b"4", lambda data: data[:30],
    lambda data: data + bytes(40), lambda data: b"\xff" * 99, lambda data: None,
])  # fmt: skip
def test_a_torn_log_is_whole_again(whole, tmp_path, damage):
    interrupted(Task(stop=41), tmp_path)
    path = tmp_path / "toy.csv"
    data = damage(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    train(Task(), tmp_path, resume=True)
    assert logged(tmp_path) == logged(whole[Task][1])


@pytest.mark.parametrize("file", ["toy.csv", "toy.ckpt", "toy.ckpt.previous"])
def test_a_disk_that_fails_is_one_sentence(tmp_path, monkeypatch, file):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    runner = trainer(Task(), tmp_path)
    runner.task.event = lambda progress: runner.step == 19 and fail()

    def fail():
        (tmp_path / file).unlink(missing_ok=True)
        (tmp_path / file / "in the way").mkdir(parents=True)

    with pytest.raises(WriteError, match=f"{file}.* cannot be written .*: free some room there, or choose another"):
        runner.run()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("free, fits", [(0, False), (500, False), (10**6, True)])
def test_room_is_asked_for_before_the_first_step(tmp_path, monkeypatch, free, fits):
    usage = loop.probe.__globals__["shutil"].disk_usage(tmp_path)
    monkeypatch.setattr("aqaa.files.shutil.disk_usage", lambda folder: usage._replace(free=free))
    if fits:
        trainer(Task(), tmp_path)
    else:
        with pytest.raises(WriteError, match="0 MB are free, 1 MB are needed"):
            trainer(Task(), tmp_path)
        assert list(tmp_path.iterdir()) == []


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 30])
def test_a_batch_that_overflows_is_dropped(tmp_path, step):
    task = interrupted(Task(halt=step + 1, poison=step), tmp_path)
    calm = interrupted(Task(halt=step), tmp_path / "calm")
    assert equal(weights(task), weights(calm))  # the bad step changed nothing
    task.halt = None
    train(task, tmp_path, resume=True)
    assert not equal(weights(task), weights(calm))
    assert all(value.isfinite().all() for value in weights(task).values())


def test_every_step_has_its_rate_and_its_event(tmp_path):
    rates = []

    class Watch(Task):
        warmup, floor = 0.2, 0.5

        def loss(self, batch, step):
            assert self.at == step
            rates.extend(g["lr"] for o in self.trainer.optimizers.values() for g in o.param_groups)
            return super().loss(batch, step)

    task = Watch()
    task.trainer = trainer(task, tmp_path)
    task.trainer.run()
    assert np.allclose(rates[::2], [1e-2 * cosine(i / STEPS, 0.2, 0.5) for i in range(STEPS)])
    assert rates[::2] == rates[1::2]  # both optimizers


def test_a_run_of_minutes_ends_in_time_and_goes_on_counting(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    runner = trainer(Task(), tmp_path, 10**6, minutes=0.5)
    result = runner.run()
    assert runner.progress == 1 and 5 < result["steps"] < 40 and 30 <= result["seconds"] < 35
    assert int(read_log(tmp_path / "toy.csv")[-1]["step"]) == result["steps"]
    again = trainer(Task(), tmp_path, 10**6, minutes=1.0, resume=True)
    assert 0.5 <= again.progress < 0.6
    assert again.run()["seconds"] == pytest.approx(60, abs=4)


def test_checkpoints_are_written_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    saved = []
    monkeypatch.setattr(Trainer, "_save", lambda self: saved.append(self.step))
    train(Task(), tmp_path)
    assert saved == [0, *range(1, STEPS + 1), STEPS]


@given(st.floats(0, 1), st.floats(0.001, 0.5), st.floats(0, 0.9))
def test_rate_rises_then_falls_to_its_floor(progress, warmup, floor):
    factor = cosine(progress, warmup, floor)
    assert -1e-9 <= factor <= 1 + 1e-9
    assert progress < warmup or factor >= floor - 1e-9
    assert cosine(1.0, warmup, floor) == pytest.approx(floor) and cosine(warmup, warmup, floor) == pytest.approx(1)
    if warmup <= progress <= 0.99:
        assert cosine(progress + 0.01, warmup, floor) <= factor


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5)])
def test_in_bf16_muon_is_that_of_torch(shape, monkeypatch):
    monkeypatch.setattr(loop, "precision", lambda device: torch.bfloat16)
    made = [nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2)]
    options = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    steppers = [loop.Muon(made[:1], **options), torch.optim.Muon(made[1:], **options)]
    for step in range(3):
        for weight, stepper in zip(made, steppers):
            weight.grad = torch.sin(torch.arange(weight.numel()) * (step + 1.5)).view(shape)
            stepper.step()
    assert torch.equal(*made)
    assert torch.equal(*(one.state_dict()["state"][0]["momentum_buffer"] for one in steppers))


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_a_matrix_becomes_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = loop.orthogonal(matrix, torch.float32)
    assert found.dtype == torch.float32 and (torch.linalg.svdvals(found) - 1).abs().max() < 0.45
    half = loop.orthogonal(matrix, torch.bfloat16).float()
    assert (found - half).norm() / found.norm() < 0.05


def test_each_parameter_has_one_optimizer():
    net = nn.ModuleDict({
        "embed": nn.Embedding(5, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 3), "conv": nn.Conv1d(4, 4, 3),
    })  # fmt: skip
    optimizers = build_optimizers({"net": net}, 1e-3)
    found = {key: [id(p) for g in o.param_groups for p in g["params"]] for key, o in optimizers.items()}
    assert found["muon"] == [id(net["inner"].weight)]
    assert sorted(found["adamw"] + found["muon"]) == sorted(map(id, net.parameters()))
    assert set(build_optimizers({"net": net["conv"]}, 1e-3)) == {"adamw"}


# ---- the log --------------------------------------------------------------------------------------------------------


def test_the_header_grows_with_the_rows(tmp_path):
    path = tmp_path / "log.csv"
    write_rows(path, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "perplexity": 7.0}, {"step": 3, "loss": 1.0}])
    assert [row["perplexity"] for row in read_log(path)] == ["", "7.0", ""]
    assert [row["loss"] for row in read_log(path)] == ["3.0", "2.0", "1.0"]


def test_rows_are_means_since_the_last_row(whole):
    rows = read_log(whole[Task][1] / "toy.csv")
    steps = [range(0, 20), range(20, 40), range(40, 45)]
    assert [float(row["double"]) for row in rows] == [2 * np.mean(part) for part in steps]
    assert all(0 < float(row["loss"]) < 100 for row in rows)


def test_a_plot_is_left_of_a_log_with_gaps(tmp_path):
    runner = trainer(Task(), tmp_path)
    rows = [{"step": 20, "seconds": 1, "loss": 3.0}, {"step": 40, "seconds": 2, "loss": 2.0, "late": 1.0}]
    write_rows(runner.csv_path, rows)
    runner._plot()
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


# ---- batches by length ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([0.0, 1.0, 4.0])), min_size=1, max_size=300).filter(
        lambda rows: any(weight for _, weight in rows)
    ),
    st.integers(1, 2000),
    st.integers(0, 2**31),
)
def test_a_batch_holds_distinct_rows_that_may_be_drawn(rows, budget, seed):
    lengths, chances = map(np.array, zip(*rows, strict=True))
    buckets = LengthBuckets(lengths, budget, chances)
    drawn = buckets.draw(np.random.default_rng(seed))
    assert len(drawn) >= 1 and len(set(drawn.tolist())) == len(drawn)
    assert (chances[drawn] > 0).all()
    assert len(drawn) <= max(1, budget // lengths.min())
    assert np.array_equal(drawn, buckets.draw(np.random.default_rng(seed)))


@given(st.integers(1, 50), st.integers(1, 3000), st.integers(65, 200))
@settings(max_examples=30, deadline=None)
def test_equal_lengths_fill_the_budget(length, budget, count):
    drawn = LengthBuckets([length] * count, budget).draw(np.random.default_rng(0))
    assert len(drawn) == min(count, max(1, budget // length))


def test_a_corpus_is_drawn_within_budget_and_with_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.gamma(6, 8, 40_000).astype(int).clip(12, 150)  # about as many and as long as the mini's
    buckets, sizes, padded, used = LengthBuckets(lengths, 1200), [], 0, 0
    for _ in range(300):
        drawn = buckets.draw(rng)
        sizes.append(len(drawn) * lengths[drawn].max())
        padded, used = padded + sizes[-1], used + lengths[drawn].sum()
    assert max(sizes) < 2 * 1200 and 0.9 * 1200 < np.mean(sizes) < 1.05 * 1200
    assert used / padded > 0.9


def test_heavier_rows_come_more_often():
    rng, counts = np.random.default_rng(0), np.zeros(200)
    weights = np.where(np.arange(200) % 2, 4.0, 1.0)
    buckets = LengthBuckets(np.full(200, 10), 50, weights)
    for _ in range(600):
        counts[buckets.draw(rng)] += 1
    assert 3 < counts[1::2].sum() / counts[::2].sum() < 4.5
