"""Creativity, roles and games: what is held out stays out, answers follow from what is asked, ids never move."""

import pytest

from aqaa.corpus import intents as C
from aqaa.corpus import plan as P
from aqaa.corpus import play, wider
from aqaa.corpus import voices as V
from aqaa.corpus.facts import UNITS, number
from aqaa.tokenizers.text import MANNERS, tagged

ITEMS = play.plan()
ASKED = [item for item in ITEMS if item.role in ("question", "follow") and item.intent != "switch"]


def of(intent):
    return [item for item in ASKED if item.intent == intent]


def test_it_is_the_same_each_time_and_no_id_meets_another():
    assert P.plan_hash(play.plan()) == P.plan_hash(ITEMS) != P.plan_hash(play.plan(seed=1))
    ids = [item.id for item in P.plan() + P.open_plan(0.01) + play.joined()]
    assert len(set(ids)) == len(ids) and all("~" not in name for name in ids)


def test_counts_are_those_of_the_table_and_a_miniature_speaks_only_what_it_needs():
    for cell, count in play.PLAY["cells"].items():
        assert len([item for item in ASKED if item.cell == cell]) == count
    for intent, counts in play.PLAY["counts"].items():
        assert len([item for item in of(intent) if item.split == "train"]) == sum(counts.values())
    few = play.plan(0.001)
    assert {i.answer_id for i in few if i.role == "answer"} <= {i.answer_id for i in few if i.role != "answer"}
    assert len(few) < 300


def test_three_categories_and_every_answer_is_spoken():
    assert {item.category for item in ASKED} == {"Creativity", "Role-playing", "Gaming"}
    spoken = {item.answer_id: item for item in P.answer_items() + ITEMS if item.role == "answer"}
    for item in ASKED:
        answer = spoken[item.answer_id]
        assert (answer.text, answer.manner) == (item.answer, item.manner)
        assert answer.split == "train" or item.split == "eval"


def test_training_never_hears_what_evaluation_asks():
    trained = [item for item in ASKED if item.split == "train"]
    asked = [item for item in ASKED if item.split == "eval"]
    assert not {item.core for item in asked} & {item.core for item in trained}
    stories = [{item.answer for item in items if item.intent == "story"} for items in (asked, trained)]
    assert len(stories[0]) > 10 and not stories[0] & stories[1]
    assert not {item.voice for item in ASKED if item.split != "eval"} & set(V.NATURAL_HELD_OUT + V.EVALUATION)
    assert {item.voice for item in asked if item.cell == "play_natural"} == set(V.NATURAL_HELD_OUT)
    patterns = C.held_out_patterns()
    assert not [item for item in trained if any(pattern.search(item.text) for pattern in patterns)]
    for name, entry in play.PLAY["intents"].items():
        heard, kept = wider.lines_of(entry["wordings"])
        assert len(heard) >= 5 and len(kept) >= 2 and not set(heard) & set(kept), name


def test_it_is_no_known_question_and_nothing_that_is_outside():
    known = C.bare_questions()
    honest = {item.text for item in wider.plan() if item.category == wider.HONESTY}
    for item in ASKED:
        assert item.text not in known
        assert item.role == "follow" or item.text not in honest


def test_games_are_played_by_their_rules():
    values = {number(n): n for n in range(101)}
    for item in of("guess") + of("guess_again"):
        guess = values[item.answer.removeprefix("my guess is ")]
        bounds = [word for word in item.text.replace(" and ", " | ").split(" | ")]
        low, high = (next(values[n] for n in sorted(values, key=len, reverse=True) if f" {part} ".find(f" {n} ") >= 0)
                     for part in (bounds[-2], bounds[-1]))  # fmt: skip
        assert low < guess < high
    for fact in play.facts()["chain"]:
        mine = fact.answer.split()[-1]
        assert mine[0] == fact.key[-1] and mine != fact.key and mine not in UNITS
    assert {fact.key: fact.answer.split()[-1] for fact in play.facts()["rock"]} == {
        "rock": "win", "paper": "wins", "scissors": "win",
    }  # fmt: skip


def test_rhymes_end_alike_and_stories_have_the_three_words():
    for fact in play.facts()["rhyme"]:
        one, other = fact.answer.split(" rhymes with ")
        assert fact.key == other != one
    for fact in play.facts()["story"]:
        assert all(f" {word} " in f" {fact.answer} " for word in fact.key.split())


def test_a_role_has_its_voice_also_when_it_is_asked_who_it_is():
    assert {manner for manner, _ in play.PLAY["roles"].values()} <= set(MANNERS)
    for item in of("role_be") + of("role_say"):
        assert item.manner == play.PLAY["roles"][item.slots["r"]][0]
    told = {}
    for item in of("who_now"):
        assert item.slots["answered"] == tagged(item.answer, item.manner)
        told.setdefault(item.text, set()).add(item.answer)
    assert max(map(len, told.values())) > 5  # the words alone do not say who


@pytest.mark.parametrize("name", [name for name, entry in play.PLAY["intents"].items() if "first" in entry])
def test_the_first_question_is_spoken_before_the_second_where_it_is_no_training(name):
    for before, item in zip(ITEMS, ITEMS[1:], strict=False):
        if item.intent == name:
            assert (before.role == "first") == (item.split != "train")
            if before.role == "first":
                assert (before.text, before.voice) == (item.slots["asked"], item.voice)


def test_copies_are_of_training_questions_and_of_one_in_ten_that_were_there_before():
    copied = [item for item in P.plan() if wider.is_copied(item)]
    questions = [item for item in P.plan() if item.role == "question" and item.split == "train"]
    assert 0.08 < len(copied) / len(questions) < 0.12 and all(item in questions for item in copied)
    for item in ITEMS:
        item.part = "play"
    asked = [item for item in ITEMS if item.role in ("question", "follow") and item.split == "train"]
    assert [item for item in ITEMS if wider.is_copied(item)] == asked
