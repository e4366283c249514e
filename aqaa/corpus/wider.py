"""The wider part of the curriculum: known questions in natural voices, questions outside the mini's
world, second questions that need the first, and sound that nobody could understand.

A second question is an Item of role "follow"; its slots hold what was said before: "asked",
"answered" (with its manner). Where it is no training, the Item before it, of role "first", is the
first question, spoken by the same voice. `wider.toml` has the wordings and the counts."""

import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

from aqaa.corpus import intents as C
from aqaa.corpus import plan as P
from aqaa.corpus import voices as V
from aqaa.corpus.curriculum import VOICE
from aqaa.corpus.facts import SCRIPT, held_apart, number, stable_hash
from aqaa.corpus.sentences import filled, sentence
from aqaa.tokenizers.text import MANNERS, tagged

WIDER = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
HONEST = OUTSIDE, UNHEARD = tuple(WIDER["answers"].values())  # answers: not known, not heard
NOISES = tuple(f"noise:{kind}" for kind in "hiss hum tones reversed crowd muffled".split())
POOLS = {  # voices by the names that counts and cells have for them
    "synthesizers": V.TRAINING, "hibari": V.NATURAL[:1], "kokoro": V.NATURAL[1:], "noise": NOISES,
    "seen": V.TRAINING, "natural": V.NATURAL_HELD_OUT, "dev": V.NATURAL + V.TRAINING[::4],
}  # fmt: skip
DEV = 360  # development questions in wordings, and half of them in voices, of their own
KINDS = {  # {kind: (the kind whose questions these are, the list of wordings they are asked in)}
    "new": ("known", "held_out"), "dev": ("known", "dev"), "known_more": ("known", "more"),
    "follow_more": ("follow", "more"), "follow_turns": ("follow", "turns"),
}  # fmt: skip
COPIES = 2  # of a training utterance, from bent features (training/augment.py)
HONESTY = "Honesty"  # the category of what is outside and of what is not understood


def plan(scale=1.0, seed=0):
    """Items of the wider part: its answers, evaluation and development, shuffled training. Answers
    to known questions are those of `plan.plan`, by their ids."""
    rng = Random(f"wider {seed}")
    ids, items = P.answer_ids(), []
    for place, text in enumerate(HONEST):
        name = f"b{place:04d}"
        ids[text, "normal"] = name
        items.append(P.Item(name, "train", "", "answer", text, V.ANSWER_VOICE, category=HONESTY,
                            manner="normal", answer=text, answer_id=name))  # fmt: skip
    make = Maker(rng, ids)
    for cell, count in WIDER["cells"].items():
        kind, _, who = cell.partition("_")
        items += make.all(kind, P.scaled(count, scale), POOLS[who or "noise"], "eval", cell)
    for kind, count in (("known", 120), ("outside", 60), ("follow", 60)):
        pool = V.NATURAL if kind == "known" else POOLS["dev"]
        items += make.all(kind, P.scaled(count, scale), pool, "dev")
    training = []
    for kind, counts in WIDER["counts"].items():
        for who, count in counts.items():
            training += make.all(kind, P.scaled(count, scale), POOLS[who], "train")
    rng.shuffle(training)
    items += training
    pool = V.DEVELOPMENT + V.NATURAL * (len(V.DEVELOPMENT) // 2)  # as many of either kind
    items += make.all("dev", P.scaled(DEV, scale), pool, "dev")  # last: ids never move
    return numbered(items, "w", "wider", seed)


def turns_plan(scale=1.0, seed=0):
    """Second questions in many more wordings, for training and, in others, for development."""
    rng, counts, items = Random(f"turns {seed}"), WIDER["turns"], []
    make = Maker(rng, P.answer_ids())
    for who in ("synthesizers", "hibari", "kokoro"):
        items += make.all("follow_turns", P.scaled(counts[who], scale), POOLS[who], "train")
    rng.shuffle(items)
    items += make.all("follow_turns", P.scaled(counts["dev"], scale), POOLS["dev"], "dev")
    return numbered(items, "t", "turns", seed)


def turns_before(item):
    """(role, text) pairs of what was said before a second question; none of any other Item."""
    if item.role != "follow":
        return []
    return [("user", item.slots["asked"]), ("assistant", item.slots["answered"])]


def voice_of(rng, pool):
    """A voice of a pool: training voices by their shares, others evenly."""
    return V.pick(P.Choice(rng), pool) if pool is V.TRAINING else rng.choice(pool)


def numbered(items, letter, part, seed):
    """The Items with ids, where they have none, and seeds: by their places in a part's plan."""
    for place, item in enumerate(items):
        item.id = item.id or f"{letter}{place:06d}"
        item.seed = stable_hash(str(seed), part, str(place), item.text)
    return items


def unknown(planned, scale=1.0, seed=0):
    """Open sentences (`plan.open_plan`) as questions for training: whatever they say, the mini does
    not know it. Those that development or evaluation, among `planned`, also say are left out."""
    apart = {item.text for item in planned if item.split != "train"}
    (name,) = {item.answer_id for item in planned if item.answer == OUTSIDE}
    said = {"role": "question", "category": HONESTY, "intent": "outside_sentence",
            "manner": "normal", "answer": OUTSIDE, "answer_id": name}  # fmt: skip
    return [replace(x, **said) for x in _opened(scale, seed) if x.text not in apart]


@cache
def _opened(scale, seed):
    """The open sentences, planned once: it takes seconds, and each book of a run asks for them."""
    return tuple(P.open_plan(scale, seed))


def is_copied(item):
    """Whether the codes of bent copies of an Item are kept, too: of what is asked for training all
    that joined, but what joined last only if it is for a song, and one in ten of the others."""
    asked = item.split == "train" and item.role in ("question", "follow")
    if item.part in ("later", "turns"):  # copies need too much room, bent voices another label
        return asked and item.category == "Sing"
    return asked and (item.part in ("wider", "play") or stable_hash(item.id) % 10 == 0)


# ---- texts of wider.toml ----


def lines_of(text):
    """([wordings of the training], [those held out]) of a text with a wording a line."""
    return held_apart([line.strip() for line in text.strip().splitlines()])


@cache
def combined(text):
    """([wordings of the training], [of development: one in ten]) of lines whose parts between
    (one|another|) are combined."""
    made = set()
    for line in text.strip().splitlines():
        parts = [part.split("|") for part in re.split("[()]", line)]  # the ways to say each part
        made |= {" ".join("".join(one).split()) for one in product(*parts)}
    return [sorted(core for core in made if (stable_hash(core) % 10 == 0) == apart)
            for apart in (False, True)]  # fmt: skip


def words_of(text):
    """The same of words between blanks, or of phrases between commas."""
    parts = text.split(",") if "," in text else text.split()
    return held_apart([" ".join(part.split()) for part in parts])


@dataclass
class _Asked:
    """One question that was drawn, before it has a voice."""

    text: str
    answer: str
    manner: str
    intent: str
    category: str
    core: str = ""
    slots: dict = field(default_factory=dict)


class Maker:
    """Draws questions of each kind; what was drawn is counted, so that all is used evenly."""

    def __init__(self, rng, ids):
        self.rng, self.ids, self.drawn = rng, ids, Counter()
        self.known = C.bare_questions()
        self.patterns = C.held_out_patterns()
        told = [fact for intent in C.INTENTS.values() for fact in intent.known()]
        self.told = {(fact.answer, fact.manner) for fact in told}

    def all(self, kind, count, pool, split, cell=""):
        """`count` Items of a kind. Evaluation hears held-out wordings and words, except "known"."""
        name, *wordings = KINDS.get(kind, (kind,))
        made, new = [], split == "eval" or (kind, split) == ("follow_turns", "dev")
        for turn in range(count):
            voice = voice_of(self.rng, pool)
            one = getattr(self, f"_{name}")(turn, new, *wordings)
            role = "follow" if name == "follow" else "question"
            if role == "follow" and split != "train":  # the first question is spoken as well
                made.append(P.Item("", split, "", "first", one.slots["asked"], voice))
            made.append(P.Item(
                "", split, cell, role, one.text, voice, 0, one.category, one.intent, one.core,
                one.slots, "", one.answer, one.manner, self.ids[one.answer, one.manner],
            ))  # fmt: skip
        return made

    def _known(self, turn, held_out, wordings="cores"):
        stock = [one for one in C.INTENTS.values() if one.category != VOICE]
        intent = stock[turn % len(stock)]
        core = self.rng.choice(getattr(intent, wordings))
        fact = self.rng.choice(intent.allowed(core))
        text = C.fill(core, fact) if wordings == "more" else C.wording(core, fact, self.rng)
        return _Asked(text, fact.answer, fact.manner, intent.name, intent.category, core,
                      dict(fact.slots))  # fmt: skip

    def _outside(self, turn, held_out):  # each of the three kinds in turn
        return (self._open, self._world, self._near)[turn % 3](turn, held_out)

    def _refused(self, text, kind, core=""):
        return _Asked(text, OUTSIDE, "normal", f"outside_{kind}", HONESTY, core)

    def _open(self, turn, held_out):
        return self._refused(self.sentence(), "open")

    def _world(self, turn, held_out):
        core = self.rng.choice(lines_of(WIDER["outside"]["wordings"])[held_out])
        text = filled(core, self.rng, self.drawn)
        if self.rng.random() < 0.25:
            text = f"{self.rng.choice(C.ASKING[1:])} {text}"
        return self._refused(text, "world", core)

    def _near(self, turn, held_out):
        """A known wording about what is not known."""
        words = WIDER["outside"]["near"]
        intent = C.INTENTS[self.rng.choice(sorted(words))]
        slot = self.rng.choice(words_of(words[intent.name])[held_out])
        names = dict(intent.facts[0].slots)
        values = dict(zip(names, slot.split("|"), strict=True))
        core = self.rng.choice(intent.cores)
        return self._refused(core.format(**values), "near", core)

    def _unheard(self, turn, held_out):
        return _Asked(self.sentence(), UNHEARD, "normal", "unheard", HONESTY)

    def sentence(self):
        """An open sentence that is no question of the curriculum and was not drawn before."""
        while True:
            text = sentence(self.rng, self.drawn)
            if text not in self.known and not any(one.search(text) for one in self.patterns):
                self.known.add(text)
                return text

    def _follow(self, turn, held_out, wordings="wordings"):
        """A second question behind a first one; draws until there is a known answer."""
        kinds = sorted(WIDER["follow"])
        if wordings == "turns":
            kinds += ["again"] * (WIDER["turns"]["again"] - 1)
        kind = kinds[turn % len(kinds)]
        entry = WIDER["follow"][kind]
        cores = (combined if wordings == "turns" else lines_of)(entry[wordings])[held_out]
        if wordings == "turns":  # parts may add up to a wording that evaluation hears
            heard = lines_of(entry["wordings"])[True]
            cores = [core for core in cores if core not in heard]
        names = entry.get("intents", " ".join(C.INTENTS)).split()
        while True:
            intent = C.INTENTS[self.rng.choice(names)]
            first = self.rng.choice(intent.known())
            core = self.rng.choice(cores)
            found = self._second(kind, intent, first, core)
            if found and intent.category != VOICE:
                break
        text, (answer, manner) = found
        asked = C.wording(self.rng.choice(intent.cores), first, self.rng)
        slots = {"asked": asked, "answered": tagged(first.answer, first.manner)}
        return _Asked(text, answer, manner, f"follow_{kind}", intent.category, core, slots)

    def _second(self, kind, intent, first, core):
        """(text, (answer, manner)) of a second question, or None where it has no known answer."""
        where = intent.name.rpartition("_")[2]
        if kind in ("other", "other_place"):
            fact = self.rng.choice(intent.known())
            if fact is first:
                return None
            return core.format(w=fact.key, where=where), (fact.answer, fact.manner)
        if kind == "further":
            last = first.answer.split(" is ")[-1]
            fact = next((one for one in intent.known() if one.key == last), None)
            return fact and (core.format(where=where), (fact.answer, fact.manner))
        if kind in ("plus", "minus", "times"):
            result, b = first.answer.split(" is equal to ")[-1], number(self.rng.randint(1, 10))
            name = {"plus": "sum", "minus": "difference", "times": "product"}[kind]
            wanted = f"{result} {b}"
            fact = next((one for one in C.INTENTS[name].known() if one.key == wanted), None)
            return fact and (core.format(b=b), (fact.answer, fact.manner))
        if kind == "again":
            return core, (first.answer, first.manner)
        manner = self.rng.choice(MANNERS)
        answer = first.answer, manner
        if answer not in self.told or manner == first.manner:
            return None
        return core.format(**SCRIPT["intents"][f"say_{manner}"]["marks"]), answer
