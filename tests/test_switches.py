"""Two manners in a sentence: the text says where, each part is spoken in its own, and what is held out stays out."""

from dataclasses import replace

import numpy as np
import pytest

from aqaa.corpus import intents as C
from aqaa.corpus import play, speak, switches, wider
from aqaa.corpus import voices as V
from aqaa.corpus.curriculum import SENTENCES
from aqaa.corpus.facts import pieces
from aqaa.corpus.intents import said_as
from aqaa.corpus.plan import answer_items
from aqaa.tokenizers.text import MANNERS, normalise, tagged

ITEMS = [item for item in play.plan() if item.intent == switches.NAME]
ASKED = [item for item in ITEMS if item.role == "question"]
ANSWERS = {item.id: item for item in ITEMS if item.role == "answer"}


def test_counts_are_those_of_the_table():
    entry = play.PLAY["switch"]
    for cell, count in entry["cells"].items():
        assert len([item for item in ASKED if item.cell == cell]) == count
    assert len([item for item in ASKED if item.split == "train"]) == sum(entry["counts"].values())
    assert len(ANSWERS) == len(SENTENCES) * len(switches.PAIRS)
    few = switches.plan(entry, 0.001)
    assert {i.answer_id for i in few if i.role == "answer"} == {i.answer_id for i in few if i.role != "answer"}


def test_the_answer_is_the_sentence_and_says_where_the_manner_changes():
    for item in ASKED:
        answer = ANSWERS[item.answer_id]
        assert (answer.text, answer.manner) == (item.answer, item.manner) == (answer.answer, item.slots["a"])
        (first, one), (rest, other) = pieces(item.answer, item.manner)
        assert f"{first} {rest}" == item.slots["x"] == normalise(tagged(item.answer, item.manner))
        assert (one, other) == (item.slots["a"], item.slots["b"]) and one != other and {one, other} <= set(MANNERS)
        assert 0 <= len(first.split()) - len(rest.split()) <= 1
        assert said_as(item.answer) == item.slots["x"]
        assert first in item.text and rest in item.text


def test_training_never_hears_what_evaluation_asks():
    asked, others = ([i for i in ASKED if (i.split == "eval") == new] for new in (True, False))
    for name in ("core", "answer"):
        assert not {getattr(i, name) for i in asked} & {getattr(i, name) for i in others}
    patterns = C.held_out_patterns()
    assert not [i.text for i in others if any(pattern.search(i.text) for pattern in patterns)]
    assert not {i.voice for i in others} & {*V.NATURAL_HELD_OUT, *V.EVALUATION}
    assert {i.voice for i in asked if i.cell == "switch_natural"} == set(V.NATURAL_HELD_OUT)
    assert all(ANSWERS[i.answer_id].split == "train" for i in others)
    heard, kept = wider.lines_of(play.PLAY["switch"]["wordings"])
    assert len(heard) >= 10 and len(kept) >= 3
    manners = {i.manner for i in asked}
    assert manners == {i.manner for i in others} == {one for one, _ in switches.PAIRS}


def test_it_is_no_known_question_and_nothing_that_is_outside():
    honest = {item.text for item in wider.plan() if item.category == wider.HONESTY}
    assert not {item.text for item in ASKED} & (C.bare_questions() | honest)


def test_pieces_of_a_text():
    assert pieces("a b", "normal") == [("a b", "normal")]
    assert pieces("a (fast) b c (low) d", "slow") == [("a", "slow"), ("b c", "fast"), ("d", "low")]
    assert pieces("(fast) b", "normal") == [("b", "fast")] and pieces("", "slow") == []


@pytest.mark.parametrize("one, other", [("slow", "fast"), ("loud", "soft")])
def test_each_part_is_spoken_in_its_manner(one, other):
    """Parts of tones: the answer is theirs, one behind the other, and each starts a group of codes."""
    sounds = {
        "the cat": np.sin(np.arange(16000) / 9).astype(np.float32),
        "sleeps": np.sin(np.arange(9000) / 7).astype(np.float32),
    }
    item = replace(answer_items()[0], text=f"the cat ({other}) sleeps", manner=one, phones=[])
    assert speak._parts(item) == [("the cat", V.MANNERS[one]), ("sleeps", V.MANNERS[other])]
    wav = speak._finish(item, [(sounds[words], 16000) for words, _ in speak._parts(item)])
    parts = [V.say_answer(sounds[text], 16000, how) for text, how in (("the cat", one), ("sleeps", other))]
    assert np.array_equal(wav, np.concatenate(parts))
    assert all(len(part) % round(V.GROUP_SECONDS * V.SAMPLE_RATE) == 0 for part in parts)


def test_a_tag_inside_a_text_is_one_id_and_no_word(tiny_text):
    text = "(slow) the cat (fast) sleeps"
    ids = tiny_text.encode(text)
    assert normalise(tiny_text.decode(ids)) == normalise(text) == "the cat sleeps"
    assert pieces(tiny_text.decode(ids[1:]), "slow") == [("the cat", "slow"), ("sleeps", "fast")]
    assert [tiny_text.decode([i]) for i in ids if "(" in tiny_text.decode([i])] == ["(slow)", "(fast)"]
