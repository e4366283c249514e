"""Second questions: what was learnt about them counts behind a turn, and nowhere else; how they are worded."""

import numpy as np
import pytest
import torch

from aqaa.backbone import generation
from aqaa.backbone.lora import Turns
from aqaa.batching import answer_prompts
from aqaa.corpus import wider
from aqaa.tokenizers import dialogue
from aqaa.training.turns import TurnsTask
from aqaa.weights import model_folder
from tests.conftest import RATE, tone
from tests.test_language import library

BEFORE = [("user", "a song"), ("assistant", "the rain falls")]
QUICK = {"temperature": 0, "max_tokens": 40}


@pytest.fixture
def talker(tiny, monkeypatch):
    """The tiny AQAA that has learnt something, whatever it is, about second questions."""
    turns = Turns(tiny.config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for up in turns.up.values():
            up.normal_(0, 0.5)
    monkeypatch.setitem(tiny.__dict__, "turns", turns)
    yield tiny
    tiny.__dict__.pop("remembering", None)


def steps(model, history=(), **options):
    return [step.id for step in model.generate(model.prompt("a question", history), **QUICK, **options)]


def test_a_first_question_is_answered_as_it_was(tiny, talker, monkeypatch):
    first, second = steps(talker), steps(talker, BEFORE)
    monkeypatch.setitem(tiny.__dict__, "turns", None)
    assert steps(tiny) == first and steps(tiny, BEFORE) != second


def test_turns_add_up_to_the_weights(talker):
    changed = dict(talker.turns.changes())
    for name, weight in talker.decoder.model.named_parameters():
        told = talker.remembering.model.get_parameter(name)
        torch.testing.assert_close(told, weight + changed.get(name, 0))
    assert len(changed) == 7 * talker.config.backbone.num_hidden_layers


def test_many_at_once_are_answered_as_one_by_one(talker):
    prompts = [talker.prompt(f"question {'x' * i}", BEFORE if i % 2 else ()) for i in range(4)]
    together = answer_prompts(talker, prompts, **QUICK)
    for (text, audio, _), prompt in zip(together, prompts, strict=True):
        assert (text, audio) == answer_prompts(talker, [prompt], **QUICK)[0][:2]


@pytest.mark.parametrize("history", [(), BEFORE])
def test_a_second_question_heard_as_it_is_spoken_is_answered_as_in_one_go(talker, history):
    wav = torch.from_numpy(tone(1.2))
    listener = talker.listener(history=history)
    for packet in wav.split(3000):
        listener.push(packet)
    talk = listener.stream(**QUICK)
    offline = talker.ask((wav.numpy(), RATE), history=history, **QUICK)
    assert talk.answer.tokens["answer"] == offline.tokens["answer"]


def test_what_was_read_for_other_weights_is_forgotten(talker):
    prompt = talker.prompt("a question", BEFORE)
    prefill = generation.Prefill(talker.decoder, 400)
    prefill.read(talker.prompt("a question"))
    prefill.suit(talker.decoder)
    assert prefill.ids
    prefill.suit(talker.remembering)
    assert not prefill.ids and prefill.decoder.size == 400
    assert steps(talker, BEFORE, prefill=prefill) == steps(talker, BEFORE)
    assert prefill.ids[: len(prompt)] == prompt


def test_a_folder_keeps_them(talker, tmp_path):
    model_folder.save(talker, tmp_path)
    read = model_folder.read_part(tmp_path, "turns", talker.config, torch.device("cpu"), None)
    assert "turns" in model_folder.parts_in(tmp_path)
    for one, other in zip(read.parameters(), talker.turns.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)  # fp16 on disk


def test_only_what_is_learnt_about_turns_learns(tiny_text):
    torch.manual_seed(0)
    task = TurnsTask(library(tiny_text), {"turns": 1.0}, rows=2, length=256, heard=0.0)
    batch = task.batch(np.random.default_rng(0))
    task.loss(batch, 0)[0].backward()
    assert all(weight.grad is None for weight in task.backbone.parameters())
    assert all(up.grad.abs().sum() > 0 for up in task.model.up.values())
    assert set(task.modules) == {"model"} and isinstance(task.model, Turns)


# ---- wordings ----


def test_parts_are_combined():
    training, development = wider.combined("(a|b|) c (d|)\nx")
    assert sorted(training + development) == ["a c", "a c d", "b c", "b c d", "c", "c d", "x"]


def test_second_questions_of_development_and_evaluation_stay_out_of_training():
    planned = wider.turns_plan()
    said = {split: {item.core for item in planned if item.split == split and item.role == "follow"}
            for split in ("train", "dev")}  # fmt: skip
    held = {core for kind in wider.WIDER["follow"].values() for core in wider.lines_of(kind["wordings"])[True]}
    assert not said["train"] & said["dev"] and not (said["train"] | said["dev"]) & held
    asked = {item.text for item in wider.plan() if item.split == "eval"}
    assert not asked & {item.text for item in planned if item.split == "train"}
    assert len(said["train"]) > 900 and {item.split for item in planned} == {"train", "dev"}
    voices = {item.voice for item in planned}
    assert not voices & set(wider.V.NATURAL_HELD_OUT) and not voices & set(wider.V.EVALUATION)


def test_a_plan_of_turns_is_the_same_again_and_names_known_answers():
    planned, again = wider.turns_plan(0.05), wider.turns_plan(0.05)
    assert planned == again and len({item.id for item in planned}) == len(planned)
    known = set(wider.P.answer_ids().values())
    assert {item.answer_id for item in planned if item.role == "follow"} <= known


def test_a_prompt_with_a_turn_before_is_told_by_its_ids(tiny):
    ids = tiny.ids
    assert dialogue.prompt([("user", "a")], tiny.text, ids).count(ids.bot) == 2
    assert tiny.prompt("a", BEFORE).count(ids.bot) == 4
