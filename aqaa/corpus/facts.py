"""Facts a child knows, in words a recogniser knows; the words stand in curriculum.toml."""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

SCRIPT = tomllib.loads((Path(__file__).parent / "curriculum.toml").read_text(encoding="utf-8"))
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen").split()  # fmt: skip
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked: the wording's slots, the answer's words and their manner.

    `read_only` facts are never asked by voice in training; they appear in text alone."""

    slots: tuple  # ((name, words), …)
    answer: str
    manner: str = "normal"
    want: str = ""  # acoustic class that the question's sound must have: "fast", "low", …
    read_only: bool = False

    @property
    def key(self):
        return " ".join(value for _, value in self.slots) or self.want


def stable_hash(*parts):  # the same on every machine
    return int.from_bytes(hashlib.md5("|".join(parts).encode()).digest()[:6], "big")


def number(n):
    """English words of an integer 0..100, for example 35 -> "thirty five". Raises ValueError."""
    if not 0 <= n <= 100:
        raise ValueError(f"number() spells 0 to 100, not {n}")
    if n < 20 or n == 100:
        return UNITS[n] if n < 20 else "one hundred"
    tens, unit = divmod(n, 10)
    return f"{TENS[tens - 2]} {UNITS[unit]}" if unit else TENS[tens - 2]


def held_apart(parts):
    """([wordings, or words, of the training], [those never heard in training, marked by *])."""
    return ([part for part in parts if not part.startswith("*")],
            [part[1:].strip() for part in parts if part.startswith("*")])  # fmt: skip


def words(name):
    return SCRIPT["words"][name].split()


def phrases(name):
    return tuple(" ".join(phrase.split()) for phrase in SCRIPT["words"][name].split(","))


def pairs(name):
    return [phrase.split() for phrase in phrases(name)]


def pieces(text, manner):
    """[(words, manner), …] of a text whose manner may change: "a (fast) b" has two."""
    first, *rest = re.split(r" *\((\w+)\) *", text)
    return [(words, how) for words, how in [(first, manner), *zip(rest[1::2], rest[::2])] if words]
