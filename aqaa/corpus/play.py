"""Four more categories: Creativity, Role-playing and Gaming (play.toml), and Sing (sing.toml).

A role is a voice: whoever asks for a giant hears a low one. Stories are made of three given words;
evaluation gives words that never stood together in training. What is sung is apart likewise."""

import tomllib
from itertools import product
from pathlib import Path
from random import Random

from aqaa.corpus import intents as C
from aqaa.corpus import plan as P
from aqaa.corpus import sing, switches, wider
from aqaa.corpus import voices as V
from aqaa.corpus.curriculum import SENTENCES, VOICE
from aqaa.corpus.facts import Fact, number, stable_hash
from aqaa.tokenizers.text import tagged

PLAY = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
APART = PLAY["apart"] | sing.SING["apart"]  # of these one fact in so many is for evaluation
DEV = 3  # questions of each intent for choices


def _words(name):
    return [part.split() for part in PLAY["words"][name].split(",")]


def _fact(answer, manner="normal", **slots):
    return Fact(tuple(slots.items()), answer, manner)


def _rhymes():
    for one, other in _words("rhymes"):
        yield _fact(f"{other} rhymes with {one}", w=one)
        yield _fact(f"{one} rhymes with {other}", w=other)


def _stories():
    words = (PLAY["words"][name].split() for name in ("animals", "people", "things"))
    for a, b, c in product(*words):
        answer = f"once a {a} and a {b} looked for a {c} and they found it together"
        yield _fact(answer, a=a, b=b, c=c)


def _guesses():
    for a in range(1, 21):
        for b in range(a + 2, a + 14, 4):
            yield _fact(f"my guess is {number((a + b) // 2)}", a=number(a), b=number(b))


def _said_by(told):
    """Sentences of the curriculum that are spoken in the manner of a role."""
    for role, (manner, _) in PLAY["roles"].items():
        for x in SENTENCES:
            if (x, manner) in told:
                yield _fact(x, manner, x=x, r=role)


def facts():
    """{intent: [Fact, …]}; a second question has those of what is asked again."""
    told = {(item.answer, item.manner) for item in P.answer_items() if item.split == "train"}
    made = {
        "rhyme": _rhymes(),
        "finish": (_fact(end, x=line) for line, end in PLAY["lines"].items()),
        "story": _stories(),
        "role_be": (_fact(said, manner, r=r) for r, (manner, said) in PLAY["roles"].items()),
        "role_say": _said_by(told),
        "rock": (_fact(said, m=move) for move, said in PLAY["moves"].items()),
        "guess": _guesses(),
        "chain": (_fact(f"my word is {x}", w=w) for w, x in _words("chained")),
        "riddle": (_fact(f"i guess that it is {x}", x=clue) for clue, x in PLAY["riddles"].items()),
    }
    made = {name: list(rows) for name, rows in made.items()}
    for name, entry in PLAY["intents"].items():
        if "first" in entry:
            made[name] = made[entry["first"]]
    return made


def apart(name, fact):
    """Whether a fact is kept from training: half of all stories, some of what is sung."""
    return name in APART and stable_hash(name, fact.key) % APART[name] == 1


def joined(scale=1.0, seed=0):
    """Items of all that joined the questions of curriculum.toml, in the order of their parts."""
    parts = wider.plan, plan, later_plan, wider.turns_plan
    return [item for part in parts for item in part(scale, seed)]


def plan(scale=1.0, seed=0):
    """Items of play.toml, then those of switches.py. Ids never move."""
    items = _drawn("play", "p", PLAY, facts(), scale, seed)
    return wider.numbered(items + switches.plan(PLAY["switch"], scale, seed), "y", "play", seed)


def later_plan(scale=1.0, seed=0):
    """Items of sing.toml, sentences that the answer voice alone says, natural voices that ask how
    they sound, and known questions in more wordings."""
    items = _drawn("sing", "n", sing.SING, sing.facts(), scale, seed)
    items += switches.drills(PLAY["switch"]["drills"], scale, seed)
    items += _heard(scale, seed) + _reworded(scale, seed)
    return wider.numbered(items, "v", "voice", seed)  # "voice": the part's first name is in seeds


def _reworded(scale, seed):
    """Training questions in the wordings `more` of all tables, shuffled."""
    rng, items, names = Random(f"more {seed}"), [], list(PLAY["intents"])
    known = wider.Maker(rng, P.answer_ids())
    playing = _Maker(rng, "p", PLAY["intents"], facts(), "more")
    for who, counts in PLAY["more"].items():
        pool = wider.POOLS[who]
        for kind in ("known_more", "follow_more"):
            items += known.all(kind, P.scaled(counts[kind], scale), pool, "train")
        for turn in range(P.scaled(counts["play"], scale)):
            items += playing.asked(names[turn % len(names)], pool, "train")
    rng.shuffle(items)
    return items


def _heard(scale, seed):
    """Voice Understanding in natural voices, the held-out ones where they can sound as wanted."""
    rng, entry, items, ids = Random(f"heard {seed}"), PLAY["heard"], [], P.answer_ids()
    for split, cell in (("eval", "voice_natural"), ("dev", ""), ("train", "")):
        for intent in (one for one in C.INTENTS.values() if one.category == VOICE):
            cores = intent.held_out if cell else intent.cores
            for fact in intent.facts:
                pool = entry["held_out" if cell else "voices"].get(fact.want, "").split()
                for _ in range(P.scaled(entry[split], scale) if pool else 0):
                    core = rng.choice(cores)
                    items.append(P.question(split, cell, intent, core, fact, V.TRAINING, ids, rng))
                    items[-1].voice = rng.choice(pool)
    return items


def _drawn(part, letter, table, stock, scale, seed):
    """Items of a table: new answers, evaluation, development, shuffled training."""
    make = _Maker(Random(f"{part} {seed}"), letter, table["intents"], stock)
    names, items = list(table["intents"]), list(make.answers)
    for cell, count in table["cells"].items():
        pool = wider.POOLS[cell.removeprefix(f"{part}_")]
        for turn in range(P.scaled(count, scale)):
            items += make.asked(names[turn % len(names)], pool, "eval", cell)
    for name in names * P.scaled(DEV, min(scale, 1.0)):
        items += make.asked(name, wider.POOLS["dev"], "dev")
    training = []
    for name, counts in table["counts"].items():
        for who, count in counts.items():
            for _ in range(P.scaled(count, scale)):
                training += make.asked(name, wider.POOLS[who], "train")
    make.rng.shuffle(training)
    items += training
    if scale < 1:  # a miniature speaks the answers that it needs
        asked = {item.answer_id for item in items if item.role != "answer"}
        items = [item for item in items if item.role != "answer" or item.id in asked]
    return items


class _Maker:
    """Draws questions of each intent; `answers` are the Items that the curriculum lacks."""

    def __init__(self, rng, letter, intents, stock, wordings="wordings"):
        self.rng, self.intents, self.stock, self.answers = rng, intents, stock, []
        self.ids = P.answer_ids()
        self.cores = {name: wider.lines_of(entry[wordings]) for name, entry in intents.items()}
        for name, rows in self.stock.items():
            category = intents[name]["category"]
            for fact in rows:
                if (fact.answer, fact.manner) not in self.ids:
                    place = self.ids[fact.answer, fact.manner] = f"{letter}{len(self.answers):04d}"
                    split = "eval" if apart(name, fact) else "train"
                    self.answers.append(P.answer_item(place, split, fact, name, category))

    def asked(self, name, pool, split, cell=""):
        """[Item] of a question; of a second one that is no training, the first one before it."""
        entry, new = self.intents[name], split == "eval"
        known = [one for one in self.stock[name] if apart(name, one) == (new and name in APART)]
        fact, core = self.rng.choice(known), self.rng.choice(self.cores[name][new])
        voice = wider.voice_of(self.rng, pool)
        slots, role, before = dict(fact.slots), "question", []
        if first := entry.get("first"):
            role, slots = "follow", self._before(first, fact)
            if split != "train":
                before = [P.Item("", split, "", "first", slots["asked"], voice)]
        return [*before, P.Item(
            "", split, cell, role, core.format(**dict(fact.slots)), voice, 0, entry["category"],
            name, core, slots, "", fact.answer, fact.manner, self.ids[fact.answer, fact.manner],
        )]  # fmt: skip

    def _before(self, first, fact):
        """What was said before a second question: of the same role, or of any other round."""
        said = fact if first == "role_be" else self.rng.choice(self.stock[first])
        asked = self.rng.choice(self.cores[first][0]).format(**dict(said.slots))
        return {"asked": asked, "answered": tagged(said.answer, said.manner)}
