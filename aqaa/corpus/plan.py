"""The plan of a corpus: every utterance to be spoken, its split, voice and seed."""

import hashlib
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field, fields
from random import Random

from aqaa.corpus import intents as C
from aqaa.corpus import voices as V
from aqaa.corpus.curriculum import LANGUAGE
from aqaa.corpus.facts import phrases, stable_hash
from aqaa.corpus.sentences import open_sentences

HOLD_OUT = 20  # one answer in so many is kept from the tokenizers and the vocoder, for tests
RECIPE = 2  # raise it when the same plan would sound different
OPEN = {"natural": {"hibari:heart": 10_000, "kokoro:mix": 6_000}, "synthesizers": 4_000}
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
    role: str  # question | generic | answer | open | people (a recording)
    text: str
    voice: str
    seed: int = 0
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
    part: str = ""  # of the corpus, known to its reader; like `source` not stored
    source: str = ""  # the file of a recording, known to its planner

    @property
    def is_voiced(self):
        """Whether the vocoder learns from it: the answer voice, which also says plain sentences."""
        return self.voice == V.ANSWER_VOICE and self.role in ("answer", "generic")


NAMES = [field.name for field in fields(Item)]
PLANNED, STORED = NAMES[: NAMES.index("phones")], NAMES[: NAMES.index("part")]


def plan(scale=1.0, seed=0):
    """All Items of a corpus, the same for the same seed: answers, evaluation, shuffled training."""
    rng = Random(f"plan {seed}")
    answers, ids = answer_items(), answer_ids()
    spoken = answers if scale >= 1 else []
    for manner in V.MANNERS if scale < 1 else ():  # a miniature speaks a few of each manner
        same = [item for item in answers if item.manner == manner]
        spoken += rng.sample(same, max(2, round(len(same) * scale)))
    items = spoken + _answer_voice_generic(scaled(ANSWER_VOICE_GENERIC, scale), rng)
    for cell, (count, wording, pool) in CELLS.items():
        items += _evaluation(cell, scaled(count, scale), wording, pool, ids, rng)
    items += _evaluation("", scaled(DEV, scale), "seen", V.TRAINING, ids, rng)
    training = _training(scale, ids, rng)
    training += [Item("", "train", "", "generic", text, V.pick(Choice(rng), V.TRAINING))
                 for text in sentences(scaled(GENERIC, scale), rng)]  # fmt: skip
    rng.shuffle(training)
    rng = Random(f"later {seed}")  # its own: the plan before stays what it was
    later = _training(scale, ids, rng, later=True)
    rng.shuffle(later)
    items += training + later
    if scale < 1:  # it also speaks every answer that its training asks for
        asked = {item.answer_id for item in asked_in(items, "train")}
        items = [item for item in answers if item.id in asked and item not in spoken] + items
    for number, item in enumerate(items):
        item.seed = stable_hash(str(seed), str(number), item.text)
        item.id = item.id or f"{item.role[0]}{number:06d}"
    return items


def open_plan(scale=1.0, seed=0, natural=True):
    """Sentences of the open vocabulary for both tokenizers and for recognition, shuffled.

    Without `natural` voices the synthesizers say their share alone."""
    rng = Random(f"open {seed}")
    counts = OPEN["natural"] if natural else {}
    voices = [voice for voice, count in counts.items() for _ in range(scaled(count, scale))]
    choice = Choice(rng)
    count = scaled(OPEN["synthesizers"], scale)
    voices += [V.pick(choice, V.TRAINING) for _ in range(count)]
    rng.shuffle(voices)
    bare, patterns = C.bare_questions(), C.held_out_patterns()

    def avoid(text):  # no question of the curriculum, least of all a held-out wording
        return text in bare or any(pattern.search(text) for pattern in patterns)

    items = []
    for number, text in enumerate(open_sentences(len(voices), rng, avoid)):
        seed_of = stable_hash(str(seed), "open", str(number), text)
        items.append(Item(f"o{number:06d}", "train", "", "open", text, voices[number], seed_of))
    return items


def plan_hash(items):
    """A hash of all that is planned, for a folder to tell whose corpus it holds."""
    lines = [json.dumps([getattr(item, name) for name in PLANNED]) for item in items]
    return hashlib.sha1("\n".join([str(RECIPE), *lines]).encode()).hexdigest()


def asked_in(items, split):
    return [item for item in items if item.role == "question" and item.split == split]


def texts(items):
    """Pairs for text pre-training: what is asked in training, and facts that are only ever read."""
    pairs = {}
    for item in asked_in(items, "train"):
        if not item.want:  # no text holds the answers of Voice Understanding
            pairs[item.text] = (item.answer, item.manner, item.intent, item.category, False)
    rng = Random("texts")
    for intent in C.INTENTS.values():
        for fact in [fact for fact in intent.facts if fact.read_only for _ in range(40)]:
            text = C.wording(rng.choice(intent.cores), fact, rng)
            pairs[text] = (fact.answer, fact.manner, intent.name, intent.category, True)
    names = ("question", "answer", "manner", "intent", "category", "read_only")
    return [dict(zip(names, (text, *pair), strict=True)) for text, pair in pairs.items()]


def held_out(item):
    """Whether an answer is kept from the tokenizers, the flow and HiFT (a stable 1 in HOLD_OUT)."""
    return item.role == "answer" and zlib.crc32(item.id.encode()) % HOLD_OUT == 0


def spread(items, count=None):
    """`count` of a list at most, spread evenly over it; without a count all."""
    step = max(1.0, len(items) / count) if count else 1.0
    return [items[int(i * step)] for i in range(min(len(items), count or len(items)))]


def scaled(n, scale):
    return max(4, round(n * scale))


def answer_item(name, split, fact, intent, category):
    """The Item of a Fact's answer, an intent's."""
    return Item(
        name, split, "", "answer", fact.answer, V.ANSWER_VOICE, category=category, intent=intent,
        manner=fact.manner, answer=fact.answer, answer_id=name,
    )  # fmt: skip


def answer_items():
    """Items of all distinct (answer, manner). Those of read-only facts are for evaluation."""
    seen = {}
    for intent in C.INTENTS.values():
        for fact in intent.facts:
            item = answer_item(f"a{len(seen):04d}", "eval", fact, intent.name, intent.category)
            item = seen.setdefault((fact.answer, fact.manner), item)
            if not fact.read_only:
                item.split = "train"
    return list(seen.values())


def answer_ids():
    """{(answer, manner): id} of the curriculum's answers."""
    return {(item.answer, item.manner): item.id for item in answer_items()}


class Choice:
    """numpy's `choice` with the standard library's generator, whose stream never changes."""

    def __init__(self, rng):
        self.rng = rng

    def choice(self, pool, p=None):
        return self.rng.choices(list(pool), p)[0]


def question(split, cell, intent, core, fact, pool, ids, rng):
    """The Item of a Fact asked in a wording (core) by a voice of `pool`; ids: see `answer_ids`."""
    voice = V.pick(Choice(rng), pool, fact.want)
    return Item(
        "", split, cell, "question", C.wording(core, fact, rng), voice, 0, intent.category,
        intent.name, core, dict(fact.slots), fact.want, fact.answer, fact.manner,
        ids[fact.answer, fact.manner],
    )  # fmt: skip


def _training(scale, ids, rng, later=False):
    """Spoken questions: every fact of an intent as often as every other, its wordings in turn."""
    items = []
    for intent in C.INTENTS.values():
        known, wordings = intent.known(), intent.later if later else intent.cores
        renders = intent.later_renders if later else intent.renders
        count, turns = scaled(renders, scale) if wordings else 0, Counter()
        rounds = count // len(known) + 1
        order = [fact for _ in range(rounds) for fact in rng.sample(known, len(known))][:count]
        allowed = {core: {fact.key for fact in intent.allowed(core)} for core in wordings}
        for fact in order:
            cores = [core for core in wordings if fact.key in allowed[core]]
            core = cores[(turns[fact.key] + stable_hash(fact.key)) % len(cores)]
            turns[fact.key] += 1
            items.append(question("train", "", intent, core, fact, V.TRAINING, ids, rng))
    return items


def _evaluation(cell, count, wording, pool, ids, rng):
    """Questions, intents in turn, of a kind of wording: seen, new, slot (a seen one, new with this
    fact) or read_only."""
    stock = []
    for intent in C.INTENTS.values():
        read_only = [fact for fact in intent.facts if fact.read_only]
        kinds = {"slot": intent.closed, "read_only": lambda _, facts=read_only: facts}
        askable = kinds.get(wording, intent.allowed)
        cores = intent.held_out if wording == "new" else intent.cores
        if pairs := [(core, fact) for core in cores for fact in askable(core)]:
            stock.append((intent, rng.sample(pairs, len(pairs))))
    items, split = [], "eval" if cell else "dev"
    for i in range(count if stock else 0):
        turn, number = divmod(i, len(stock))
        intent, pairs = stock[number]
        items.append(question(split, cell, intent, *pairs[turn % len(pairs)], pool, ids, rng))
    return items


def vocabulary():
    """{word: weight} of questions and answers, lone letters aside.

    Words of read-only facts of language weigh 3: they are heard although their facts are not."""
    words, rare = set(), set()
    for intent in C.INTENTS.values():
        for core in intent.cores + intent.held_out:
            words.update(word for word in core.split() if "{" not in word)
        for fact in intent.facts:
            slots = " ".join(value for _, value in fact.slots).split()
            words.update(slots + fact.answer.split())
            if fact.read_only and intent.category == LANGUAGE:
                rare.update(fact.key.split() + fact.answer.split()[-1:])
    words.update(" ".join(C.ASKING + C.ORDERING + C.CLOSERS).split())
    return {w: 3 if w in rare else 1 for w in sorted(words) if len(w) > 1 or w in "ai"}


def sentences(count, rng):
    """`count` of strings that use all words evenly, scrambled wordings, and a small grammar."""
    weights, used = vocabulary(), Counter()
    bare, patterns = C.bare_questions(), C.held_out_patterns()
    pool = sorted(weights)
    cores = [core for intent in C.INTENTS.values() for core in intent.cores if "{" in core]
    subjects, verbs, objects, places = map(phrases, ("SUBJECTS", "VERBS", "OBJECTS", "PLACES"))

    def word():
        return min(rng.sample(pool, 8), key=lambda w: used[w] / weights[w])

    def string(least=3, most=7):
        return " ".join(word() for _ in range(rng.randint(least, most)))

    def scrambled():
        return rng.choice(cores).format(**{name: string(1, 2) for name in "abcwvx"})

    def grammar():
        subject = rng.choice((rng.choice(subjects), f"the {word()}"))
        parts = [subject, rng.choice(verbs)]
        parts.append(rng.choice((rng.choice(objects), f"the {word()} {word()}")))
        return " ".join(parts + ([rng.choice(places)] if rng.random() < 0.5 else []))

    made = []
    while len(made) < count:
        text = rng.choices((string, scrambled, grammar), (4, 3, 3))[0]()
        if text not in bare and not any(pattern.search(text) for pattern in patterns):
            used.update(text.split())
            made.append(text)
    return made


def _answer_voice_generic(count, rng):
    made, manners = sentences(count, rng), list(V.MANNERS)
    return [Item("", "train", "", "generic", text, V.ANSWER_VOICE, manner=rng.choice(manners))
            for text in made]  # fmt: skip
