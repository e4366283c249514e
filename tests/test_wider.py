"""The wider part of the curriculum: what is held out stays out, second questions have their answers, ids never move."""

from collections import Counter

import pytest

from aqaa.corpus import intents as C
from aqaa.corpus import plan as P
from aqaa.corpus import voices as V
from aqaa.corpus import wider
from aqaa.tokenizers.text import tagged

ITEMS = wider.plan()
ASKED = [item for item in ITEMS if item.role in ("question", "follow")]


def of(split, cell=None):
    return [item for item in ASKED if item.split == split and cell in (None, item.cell)]


def test_it_is_the_same_each_time_and_no_id_meets_another():
    assert P.plan_hash(wider.plan()) == P.plan_hash(ITEMS) != P.plan_hash(wider.plan(seed=1))
    ids = [item.id for item in P.plan() + P.open_plan(0.01) + ITEMS]
    assert len(set(ids)) == len(ids) and all("~" not in name for name in ids)


def test_counts_are_those_of_the_table():
    for cell, count in wider.WIDER["cells"].items():
        assert len(of("eval", cell)) == count
    wanted = sum(sum(counts.values()) for counts in wider.WIDER["counts"].values())
    assert len(of("train")) == wanted
    assert len(wider.plan(0.001)) < 200


def test_every_answer_is_spoken():
    spoken = {item.answer_id: item for item in P.answer_items() + ITEMS if item.role == "answer"}
    for item in ASKED:
        answer = spoken[item.answer_id]
        assert (answer.text, answer.manner) == (item.answer, item.manner)


def test_training_never_hears_what_evaluation_asks():
    asked = {item.text for item in ITEMS if item.split == "train"}
    held_out = [item for item in of("eval") if item.cell != "known_natural" and item.intent != "unheard"]
    assert not {item.text for item in held_out} & asked
    heard = {item.core for item in of("train")}
    assert not {item.core for item in held_out if not item.intent.endswith(("open", "near"))} & heard
    near = [wider.words_of(words) for words in wider.WIDER["outside"]["near"].values()]
    assert all(training and kept and not set(training) & set(kept) for training, kept in near)
    for item in of("eval"):
        if item.intent == "outside_near":
            assert any(all(word in item.text for word in one.split("|")) for _, kept in near for one in kept)
    patterns = C.held_out_patterns()
    assert not [text for text in asked if any(pattern.search(text) for pattern in patterns)]


def test_voices_held_out_are_never_in_training():
    training = Counter(item.voice for item in ITEMS if item.split != "eval")
    assert not set(training) & set(V.NATURAL_HELD_OUT + V.EVALUATION)
    assert set(V.NATURAL) | set(wider.NOISES) <= set(training)
    natural = {item.voice for item in ITEMS if item.cell.endswith("_natural")}
    assert natural == set(V.NATURAL_HELD_OUT)


def test_development_has_wordings_and_voices_of_its_own():
    """What is chosen on them is chosen on what training never heard, and evaluation does not ask."""
    cores = {core for intent in C.INTENTS.values() for core in intent.dev}
    mine = [item for item in of("dev") if item.core in cores]
    assert len(mine) == wider.DEV == len(ITEMS) - ITEMS.index(mine[0])
    assert all(item.core in C.INTENTS[item.intent].dev for item in mine)
    unheard = [item for item in mine if item.voice in V.DEVELOPMENT]
    assert {item.voice for item in mine} == {*V.DEVELOPMENT, *V.NATURAL} and 0.4 < len(unheard) / len(mine) < 0.6
    assert len({item.intent for item in mine}) == len({item.intent for item in of("eval", "new_natural")}) > 30
    others = [*ITEMS[: -wider.DEV], *P.plan()]
    assert not {item.core for item in mine} & {item.core for item in others}
    assert not {item.text for item in mine} & {item.text for item in others}
    assert not {item.voice for item in others} & set(V.DEVELOPMENT)


def test_outside_is_no_known_question():
    known = C.bare_questions()
    for item in ASKED:
        honest = item.category == wider.HONESTY
        assert honest == (item.answer in wider.WIDER["answers"].values())
        if honest:
            assert item.text not in known


@pytest.mark.parametrize("kind", sorted(wider.WIDER["follow"]))
def test_a_second_question_needs_the_first(kind):
    """Its answer is a known fact, or the first one again, and its own words alone do not say which."""
    facts = {(fact.answer, fact.manner) for intent in C.INTENTS.values() for fact in intent.known()}
    mine = [item for item in ASKED if item.intent == f"follow_{kind}"]
    assert len(mine) > 300
    for item in mine:
        assert (item.answer, item.manner) in facts and item.slots["asked"] and item.slots["answered"]
        if kind == "again":
            assert item.slots["answered"] == tagged(item.answer, item.manner)
        if kind == "manner":
            assert item.slots["answered"].endswith(item.answer)
            assert item.slots["answered"] != tagged(item.answer, item.manner)
    if kind not in ("other", "other_place"):  # the same words, many answers
        answers = {}
        for item in mine:
            answers.setdefault(item.text, set()).add(item.answer)
        assert max(map(len, answers.values())) > 3


def test_the_first_question_of_a_dialogue_is_spoken_before_the_second():
    firsts = 0
    for one, two in zip(ITEMS, ITEMS[1:], strict=False):
        if one.role == "first":
            firsts += 1
            assert two.role == "follow" and two.slots["asked"] == one.text and two.voice == one.voice
            assert one.split == two.split != "train"
    assert firsts == len([item for item in of("eval") + of("dev") if item.role == "follow"]) > 100


def test_open_sentences_are_asked_as_what_nobody_knows():
    """In training alone: what development or evaluation says is left out, and no known question is among them."""
    planned = P.plan() + ITEMS
    asked = wider.unknown(planned)
    assert {(item.role, item.split, item.answer, item.answer_id) for item in asked} == {
        ("question", "train", wider.OUTSIDE, next(i.answer_id for i in ITEMS if i.answer == wider.OUTSIDE))
    }
    kept_apart = {item.text for item in planned if item.split != "train"}
    known = {item.text for item in planned if item.role == "question" and item.category != wider.HONESTY}
    opened = {item.text for item in P.open_plan()}
    assert not {item.text for item in asked} & (kept_apart | known)
    assert len(asked) == len(P.open_plan()) - sum(item.text in kept_apart for item in P.open_plan()) > 19_000
    assert kept_apart & opened  # so that the test could fail
    assert not {item.voice for item in asked} & set(V.NATURAL_HELD_OUT + V.EVALUATION)
