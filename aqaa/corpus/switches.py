"""A manner that changes in the middle: "say the first part slowly and the rest quickly".

The answer's text says where, "the cat sleeps (fast) on the kitchen table", behind the manner that
it begins with; each part is spoken in its own. [switch] of play.toml has wordings and counts."""

from random import Random

from aqaa.corpus import plan as P
from aqaa.corpus import wider
from aqaa.corpus.curriculum import FOLLOW, SENTENCES
from aqaa.corpus.facts import SCRIPT, Fact, stable_hash
from aqaa.corpus.voices import ANSWER_VOICE

PAIRS = tuple(pair for one in ("slow fast", "high low", "loud soft", "happy sad")
              for pair in (one.split(), one.split()[::-1]))  # fmt: skip
HOLD_ONE_IN = 8  # of all sentences with a pair of manners one in so many is never asked in training
NAME = "switch"


def parts_of(text):
    """The first half of the words of a sentence, and the rest."""
    words = text.split()
    half = (len(words) + 1) // 2
    return " ".join(words[:half]), " ".join(words[half:])


def drills(count, scale=1.0, seed=0):
    """Items that the answer voice alone says, no answers to any question: sentences whose manner
    changes at any word, so that the change is learnt and not the sentence."""
    rng, items = Random(f"drills {seed}"), []
    for place, text in enumerate(P.sentences(P.scaled(count, scale), rng)):
        words, (a, b) = text.split(), rng.choice(PAIRS)
        at = rng.randint(1, len(words) - 1)
        said = " ".join([*words[:at], f"({b})", *words[at:]])
        items.append(P.Item(f"d{place:04d}", "train", "", "generic", said, ANSWER_VOICE, manner=a))
    return items


def facts():
    """Facts of every sentence (slot x) in every pair of manners (slots a and b)."""
    return [Fact((("x", x), ("a", a), ("b", b)), "{0} ({2}) {1}".format(*parts_of(x), b), a)
            for x in SENTENCES for a, b in PAIRS]  # fmt: skip


def apart(fact):
    """Whether a sentence in a pair of manners is kept from training."""
    return stable_hash(NAME, *fact.key.split()) % HOLD_ONE_IN == 0


def plan(entry, scale=1.0, seed=0):
    """Items: evaluation, development, shuffled training and, last, the answers. entry: [switch] of
    play.toml. A miniature speaks only the answers that it needs."""
    rng, known, kept = Random(f"{NAME} {seed}"), [], []
    for place, fact in enumerate(facts()):
        (kept if apart(fact) else known).append((f"s{place:04d}", fact))
    cores = wider.lines_of(entry["wordings"])

    def asked(count, who, split, cell=""):
        for _ in range(P.scaled(count, scale)):
            new = split == "eval"
            name, fact = rng.choice(kept if new else known)
            slots = dict(fact.slots)
            x, *manners = slots.values()
            a, b = (SCRIPT["intents"][f"say_{manner}"]["marks"]["adverb"] for manner in manners)
            core, voice = rng.choice(cores[new]), wider.voice_of(rng, wider.POOLS[who])
            p, q = parts_of(x)
            yield P.Item(
                "", split, cell, "question", core.format(x=x, p=p, q=q, a=a, b=b), voice, 0, FOLLOW,
                NAME, core, slots, "", fact.answer, fact.manner, name,
            )  # fmt: skip

    items, training = [], []
    for cell, count in entry["cells"].items():
        items += asked(count, cell.removeprefix(f"{NAME}_"), "eval", cell)
    items += asked(entry["dev"], "dev", "dev")
    for who, count in entry["counts"].items():
        training += asked(count, who, "train")
    rng.shuffle(training)
    items += training
    wanted = {item.answer_id for item in items}
    for split, rows in (("train", known), ("eval", kept)):
        items += [P.answer_item(name, split, fact, NAME, FOLLOW)
                  for name, fact in rows if scale >= 1 or name in wanted]  # fmt: skip
    return items
