"""Open sentences: many words, right lengths, right articles, the same for the same seed."""

import re
from collections import Counter
from random import Random

import pytest

from aqaa.corpus import sentences as S

SOUNDS_LIKE_A_CONSONANT = re.compile("(one|once|u[st]e|usu|using|uni[cfoqtv]|union|euro|ukraine)")
SILENT_H = re.compile("(hour|honest|honor)")


@pytest.fixture(scope="module")
def texts():
    return S.open_sentences(5000, Random(1))


def test_texts_are_distinct_and_plain(texts):
    assert len(set(texts)) == 5000
    assert all(re.fullmatch("[a-z']+( [a-z']+)*", text) for text in texts)


def test_lengths(texts):
    lengths = [len(text.split()) for text in texts]
    for low, high, percent in S.BANDS:
        assert abs(sum(low <= n <= high for n in lengths) / 50 - percent) < 3
    assert 1 <= min(lengths) and max(lengths) <= 25


def test_nearly_all_words_are_used(texts):
    used = Counter(word for text in texts for word in text.split())
    assert len(S.BASES) >= 2500
    assert sum(word in used for word in S.BASES) >= 0.95 * len(S.BASES)
    assert set(used) <= S.vocabulary()


def test_articles(texts):
    for text in texts:
        for article, word in re.findall(r"\b(an?) (?=([a-z']+))", text):
            vowel = word[0] in "aeiou" and not SOUNDS_LIKE_A_CONSONANT.match(word)
            assert (article == "an") == bool(vowel or SILENT_H.match(word)), text


def test_the_seed_decides():
    first, same, other = (S.open_sentences(50, Random(seed)) for seed in (3, 3, 4))
    assert first == same != other


def test_avoided_texts_are_not_returned():
    assert not any("the" in text for text in S.open_sentences(200, Random(5), lambda t: "the" in t))
    with pytest.raises(ValueError, match="0 of 1 sentences"):
        S.open_sentences(1, Random(6), lambda text: True)


@pytest.mark.parametrize("made, want", [
    (S.plural("city"), "cities"), (S.plural("child"), "children"), (S.plural("box"), "boxes"),
    (S.third("carry"), "carries"), (S.past("stop"), ("stopped", "stopped")), (S.ing("tie"), "tying"),
    (S.past("take"), ("took", "taken")), (S.ing("make"), "making"), (S.ordinal(30), "thirtieth"),
    (S.compared("big"), ("bigger", "biggest")), (S.compared("honest"), ("more honest", "most honest")),
])  # fmt: skip
def test_inflection(made, want):
    assert made == want
