"""Sing, the ninth category of StepEval-Audio-360: scales, beginnings of tunes, a word on three
notes, three notes that are named. sing.toml has the wordings and the counts.

An answer's text is its score, "(do) doe (re) ray (mi) me": each word stands behind its note, as the
words of a changing manner stand behind theirs, and is sung in a slot of the same length."""

import tomllib
from itertools import permutations
from pathlib import Path

from aqaa.corpus.facts import Fact
from aqaa.tokenizers.text import NOTES

SING = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NAMES = SING["names"]  # of the notes, as they are said


def sung(notes, words=None, **slots):
    """The Fact of some notes, and of a word for each: by itself their names."""
    words = words or [NAMES[note] for note in notes]
    (first, word), *rest = zip(notes, words, strict=True)
    return Fact(tuple(slots.items()), " ".join([word, *(f"({n}) {w}" for n, w in rest)]), first)


def facts():
    """{intent: [Fact, …]}."""
    tunes = {x: notes.split() for x, notes in SING["tunes"].items()}
    ways = {d: notes.split() for d, notes in SING["ways"].items()}
    return {
        "scale_up": [sung(NOTES)],
        "scale_down": [sung(NOTES[::-1])],
        "tune": [sung(notes, ["la"] * len(notes), x=x) for x, notes in tunes.items()],
        "word": [sung(notes, [w] * len(notes), w=w, d=d)
                 for w in SING["words"]["sung"].split() for d, notes in ways.items()],
        "notes": [sung(three, **dict(zip("abc", map(NAMES.get, three), strict=True)))
                  for three in permutations(NOTES[:-1], 3)],
    }  # fmt: skip
