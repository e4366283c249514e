"""The small form in which the mini's curriculum is written, and what can be asked of it.

A wording is an opener, a core and a closer. Whole cores are held out (never heard in any form), a hash holds out some
facts of every other core, and some facts are only ever read. `curriculum` registers the intents.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache

from aqaa.corpus import facts as F

ASKS = set("what how which is am do does who high happy fast a one after before".split())  # else a core orders
INTENTS = {}


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked: slots of the wording, the answer's words and the manner they are said in.

    `want` names an acoustic class that the question's sound itself must have ("fast", "low", …), or is empty.
    `read_only` facts are never asked by voice in training; they appear in text alone.
    """

    slots: tuple  # ((name, words), …)
    answer: str
    manner: str = "normal"
    want: str = ""
    read_only: bool = False

    @property
    def key(self):
        return " ".join(value for _, value in self.slots) or self.want


@dataclass(frozen=True)
class Intent:
    name: str
    category: str
    cores: tuple  # wordings heard in training, with {slot} marks
    held_out: tuple  # wordings never heard in training
    facts: tuple
    renders: int  # spoken questions in training at scale 1
    hold_one_in: int = 8  # one fact in so many is never asked in a given core; 0: none
    later: tuple = ()  # wordings that joined when the plan stood: asked after all the rest
    later_renders: int = 0

    def allowed(self, core):
        """Facts that training may ask in this core (a held-out core gets all)."""
        closed = set() if core in self.held_out else {fact.key for fact in self.closed(core)}
        return [fact for fact in self.facts if not fact.read_only and fact.key not in closed]

    def closed(self, core):
        """Facts never asked in this training core, though asked in others."""
        if not self.hold_one_in:
            return []
        known = [fact for fact in self.facts if not fact.read_only]
        return [fact for fact in known if core in _closed(self.name, self.cores, fact.key, self.hold_one_in)]


def stable_hash(*parts):
    return int.from_bytes(hashlib.md5("|".join(parts).encode()).digest()[:6], "big")


@cache  # every core asks again
def _closed(name, cores, key, one_in):
    """The training cores of an intent in which the fact `key` is never asked: some, but never all of them."""
    closed = frozenset(core for core in cores if stable_hash(name, core, key) % one_in == 0)
    return frozenset() if len(closed) == len(cores) else closed


def register(name, category, renders, wordings, facts, hold_one_in=8, later="", later_renders=0):
    """Add an intent. `wordings` (and `later`) is one string, a core a line; a line starting with * is held out."""
    lines, joined = ([line.strip() for line in text.strip().splitlines()] for text in (wordings, later))
    cores = tuple(line for line in lines if not line.startswith("*"))
    held_out = tuple(line[1:].strip() for line in lines if line.startswith("*"))
    if name in INTENTS:
        raise ValueError(f"intent {name!r} is registered twice; choose another name")
    facts, joined = tuple(facts), tuple(joined)
    INTENTS[name] = Intent(name, category, cores, held_out, facts, renders, hold_one_in, joined, later_renders)


def fill(core, fact):
    """The core with the fact's words in its slots."""
    return core.format(**dict(fact.slots))


def openers(core):
    return F.ASKING if core.startswith("{") or core.split()[0] in ASKS else F.ORDERING


def closers(core):
    return ("",) if core.endswith("{x}") else F.CLOSERS  # after words to be repeated a closer would be ambiguous


def wording(core, fact, rng):
    """One question text: about half of the cores stand bare, the others get an opener, a closer or both."""
    opener = rng.choice(openers(core)) if rng.random() < 0.6 else ""
    closer = rng.choice(closers(core)) if rng.random() < 0.3 else ""
    text = " ".join(part for part in (opener, fill(core, fact), closer) if part)
    return re.sub(r"\b(please|now) (.*) \1$", r"\1 \2", text)


def core_pattern(core):
    """A regular expression that finds this core in a text, whatever its slots hold."""
    escaped = re.escape(core).replace(r"\ ", " ")
    return re.compile(r"\b" + re.sub(r"\\{\w+\\}", r"[a-z' ]+?", escaped) + r"(?= |$)")


def held_out_patterns():
    return [core_pattern(core) for intent in INTENTS.values() for core in intent.held_out]


def bare_questions():
    """Every core with every fact, bare: sentences for recognition must not be one of these."""
    return {
        fill(core, fact)
        for intent in INTENTS.values()
        for core in intent.cores + intent.held_out
        for fact in intent.facts
    }


def said_as(text):
    """What an engine is given for a text: a lone letter a inside a spelling is said as its name."""
    head, mark, letters = text.partition(" is spelled ")
    return f"{head}{mark}{re.sub(r'a(?= |$)', 'ay', letters)}" if mark and " " in letters else text
