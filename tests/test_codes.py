"""Perplexities are what they should be where the answer is known, and interleaving helps exactly where it can."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqaa.corpus.codes import ANSWERS, codes_file, replaceable, store_codes, stored_codes, usage
from aqaa.evaluation.codes import arrange, streams


@given(st.integers(1, 40), st.integers(1, 5))
def test_even_use_has_the_perplexity_of_its_size(size, times):
    result = usage(list(range(size)) * times, 64)
    assert result["used"] == size and result["perplexity"] == pytest.approx(size)
    assert result["entropy_bits"] == pytest.approx(np.log2(size))


def test_usage_takes_utterances_and_refuses_other_codes():
    assert usage([[0, 1], [1], np.array([1, 1])], 2) == usage(np.array([0, 1, 1, 1, 1]), 2)
    for codes in ([], [[]], [5], [[0], [-1]]):
        with pytest.raises(ValueError, match="codes"):
            usage(codes, 5)


def put(folder, part, **codes):
    folder.mkdir(exist_ok=True)
    store_codes(codes_file(folder, part), list(codes), *[[[code] * n for code in codes.values()] for n in (2, 3)])


@pytest.mark.parametrize("other", ["questions", "wider", "zebra"])
def test_an_answer_is_what_the_voice_of_today_says(tmp_path, other):
    put(tmp_path, other, hers=1, asked=2)
    put(tmp_path, ANSWERS, hers=3)
    codes = stored_codes(tmp_path)
    assert {name: pair[1].tolist() for name, pair in codes.items()} == {"hers": [3, 3, 3], "asked": [2, 2, 2]}


def test_codes_that_moved_to_another_file_are_not_lost(tmp_path):
    put(tmp_path / "there", "questions", hers=1, asked=2)
    put(tmp_path / "here", "questions", asked=2)
    with pytest.raises(ValueError, match="has 1 utterances that .*codes.npz lacks"):
        replaceable(tmp_path / "here", tmp_path / "there")
    put(tmp_path / "here", ANSWERS, hers=1)
    assert len(replaceable(tmp_path / "here", tmp_path / "there")) == 2


def test_arrangements_cover_the_same_groups():
    first, second = np.arange(5), np.arange(10)  # two whole groups
    assert arrange(first, second, "linguistic", 8).tolist() == [0, 1, 2, 3, 4]
    assert arrange(first, second, "semantic", 8).tolist() == [0, 9, 10, 11, 12, 13, 14]
    assert arrange(first, second, "interleaved", 8).tolist() == [0, 1, 2, 9, 10, 11, 3, 4, 12, 13, 14]


def test_the_other_stream_helps_where_it_tells():
    """The semantic codes repeat the linguistic ones of their group; the linguistic ones are random."""
    rng = np.random.default_rng(0)

    def utterance():
        first = rng.integers(0, 4, (6, 2))
        return first.reshape(-1), np.repeat(first[:, :1], 3, axis=1).reshape(-1)

    pairs = [utterance() for _ in range(48)]
    result = streams(pairs[:40], pairs[40:], 4, 4, steps=20, batch=16, lr=1e-2, quiet=True)
    assert set(result) == {"linguistic", "semantic", "interleaved", "change"}
    assert set(result["semantic"]) == {"semantic"}
    assert result["linguistic"]["linguistic"] > 3.5  # random: nothing can be learned
    assert result["change"]["semantic"] < -0.1


def test_no_utterances():
    with pytest.raises(ValueError, match="utterances"):
        streams([], [], 4, 4)
