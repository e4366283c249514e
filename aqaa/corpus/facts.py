"""Words and wordings of the curriculum, from curriculum.toml: facts a child knows, in words a recogniser knows."""

import tomllib
from pathlib import Path

SCRIPT = tomllib.loads((Path(__file__).parent / "curriculum.toml").read_text(encoding="utf-8"))
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number(n):
    """English words of an integer 0..100, for example 35 -> "thirty five"."""
    if not 0 <= n <= 100:
        raise ValueError(f"number() spells 0 to 100, not {n}")
    if n == 100:
        return "one hundred"
    if n < 20:
        return _UNITS[n]
    tens, unit = divmod(n, 10)
    return _TENS[tens - 2] + (f" {_UNITS[unit]}" if unit else "")


def _words(name):
    return SCRIPT["words"][name].split()


def _phrases(name):
    return tuple(" ".join(phrase.split()) for phrase in SCRIPT["words"][name].split(","))


def _pairs(name):
    return tuple(tuple(phrase.split()) for phrase in _phrases(name))


DAYS, MONTHS, SPELLED, ECHOED = map(_words, ("DAYS", "MONTHS", "SPELLED", "ECHOED"))
OPPOSITES, PLURALS, CAPITALS, COLORS, SOUNDS = map(_pairs, ("OPPOSITES", "PLURALS", "CAPITALS", "COLORS", "SOUNDS"))
GROUPS = {name: words.split() for name, words in SCRIPT["words"]["GROUPS"].items()}
SENTENCES = _phrases("SENTENCES")
ASKING, ORDERING, CLOSERS = map(_phrases, ("ASKING", "ORDERING", "CLOSERS"))
SUBJECTS, VERBS, OBJECTS, PLACES = map(_phrases, ("SUBJECTS", "VERBS", "OBJECTS", "PLACES"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
