"""The judge hears what was said, nothing else, always the same, and says which word it cannot know."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa.evaluation.judges import Judge, bigram_arpa, missing_words, word_graph
from aqaa.tokenizers.text import normalise
from tests.conftest import RATE

SAID = ["seven plus five is equal to twelve", "the capital of france is paris", "the opposite of hot is cold"]
PATHS = [Path(__file__).parent / "data" / f"{text.replace(' ', '_')}.flac" for text in SAID]  # flite's voice slt
SOUNDS = [soundfile.read(path, dtype="float32")[0] for path in PATHS]
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
ANSWERS = SAID + [f"{a} plus {b} is equal to {c}" for a in NUMBERS for b in NUMBERS for c in NUMBERS[::3]]
ANSWERS += ["the capital of japan is tokyo", "the opposite of cold is hot", "the opposite of hot is"]
sentences = st.lists(st.lists(st.sampled_from("a b c d".split()), min_size=1, max_size=5).map(" ".join), min_size=1)


@pytest.fixture(scope="module")
def judge():
    return Judge(ANSWERS)


def test_hears_what_was_said(judge):
    assert len(judge.answers) > 500
    assert judge.hear_all(SOUNDS) == judge.hear_all(SOUNDS, strict=True) == SAID
    assert judge.hear_all(SOUNDS * 2, workers=2) == SAID * 2


def test_loudness_and_history_do_not_matter(judge):
    first = judge.hear(SOUNDS[1], strict=True)
    judge.hear(SOUNDS[0] * 0.01, strict=True)
    assert judge.hear(SOUNDS[1] * 0.02, strict=True) == judge.hear(SOUNDS[1], strict=True) == first


@pytest.mark.parametrize("wav", [np.zeros(0), np.zeros(16000), np.zeros(10) + 0.5])
def test_nothing_is_heard_in_nothing(judge, wav):
    assert judge.hear(wav) == "" == judge.hear(wav, strict=True)


def test_noise_and_half_a_sentence_are_no_answer(judge):
    assert judge.hear(np.random.default_rng(0).normal(0, 0.1, 32000)) == ""
    assert judge.hear(SOUNDS[0][: len(SOUNDS[0]) // 2]) != SAID[0]


def test_it_finds_when_the_words_of_a_known_sentence_are_said(judge):
    for sound, text in zip(SOUNDS, SAID, strict=True):
        found = judge.when(np.pad(sound, (RATE // 2, 0)), text)
        assert [word for word, _, _ in found] == text.split()
        assert 0.4 < found[0][1] < 0.8 and found[-1][2] < 0.52 + len(sound) / RATE
        assert all(a < b <= c for (_, a, b), (_, c, _) in zip(found, found[1:], strict=False))
        assert judge.hear(sound) == text  # it still chooses among all answers
    assert judge.when(np.zeros(RATE), SAID[0]) == [] == judge.when(SOUNDS[0][: RATE // 3], SAID[1])
    with pytest.raises(ValueError, match="no answer of this judge has the word 'banana'"):
        judge.when(SOUNDS[0], "seven plus banana")


def test_the_strict_judge_knows_its_bigrams_alone():
    others = [answer for answer in ANSWERS if "france" not in answer]
    assert Judge(others).hear(SOUNDS[1], strict=True) != SAID[1]
    judge = Judge(["the capital of france is paris"], bigrams=ANSWERS)  # they may come from other texts
    assert judge.hear(SOUNDS[0], strict=True) == SAID[0]


@pytest.mark.parametrize("wav", [np.zeros((2, 100)), np.full(9, np.nan)])
def test_refuses_what_is_no_wav(judge, wav):
    with pytest.raises(ValueError, match="judge"):
        judge.hear(wav)


def test_an_unknown_word_is_named_and_can_be_taught():
    with pytest.raises(ValueError, match="'oink'.*'the pig says oink'"):
        Judge(["the pig says oink"])
    assert missing_words(["The pig says: oink!"]) == ["oink"]
    assert Judge(["the pig says oink"], pronunciations={"oink": "OY NG K"}).hear(np.zeros(100)) == ""
    with pytest.raises(ValueError, match="QQ"):
        Judge(["oink"], pronunciations={"oink": "OY QQ"})


def test_no_answers_no_judge():
    with pytest.raises(ValueError, match="at least one"):
        Judge([" ", "?"])


def test_normalise():
    assert normalise("  It's  Two, and\tTWO. ") == "it's two and two"
    assert normalise("(slow) the river (softly) runs") == "the river runs"


@settings(deadline=None, max_examples=60)
@given(sentences)
def test_the_graph_speaks_the_sentences_and_no_others(lines):
    start, end, size, edges = word_graph(lines)
    assert all(0 <= a < size and 0 <= b < size for a, b, _ in edges)

    def paths(state):
        return {""} if state == end else {f"{w} {rest}".strip() for a, b, w in edges if a == state for rest in paths(b)}

    assert paths(start) == set(lines)
    assert len(edges) == len(set(edges))


def test_equal_ends_are_shared():
    few = word_graph([f"{a} plus {b} is equal to twelve" for a in NUMBERS for b in NUMBERS])
    assert few[2] < 10
    with pytest.raises(ValueError, match="empty"):
        word_graph(["a", " "])


@settings(deadline=None, max_examples=60)
@given(sentences)
def test_bigrams_are_probabilities(lines):
    """After every word the probabilities of all words sum to 1, read with the rules of an ARPA file."""
    unigrams, backoff, bigrams = {}, {}, {}
    head, single, double = bigram_arpa(lines).split("-grams:")
    for p, word, *left in map(str.split, single.splitlines()[1:-2]):
        unigrams[word], backoff[word] = 10 ** float(p), 10 ** float(*left or [0])
    for p, before, word in map(str.split, double.splitlines()[1:-2]):
        bigrams[before, word] = 10 ** float(p)
    assert f"ngram 1={len(unigrams)}\nngram 2={len(bigrams)}" in head
    words = [word for word in unigrams if word != "<s>"]
    assert math.isclose(sum(unigrams[word] for word in words), 1, abs_tol=1e-3)
    for before in set(unigrams) - {"</s>"}:
        total = sum(bigrams.get((before, word), backoff[before] * unigrams[word]) for word in words)
        assert math.isclose(total, 1, abs_tol=1e-3)
        assert all(p > backoff[before] * unigrams[w] for (b, w), p in bigrams.items() if b == before)
