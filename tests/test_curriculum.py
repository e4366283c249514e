"""What is asked and answered: held-out wordings, slots and facts stay held out, and every answer can be recognised."""

import random
import re
from collections import Counter
from pathlib import Path

import pocketsphinx
import pytest

from aqaa.corpus import facts as F
from aqaa.corpus import intents as C
from aqaa.corpus import voices as V
from aqaa.corpus.plan import CELLS, open_plan, plan, plan_hash, texts, vocabulary


@pytest.fixture(scope="module")
def items():
    return plan(0.15)


def heard(items):
    return [item for item in items if item.split != "eval"]


def test_numbers_are_spelled():
    assert [F.number(n) for n in (0, 13, 20, 35, 100)] == ["zero", "thirteen", "twenty", "thirty five", "one hundred"]
    with pytest.raises(ValueError, match="0 to 100"):
        F.number(101)


def test_every_intent_has_wordings_to_learn_and_wordings_to_be_tested_on():
    for intent in C.INTENTS.values():
        assert len(intent.cores) >= 6 and len(intent.held_out) >= 2, intent.name
        assert len(set(intent.cores + intent.held_out)) == len(intent.cores) + len(intent.held_out)
        keys = [fact.key for fact in intent.facts]
        assert len(set(keys)) == len(keys), intent.name
        wordings = {C.wording(core, intent.facts[0], random.Random(i)) for core in intent.cores for i in range(20)}
        assert len(wordings) >= 20, intent.name


def test_wordings_of_development_are_none_of_the_others():
    patterns = C.held_out_patterns()
    for intent in C.INTENTS.values():
        others = intent.cores + intent.held_out + intent.later
        assert not set(intent.dev) & set(others)
        assert len(intent.dev) == (0 if intent.category == "Voice Understanding" else 2), intent.name
        for core in intent.dev:
            assert intent.allowed(core) == intent.known()
            texts = {C.fill(core, fact) for fact in intent.facts}
            assert not texts & {C.fill(other, fact) for other in others for fact in intent.facts}
            assert not [text for text in texts if any(pattern.search(text) for pattern in patterns)]


def test_same_answer_means_same_words_for_the_same_question():
    """A question text has one answer, except where the sound decides."""
    said = {}
    for intent in C.INTENTS.values():
        for core in intent.cores + intent.held_out + intent.later + intent.dev:
            for fact in intent.facts:
                if not fact.want:
                    assert said.setdefault(C.fill(core, fact), (fact.answer, fact.manner)) == (fact.answer, fact.manner)


def test_arithmetic_is_right():
    value = {F.number(n): n for n in range(101)}
    for name, sign in (("sum", "+"), ("difference", "-"), ("product", "*")):
        for fact in C.INTENTS[name].facts:
            a, b = (value[words] for _, words in fact.slots)
            assert value[fact.answer.split(" equal to ")[1]] == eval(f"{a}{sign}{b}")
    for name, choose in (("bigger", max), ("smaller", min)):
        for fact in C.INTENTS[name].facts:
            assert value[fact.answer.split(" is a ")[0]] == choose(value[words] for _, words in fact.slots)


def test_answers_are_many_distinct_and_in_the_judges_dictionary():
    answers = {(fact.answer, fact.manner) for intent in C.INTENTS.values() for fact in intent.facts}
    assert 500 <= len(answers) <= 1100
    assert {manner for _, manner in answers} == set(V.MANNERS)
    dictionary = Path(pocketsphinx.get_model_path()) / "en-us" / "cmudict-en-us.dict"
    known = {line.split()[0] for line in dictionary.read_text(encoding="utf-8").splitlines() if line}
    words = {word for answer, _ in answers for word in answer.split()}
    assert not words - known
    assert sum(5 <= len(answer.split()) <= 20 for answer, _ in answers) == len(answers)


def test_texts_are_lower_case_words(items):
    for item in items:
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", item.text), item.text


def test_no_evaluation_voice_is_heard_in_training(items):
    learnt_from = {*V.TRAINING, V.ANSWER_VOICE}
    assert not learnt_from & {*V.EVALUATION, *V.NATURAL_HELD_OUT, *V.DEVELOPMENT}
    assert {item.voice for item in heard(items)} <= learnt_from
    for cell, (_, _, pool) in CELLS.items():
        assert {item.voice for item in items if item.cell == cell} <= set(pool)


def test_no_held_out_wording_is_heard_in_training(items):
    patterns = C.held_out_patterns()
    for text in {item.text for item in heard(items)}:
        assert not any(pattern.search(text) for pattern in patterns), text
    for item in items:
        if item.role == "question":
            held_out = item.core in C.INTENTS[item.intent].held_out
            assert held_out == item.cell.startswith("new_")
            assert not held_out or any(pattern.search(item.text) for pattern in patterns), item.text


def test_no_held_out_slot_is_asked_in_its_wording(items):
    for item in items:
        if item.role != "question" or item.want or item.cell == "read_only":
            continue
        intent = C.INTENTS[item.intent]
        closed = {fact.key for fact in intent.closed(item.core)} if item.core in intent.cores else set()
        assert (" ".join(item.slots.values()) in closed) == (item.cell == "slot_seen"), item


def test_every_held_out_slot_is_asked_in_another_wording():
    for intent in C.INTENTS.values():
        for fact in intent.facts:
            if not fact.read_only:
                assert any(fact in intent.allowed(core) for core in intent.cores)


def test_read_only_facts_are_never_spoken_in_training_but_are_read(items):
    facts = {
        (intent.name, fact.key): fact for intent in C.INTENTS.values() for fact in intent.facts if fact.read_only
    }
    assert len(facts) >= 25
    for item in heard(items):
        assert (item.intent, " ".join(item.slots.values())) not in facts
    silent = {fact.answer for fact in facts.values()}
    assert not silent & {item.text for item in heard(items)}
    read = [pair for pair in texts(items) if pair["read_only"]]
    assert {pair["answer"] for pair in read} == silent
    assert min(Counter(pair["answer"] for pair in read).values()) >= 10


def test_words_of_new_wordings_and_read_only_facts_are_heard_elsewhere():
    items = plan(1.0)
    heard_words = Counter(word for item in heard(items) if item.role != "answer" for word in item.text.split())
    asked = {word for item in items if item.role == "question" for word in item.text.split()}
    assert min(heard_words[word] for word in asked) >= 50
    assert min(heard_words[word] for word in vocabulary()) >= 50
    cells = Counter(item.cell for item in items if item.split == "eval" and item.role == "question")
    assert all(cells[cell] >= 130 for cell in CELLS if cell != "read_only") and cells["read_only"] == 60
    shares = Counter(item.voice.split(":")[0] for item in heard(items) if item.role != "answer")
    assert 0.38 < 1 - shares["espeak"] / shares.total() < 0.47


def test_same_seed_same_plan_and_other_seed_another():
    assert plan_hash(plan(0.01)) == plan_hash(plan(0.01)) != plan_hash(plan(0.01, seed=1))
    assert plan_hash(open_plan(0.01)) == plan_hash(open_plan(0.01)) != plan_hash(open_plan(0.01, seed=1))


def test_open_sentences_hold_no_question_and_no_voice_that_is_held_out():
    opened, patterns, bare = open_plan(0.1), C.held_out_patterns(), C.bare_questions()
    assert len({item.id for item in opened}) == len({item.text for item in opened}) == len(opened) == 2000
    assert len({item.seed for item in opened}) == len(opened)
    for item in opened:
        assert not any(pattern.search(item.text) for pattern in patterns) and item.text not in bare, item.text
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", item.text) and (item.role, item.split) == ("open", "train")
    assert {item.voice for item in opened} <= {*V.TRAINING, *V.NATURAL}
    assert not {*V.NATURAL} & {*V.EVALUATION, *V.NATURAL_HELD_OUT}
    shares = Counter(item.voice for item in opened)
    assert (shares["hibari:heart"], shares["kokoro:mix"]) == (1000, 600)
    assert not {item.id for item in opened} & {item.id for item in plan(0.01)}


def test_without_natural_voices_the_synthesizers_say_their_share():
    opened = open_plan(0.1, natural=False)
    assert len(opened) == 400 and {item.voice for item in opened} <= set(V.TRAINING)


def test_letters_are_said_by_their_names():
    assert C.said_as("cat is spelled c a t") == "cat is spelled c ay t"
    assert C.said_as("a cat is spelled") == "a cat is spelled"
