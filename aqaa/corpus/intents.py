"""What can be asked, and in which wordings: the intents of curriculum.toml with their facts.

A wording is an opener, a core and a closer. Whole cores are held out (never heard in any form), a
hash holds out some facts of every other core, and some facts are only ever read."""

import re
from dataclasses import dataclass
from functools import cache

from aqaa.corpus.curriculum import FACTS
from aqaa.corpus.facts import SCRIPT, held_apart, phrases, stable_hash
from aqaa.tokenizers.text import normalise

ASKS = set("what how which is am do does who high happy fast a one after before".split())
ASKING, ORDERING, CLOSERS = map(phrases, ("ASKING", "ORDERING", "CLOSERS"))


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
    dev: tuple = ()  # wordings of the development split alone
    more: tuple = ()  # wordings that joined last (play.later_plan)

    def allowed(self, core):
        """Facts that training may ask in this core (a held-out core gets all)."""
        closed = set() if core in self.held_out else {fact.key for fact in self.closed(core)}
        return [fact for fact in self.known() if fact.key not in closed]

    def closed(self, core):
        """Facts never asked in this training core, though asked in others."""
        options = (self.name, self.cores, self.hold_one_in)
        return [fact for fact in self.known() if core in _closed(fact.key, *options)]

    def known(self):  # facts that are asked by voice in training
        return [fact for fact in self.facts if not fact.read_only]


@cache  # every core asks again
def _closed(key, name, cores, one_in):
    """The training cores of an intent in which the fact `key` is never asked: some, not all."""
    closed = [core for core in cores if one_in and stable_hash(name, core, key) % one_in == 0]
    return () if len(closed) == len(cores) else closed


def _intent(name, entry):
    """The intent of an entry of curriculum.toml: a core a line, * marks those that are held out."""
    entry = {**SCRIPT["like"].get(entry.get("like"), {}), **entry}

    def lines(key):
        text = entry.get(key, "")
        for mark, words in entry.get("marks", {}).items():
            text = text.replace(f"<{mark}>", words)
        return tuple(line.strip() for line in text.strip().splitlines())

    cores, held_out = held_apart(lines("wordings"))
    options = "category", "renders", "hold_one_in", "later_renders"
    return Intent(
        name, facts=FACTS[name], later=lines("later"), dev=lines("dev"), more=lines("more"),
        cores=tuple(cores), held_out=tuple(held_out),
        **{key: entry[key] for key in options if key in entry},
    )  # fmt: skip


INTENTS = {name: _intent(name, entry) for name, entry in SCRIPT["intents"].items()}


def fill(core, fact):
    return core.format(**dict(fact.slots))


def wording(core, fact, rng):
    """One question text: about half of the cores stand bare, others get an opener or a closer."""
    asks = core.startswith("{") or core.split()[0] in ASKS
    closers = ("",) if core.endswith("{x}") else CLOSERS  # behind words to be repeated: ambiguous
    opener = rng.choice(ASKING if asks else ORDERING) if rng.random() < 0.6 else ""
    closer = rng.choice(closers) if rng.random() < 0.3 else ""
    text = " ".join(part for part in (opener, fill(core, fact), closer) if part)
    return re.sub(r"\b(please|now) (.*) \1$", r"\1 \2", text)


def held_out_patterns():
    """Regular expressions that find the held-out cores in a text, whatever their slots hold."""
    cores = [re.escape(core) for intent in INTENTS.values() for core in intent.held_out]
    texts = [re.sub(r"\\{\w+\\}", "[a-z' ]+?", core.replace(r"\ ", " ")) for core in cores]
    return [re.compile(rf"\b{text}(?= |$)") for text in texts]


def bare_questions():
    """Every core with every fact, bare: sentences for recognition must not be one of these."""
    return {fill(core, fact) for intent in INTENTS.values()
            for core in intent.cores + intent.held_out for fact in intent.facts}  # fmt: skip


def said_as(text):
    """What an engine is given for a text: no manners, and a lone a in a spelling as its name."""
    text = normalise(text)
    head, mark, letters = text.partition(" is spelled ")
    return f"{head}{mark}{re.sub(r'a(?= |$)', 'ay', letters)}" if mark and " " in letters else text
