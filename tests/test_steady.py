"""Finished tokenizers that learn on: their codebook stays, bent copies take the codes of the clean, natural voices the
phones that were said."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aqaa.corpus.plan import Item
from aqaa.corpus.voices import ANSWER_VOICE
from aqaa.tokenizers.phones import PhoneHeads
from aqaa.training import steady
from aqaa.training.loop import Trainer
from aqaa.training.speech_tokenizers import LinguisticTask
from tests.conftest import tiny_config
from tests.test_training_tokenizers import distortion, quantising_task, speech

CONFIG = tiny_config()


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)


def taught(name, natural=slice(0, 0)):
    """A task of a tokenizer that has centroids; `natural`: which of its utterances have no teacher."""
    torch.manual_seed(0)
    if name == "linguistic":
        data, kind, config = speech(CONFIG.linguistic.input_size), steady.SteadyLinguistic, CONFIG.linguistic
        old = LinguisticTask(config, data, budget=60)
        old.finish(0)
        old = old.model
    else:
        data, kind, config = speech(4 * CONFIG.semantic.n_mels), steady.SteadySemantic, CONFIG.semantic
        old = quantising_task(training=False).model
    task = kind(config, data, {"some": np.arange(8)}, budget=60)
    flags = np.zeros(len(data.lengths), dtype=bool)
    flags[natural] = True
    task.prepare(old, PhoneHeads(CONFIG), flags)
    return task


NAMES = pytest.mark.parametrize("name", ["linguistic", "semantic"])


def book(task):
    """Its codebook."""
    model = task.model
    return model.centroids if task.name == "linguistic" else model.quantizer._codebook.embed


def drawn(task, seed=0):
    return task.batch(np.random.default_rng(seed))


@NAMES
def test_it_begins_as_the_tokenizer_that_it_was(name):
    task = taught(name)
    assert task.finish(0)["kept"] == {"some": 100.0} and task.spread > 0
    assert not any(parameter.requires_grad for parameter in task.old.parameters())
    assert not task.old.training


@NAMES
def test_training_brings_bent_copies_to_the_codes_of_the_clean_and_leaves_the_codebook(name, tmp_path):
    task = taught(name)
    before, codebook = task.old.state_dict(), book(task).clone()
    batch = drawn(task)
    with torch.no_grad():
        first = task.loss(batch, 0)[1]
    Trainer(task, tmp_path, "toy", 40, quiet=True).run()
    with torch.no_grad():
        last = task.loss(batch, 0)[1]
    assert last["codes"] < 0.95 * first["codes"]
    assert torch.equal(book(task), codebook)
    assert all(torch.equal(value, before[key]) for key, value in task.old.state_dict().items())


@NAMES
def test_where_the_teacher_hears_badly_it_is_not_asked(name):
    task = taught(name, natural=slice(None))
    loss, logs = task.loss(drawn(task), 0)
    assert logs["codes"] == 0 and "kept" not in logs and logs["near"] > 0
    assert loss.item() == pytest.approx((logs["ctc"] + steady.NEAR * logs["near"]).item(), rel=1e-5)
    loss.backward()
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


@NAMES
def test_the_head_reads_codes_alone_and_gradients_pass_through_them(name):
    task = taught(name)
    x, lengths = task.data.gather([0, 5])
    x, mask = task.normalised(x), steady.present(x, lengths)
    hidden = task.rows(task.model, x, lengths).detach().requires_grad_()
    rows = task.through(hidden, mask)
    wanted = book(task)[task.old.quantize(hidden)]
    scale = 1.0 if name == "linguistic" else hidden.shape[-1] ** 0.5
    assert torch.allclose(rows[mask], wanted[mask] * scale, atol=1e-4) and not rows[~mask].any()
    rows.square().sum().backward()
    assert hidden.grad[mask].any() and not hidden.grad[~mask].any()


@NAMES
def test_distances_are_those_to_the_codebook(name):
    task = taught(name)
    x, lengths = task.data.gather([3])
    with torch.no_grad():
        hidden = task.rows(task.model, task.normalised(x), lengths)
        distance = task.distance(hidden)[0]
    rows = hidden[0] if name == "linguistic" else torch.nn.functional.normalize(hidden[0], dim=-1)
    assert distance.min(-1).values.mean() == pytest.approx(distortion(rows, book(task)).item(), rel=1e-3)
    assert torch.equal(distance.argmin(-1), task.old.quantize(hidden)[0])


@NAMES
def test_a_resumed_run_gives_the_same_bits(name, tmp_path):
    def train(folder, steps):
        task = taught(name)
        Trainer(task, folder, "toy", steps, quiet=True, resume=True).run()
        return task.model.state_dict()

    whole = train(tmp_path / "whole", 6)
    trainer = Trainer(taught(name), tmp_path / "cut", "toy", 6, quiet=True)
    while trainer.step < 3:
        trainer._one_step()
        trainer.step += 1
    trainer._save()
    cut = train(tmp_path / "cut", 6)
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())


def test_only_the_voices_of_the_training_have_a_teacher_and_many_speakers_weigh_more(tmp_path):
    """People and natural voices are heard by their phones; so is whatever joins later. What the answer voice says
    keeps its codes, though as a questioner the same voice has no teacher."""
    voices = ["espeak:en-us", "flite:slt", "hibari:heart", "kokoro:mix", "people:bar", "espeak:en-us+m7", ANSWER_VOICE]
    task = taught("linguistic")
    count = len(task.data.lengths)
    items = [Item(f"x{i}", "train", "", "answer" if i % len(voices) == 6 else "question", "", voices[i % len(voices)])
             for i in range(count)]  # fmt: skip
    task.data.weights = np.ones(count)
    run = SimpleNamespace(
        config=CONFIG, items=lambda: (None, items), utterances=lambda kind: (task.data, {}), part=lambda name: task.old,
        part_file=lambda name: tmp_path / "none",
    )  # fmt: skip
    made = steady.SteadyLinguistic.from_run(run, SimpleNamespace(part="linguistic", parent="linguistic"))
    assert made.natural.tolist()[: len(voices)] == [False, False, True, True, True, True, False]
    weights = made.data.weights[: len(voices)]
    assert weights[0] == weights[1] == weights[6] == 1 < weights[2] < weights[4] <= weights[3]
