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

SAID = ["seven plus five is equal to twelve", "the capital of france is paris", "the opposite of hot is cold"]
SOUNDS = [Path(__file__).parent / "data" / f"{text.replace(' ', '_')}.flac" for text in SAID]  # flite's voice slt
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
ANSWERS = SAID + [f"{a} plus {b} is equal to {c}" for a in NUMBERS for b in NUMBERS for c in NUMBERS[::3]]
ANSWERS += ["the capital of japan is tokyo", "the opposite of cold is hot", "the opposite of hot is"]
sentences = st.lists(st.lists(st.sampled_from("a b c d".split()), min_size=1, max_size=5).map(" ".join), min_size=1)


@pytest.fixture(scope="module")
def judge():
    return Judge(ANSWERS)


@pytest.fixture(scope="module")
def wavs():
    return [soundfile.read(path, dtype="float32")[0] for path in SOUNDS]


def test_hears_what_was_said(judge, wavs):
    assert len(judge.answers) > 500
    assert judge.hear_all(wavs) == SAID
    assert judge.hear_all(wavs, strict=True) == SAID


def test_loudness_and_history_do_not_matter(judge, wavs):
    first = judge.hear(wavs[1], strict=True)
    judge.hear(wavs[0] * 0.01, strict=True)
    assert judge.hear(wavs[1] * 0.02, strict=True) == judge.hear(wavs[1], strict=True) == first


def test_processes_hear_the_same(judge, wavs):
    assert judge.hear_all(wavs * 2, workers=2) == SAID * 2


@pytest.mark.parametrize("wav", [np.zeros(0), np.zeros(16000), np.zeros(10) + 0.5])
def test_nothing_is_heard_in_nothing(judge, wav):
    assert judge.hear(wav) == "" == judge.hear(wav, strict=True)


def test_noise_and_half_a_sentence_are_no_answer(judge, wavs):
    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    assert judge.hear(noise) == ""
    half = wavs[0][: len(wavs[0]) // 2]
    assert judge.hear(half) != SAID[0]


def test_a_sentence_that_is_no_answer_is_not_heard_by_the_strict_judge(wavs):
    others = [answer for answer in ANSWERS if "france" not in answer]
    assert Judge(others).hear(wavs[1], strict=True) != SAID[1]


def test_bigrams_may_come_from_other_texts(wavs):
    judge = Judge(["the capital of france is paris"], bigrams=ANSWERS)
    assert judge.hear(wavs[0], strict=True) == SAID[0]


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
    """After every word the chances of all words sum to 1, read with the rules of an ARPA file."""
    unigrams, backoff, bigrams = {}, {}, {}
    for line in bigram_arpa(lines).splitlines():
        fields = line.split()
        if len(fields) in (2, 3) and fields[0].lstrip("-").replace(".", "").isdigit():
            if len(fields) == 3 and not _number(fields[2]):
                bigrams[fields[1], fields[2]] = 10 ** float(fields[0])
            else:
                unigrams[fields[1]] = 10 ** float(fields[0])
                backoff[fields[1]] = 10 ** float(fields[2]) if len(fields) == 3 else 1
    words = [word for word in unigrams if word != "<s>"]
    assert math.isclose(sum(unigrams[word] for word in words), 1, abs_tol=1e-3)
    for before in set(unigrams) - {"</s>"}:
        total = sum(bigrams.get((before, word), backoff[before] * unigrams[word]) for word in words)
        assert math.isclose(total, 1, abs_tol=1e-3)
        assert all(p > backoff[before] * unigrams[w] for (b, w), p in bigrams.items() if b == before)


def _number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
