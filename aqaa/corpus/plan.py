"""The plan of a corpus: every utterance to be spoken, its split, voice and seed, before any sound exists."""

import hashlib
import json
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from random import Random

from aqaa.corpus import curriculum
from aqaa.corpus import facts as F
from aqaa.corpus import intents as C
from aqaa.corpus import voices as V

HOLD_OUT = 20  # one answer in so many is kept from the tokenizers, the flow and HiFT: copy-synthesis is scored on it

RECIPE = 1  # raise it when the same plan would sound different
GENERIC, ANSWER_VOICE_GENERIC, DEV = 7000, 800, 200  # utterances at scale 1
CELLS = {  # evaluation: (utterances at scale 1, wording, voices)
    "seen_seen": (180, "seen", V.TRAINING),
    "seen_new": (180, "seen", V.EVALUATION),
    "new_seen": (180, "new", V.TRAINING),
    "new_new": (180, "new", V.EVALUATION),
    "slot_seen": (150, "slot", V.TRAINING),
    "read_only": (60, "read_only", V.TRAINING),
}


@dataclass
class Item:
    """One utterance. Fields from `phones` on are filled when it is spoken."""

    id: str
    split: str  # train | dev | eval
    cell: str  # of evaluation: wording_voice, slot_seen or read_only; "" elsewhere
    role: str  # question | generic | answer
    text: str
    voice: str
    seed: int
    category: str = ""
    intent: str = ""
    core: str = ""  # the wording with its slots unfilled
    slots: dict = field(default_factory=dict)
    want: str = ""  # acoustic class that the sound must have
    answer: str = ""  # text
    manner: str = ""  # of the answer
    answer_id: str = ""
    phones: list = field(default_factory=list)  # CMU phones of `text`, no pauses
    f0: float = 0.0  # Hz, median
    spread: float = 0.0  # semitones
    rate: float = 0.0  # syllables per second
    shard: int = -1
    offset: int = 0  # samples
    length: int = 0  # samples


PLANNED = [f.name for f in fields(Item)][: [f.name for f in fields(Item)].index("phones")]


def plan(scale=1.0, seed=0):
    """All Items of a corpus, the same for the same seed: answers, evaluation, then training in random order."""
    rng = Random(f"plan {seed}")
    answers, ids = _answers()
    spoken = answers if scale >= 1 else _some_answers(answers, scale, rng)
    items = spoken + _answer_voice_generic(_count(ANSWER_VOICE_GENERIC, scale), rng)
    for cell, (count, wording, pool) in CELLS.items():
        items += _evaluation(cell, _count(count, scale), wording, pool, ids, rng)
    items += _evaluation("", _count(DEV, scale), "seen", V.TRAINING, ids, rng)
    training = [item for intent in C.INTENTS.values() for item in _training(intent, scale, ids, rng)]
    training += _generic(_count(GENERIC, scale), rng)
    rng.shuffle(training)
    items += training
    rng = Random(f"later {seed}")  # its own: the plan before stays what it was
    later = [item for intent in C.INTENTS.values() for item in _training(intent, scale, ids, rng, later=True)]
    rng.shuffle(later)
    items += later
    if scale < 1:  # a miniature also speaks every answer that its training asks for
        asked = {item.answer_id for item in items if item.role == "question" and item.split == "train"}
        items = [item for item in answers if item.id in asked and item not in spoken] + items
    for number, item in enumerate(items):
        item.seed = int.from_bytes(hashlib.md5(f"{seed}|{number}|{item.text}".encode()).digest()[:6], "big")
        item.id = item.id or f"{item.role[0]}{number:06d}"
    return items


def plan_hash(items):
    lines = [json.dumps([getattr(item, name) for name in PLANNED]) for item in items]
    return hashlib.sha1("\n".join([str(RECIPE), *lines]).encode()).hexdigest()


def texts(items):
    """Question and answer pairs for text pre-training: what is asked in training, and facts that are only ever read.

    Returns a list of dicts (question, answer, manner, intent, category, read_only), without Voice Understanding,
    whose answers no text holds.
    """
    pairs = {}
    for item in items:
        if item.role == "question" and item.split == "train" and not item.want:
            pairs[item.text] = (item.answer, item.manner, item.intent, item.category, False)
    rng = Random("texts")
    for intent in C.INTENTS.values():
        for fact in intent.facts:
            for _ in range(40 if fact.read_only else 0):
                text = C.wording(rng.choice(intent.cores), fact, rng)
                pairs[text] = (fact.answer, fact.manner, intent.name, intent.category, True)
    names = ("answer", "manner", "intent", "category", "read_only")
    return [dict(question=text, **dict(zip(names, pair, strict=True))) for text, pair in pairs.items()]


def _count(n, scale):
    return max(4, round(n * scale))


def _answers():
    """Items of all distinct (answer, manner), and their ids. Answers of read-only facts are for evaluation."""
    seen = {}
    for intent in C.INTENTS.values():
        for fact in intent.facts:
            item = seen.get((fact.answer, fact.manner))
            if item is None:
                item = seen[fact.answer, fact.manner] = Item(
                    f"a{len(seen):04d}", "eval", "", "answer", fact.answer, V.ANSWER_VOICE, 0, intent.category,
                    intent.name, manner=fact.manner, answer=fact.answer,
                )
                item.answer_id = item.id
            if not fact.read_only:
                item.split = "train"
    return list(seen.values()), {key: item.id for key, item in seen.items()}


def _some_answers(answers, scale, rng):
    """A miniature speaks a part of the answers, a few of each manner."""
    chosen = []
    for manner in V.MANNERS:
        same = [item for item in answers if item.manner == manner]
        chosen += rng.sample(same, max(2, round(len(same) * scale)))
    return chosen


def _question(split, cell, intent, core, fact, pool, ids, rng):
    voice = V.pick(_Choice(rng), pool, fact.want)
    return Item(
        "", split, cell, "question", C.wording(core, fact, rng), voice, 0, intent.category, intent.name, core,
        dict(fact.slots), fact.want, fact.answer, fact.manner, ids[fact.answer, fact.manner],
    )


class _Choice:
    """numpy's `choice` with the standard library's generator, whose stream never changes between releases."""

    def __init__(self, rng):
        self.rng = rng

    def choice(self, pool, p=None):
        return self.rng.choices(list(pool), p)[0]


def _training(intent, scale, ids, rng, later=False):
    """Spoken questions of one intent, every fact as often as every other, and its (later) wordings in turn."""
    known = [fact for fact in intent.facts if not fact.read_only]
    wordings = intent.later if later else intent.cores
    turns, count = Counter(), _count(intent.later_renders if later else intent.renders, scale) if wordings else 0
    order = [fact for _ in range(count // len(known) + 1) for fact in rng.sample(known, len(known))][:count]
    allowed = {core: {fact.key for fact in intent.allowed(core)} for core in wordings}
    for fact in order:
        cores = [core for core in wordings if fact.key in allowed[core]]
        core = cores[(turns[fact.key] + C.stable_hash(fact.key)) % len(cores)]
        turns[fact.key] += 1
        yield _question("train", "", intent, core, fact, V.TRAINING, ids, rng)


def _evaluation(cell, count, wording, pool, ids, rng):
    """`count` questions, intents in turn, of a kind of wording: seen, new, slot (seen, but not with this fact), …"""
    stock = {}
    for intent in C.INTENTS.values():
        pairs = [
            (core, fact)
            for core in (intent.held_out if wording == "new" else intent.cores)
            for fact in _askable(intent, core, wording)
        ]
        if pairs:
            stock[intent.name] = rng.sample(pairs, len(pairs))
    order = [C.INTENTS[name] for _ in range(count) for name in stock]
    items = []
    for i, intent in enumerate(order[:count]):
        pairs = stock[intent.name]
        core, fact = pairs[i // len(stock) % len(pairs)]
        items.append(_question("eval" if cell else "dev", cell, intent, core, fact, pool, ids, rng))
    return items


def _askable(intent, core, wording):
    if wording == "slot":
        return intent.closed(core)
    if wording == "read_only":
        return [fact for fact in intent.facts if fact.read_only]
    return intent.allowed(core)


# ---- sentences for recognition, without questions or answers -----------------------------------------------


def vocabulary():
    """Every word of questions and answers, lone letters aside; words of read-only facts come three times."""
    words = Counter()
    for intent in C.INTENTS.values():
        for core in intent.cores + intent.held_out:
            words.update({w: 1 for w in core.split() if "{" not in w})
        for fact in intent.facts:
            said = " ".join(value for _, value in fact.slots).split() + fact.answer.split()
            words.update({w: 3 if fact.read_only and intent.category == curriculum.LANGUAGE else 1 for w in said})
    for part in F.ASKING + F.ORDERING + F.CLOSERS:
        words.update(part.split())
    return {w: 3 if words[w] and w in _read_only_words() else 1 for w in sorted(words) if len(w) > 1 or w in "ai"}


def _read_only_words():
    facts = [fact for intent in C.INTENTS.values() if intent.category == curriculum.LANGUAGE for fact in intent.facts]
    return {w for fact in facts if fact.read_only for w in fact.key.split() + fact.answer.split()[-1:]}


def sentences(count, rng):
    """`count` sentences: word strings that use all words evenly, scrambled wordings, sentences of a small grammar."""
    weights, used, bare, patterns = vocabulary(), Counter(), C.bare_questions(), C.held_out_patterns()
    pool = sorted(weights)
    cores = [core for intent in C.INTENTS.values() for core in intent.cores if "{" in core]
    made = []

    def word():
        return min(rng.sample(pool, 8), key=lambda w: used[w] / weights[w])

    def string():
        return " ".join(word() for _ in range(rng.randint(3, 7)))

    def scrambled():
        core = rng.choice(cores)
        return core.format(**{name: " ".join(word() for _ in range(rng.randint(1, 2))) for name in "abcwvx"})

    def grammar():
        subject = rng.choice((rng.choice(F.SUBJECTS), f"the {word()}"))
        parts = [subject, rng.choice(F.VERBS), rng.choice((rng.choice(F.OBJECTS), f"the {word()} {word()}"))]
        return " ".join(parts + ([rng.choice(F.PLACES)] if rng.random() < 0.5 else []))

    while len(made) < count:
        text = rng.choices((string, scrambled, grammar), (4, 3, 3))[0]()
        if text in bare or any(pattern.search(text) for pattern in patterns):
            continue
        used.update(text.split())
        made.append(text)
    return made


def _generic(count, rng):
    made = sentences(count, rng)
    return [Item("", "train", "", "generic", text, V.pick(_Choice(rng), V.TRAINING), 0) for text in made]


def _answer_voice_generic(count, rng):
    made = sentences(count, rng)
    manners = [rng.choice(list(V.MANNERS)) for _ in made]
    pairs = zip(made, manners, strict=True)
    return [Item("", "train", "", "generic", text, V.ANSWER_VOICE, 0, manner=manner) for text, manner in pairs]


def as_line(item):
    return json.dumps(asdict(item), separators=(",", ":"))


def held_out(item):
    """Whether an answer is kept from the tokenizers, the flow and HiFT (a stable one in HOLD_OUT)."""
    return item.role == "answer" and zlib.crc32(item.id.encode()) % HOLD_OUT == 0
