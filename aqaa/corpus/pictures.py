"""Drawn pictures, spoken questions about them, and the answers that they have.

A picture is a Scene: a few shapes, two shapes at two sides, or a digit. Questions do not know a
scene, so any number of pictures goes with each; `answer` says what is right of one. The wordings
and the counts stand in pictures.toml."""

import tomllib
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import cos, pi, sin
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from aqaa.corpus import plan as P
from aqaa.corpus import voices as V
from aqaa.corpus import wider

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
SHAPES, DIGITS, NUMBERS = (TABLE[key].split() for key in ("shapes", "digits", "numbers"))
COLOURS, PLACES, KINDS = TABLE["colours"], TABLE["places"], TABLE["kinds"]
MOST = len(NUMBERS) - 1  # things of a shape
CATEGORY = "Pictures"
NUMBER = "number"  # what a digit is called where its colour is asked for
FINE = 3  # drawn so many times as large, then made smaller: smooth edges


@dataclass(frozen=True)
class Thing:
    """A shape, or a digit, of a colour; x, y its middle and r its reach, in shares of a picture."""

    name: str
    colour: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    things: tuple
    sides: tuple = ()  # the places of the things, where a question may ask for them
    paper: tuple = (255, 255, 255)

    def of(self, name):
        return [thing for thing in self.things if thing.name == name]


def scene(rng):
    """A Scene, drawn with a numpy Generator."""
    paper = tuple(int(value) for value in rng.integers(225, 256, 3))
    kind = rng.choice(("shapes", "sides", "digit"), p=(0.55, 0.25, 0.2))
    colours = list(rng.permutation(list(COLOURS)))
    if kind == "digit":
        x, y = rng.uniform(0.4, 0.6, 2)
        digit = Thing(str(rng.choice(DIGITS)), colours[0], x, y, rng.uniform(0.3, 0.42))
        return Scene((digit,), paper=paper)
    names = list(rng.permutation(SHAPES))
    if kind == "sides":
        sides = tuple(str(side) for side in rng.permutation(list(PLACES))[:2])
        spots = [(rng.uniform(*PLACES[side][:2]), rng.uniform(*PLACES[side][2:])) for side in sides]
        things = [Thing(name, colour, *spot, rng.uniform(0.1, 0.14))
                  for name, colour, spot in zip(names, colours, spots, strict=False)]  # fmt: skip
        return Scene(tuple(things), sides, paper)
    counts = [int(rng.integers(1, MOST + 1)), int(rng.integers(0, 4))]
    counts = counts[:1] if rng.random() < 0.4 else counts
    spots = [(x, y) for x, y in product((0.17, 0.5, 0.83), repeat=2)]
    rng.shuffle(spots)
    things = []
    for name, colour, count in zip(names, colours, counts, strict=False):
        for _ in range(count):
            x, y = spots.pop() + rng.uniform(-0.04, 0.04, 2)
            things.append(Thing(name, colour, x, y, rng.uniform(0.09, 0.13)))
    return Scene(tuple(things), paper=paper)


def asked(scene):
    """[(kind, thing), …]: what can be asked of a scene, and about which shape."""
    if scene.things[0].name in DIGITS:
        return [("digit", ""), ("colour", NUMBER)]
    there = list(dict.fromkeys(thing.name for thing in scene.things))
    kinds = [(kind, name) for kind in ("count", "is_there") for name in SHAPES]
    kinds += [("colour", name) for name in there]
    kinds += [("where", name) for name in there if scene.sides]
    return kinds + [("shape", "")] * (len(there) == 1)


def answer(scene, kind, thing):
    """The words that are right of a scene."""
    shown = scene.of(thing) or scene.things  # a digit, and the only shape, are not named
    decides = {
        "count": lambda: len(scene.of(thing)),
        "colour": lambda: list(COLOURS).index(shown[0].colour),
        "shape": lambda: SHAPES.index(shown[0].name),
        "digit": lambda: DIGITS.index(shown[0].name),
        "where": lambda: list(PLACES).index(scene.sides[scene.things.index(shown[0])]),
        "is_there": lambda: int(bool(scene.of(thing))),
    }
    return answers(kind, thing)[decides[kind]()]


@cache
def answers(kind, thing):
    """All answers that a question can have, in the order of what decides."""
    rows = {
        "count": [{"is": ("are", "is")[i == 1], "number": word, "things": thing + "s" * (i != 1)}
                  for i, word in enumerate(NUMBERS)],
        "colour": [{"colour": colour} for colour in COLOURS],
        "shape": [{"thing": shape} for shape in SHAPES],
        "digit": [{"number": digit} for digit in DIGITS],
        "where": [{"place": place, "on": "on" if place in ("left", "right") else "at"}
                  for place in PLACES],
        "is_there": [{"yes": "no", "a": "no"}, {"yes": "yes", "a": "a"}],
    }  # fmt: skip
    return [KINDS[kind]["answer"].format(**{"thing": thing} | row) for row in rows[kind]]


def draw(scene, size):
    """A picture of PIL, `size` pixels wide and high."""
    wide = FINE * size
    picture = Image.new("RGB", (wide, wide), scene.paper)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y, r = (wide * value for value in (thing.x, thing.y, thing.r))
        ink = COLOURS[thing.colour]
        if thing.name in DIGITS:
            font = ImageFont.load_default(2 * r)
            pen.text((x, y), str(DIGITS.index(thing.name)), ink, font, anchor="mm")
        elif thing.name == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), ink)
        else:
            pen.polygon([(x + r * a, y + r * b) for a, b in CORNERS[thing.name]], ink)
    return picture.resize((size, size), Image.Resampling.BOX)


CORNERS = {  # of the shapes with straight sides, around 0 in a reach of 1
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
    "star": [((1.1, 0.45)[i % 2] * sin(i * pi / 5), -(1.1, 0.45)[i % 2] * cos(i * pi / 5))
             for i in range(10)],
    "heart": [(sin(a) ** 3, -(13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)) / 16)
              for a in (i * pi / 20 for i in range(40))],
}  # fmt: skip


# ---- what is spoken -----------------------------------------------------------------------------


def plan(scale=1.0, seed=0):
    """Items of the pictures part: every answer; questions (role "picture") of training, of
    development and of three cells of evaluation, whose slots hold the thing."""
    rng, items = Random(f"pictures {seed}"), []
    for kind in KINDS:
        texts = [text for thing in subjects(kind) for text in answers(kind, thing)]
        for text in dict.fromkeys(texts):
            name = f"i{len(items):04d}"
            items.append(P.Item(name, "train", "", "answer", text, V.ANSWER_VOICE, manner="normal",
                                category=CATEGORY, intent=f"picture_{kind}", answer=text,
                                answer_id=name))  # fmt: skip
    for name, count in TABLE["counts"].items():
        split = "eval" if name.startswith("picture") else "dev" if name == "dev" else "train"
        who = name.removeprefix("picture_").replace("new", "seen")
        items += _questions(P.scaled(count, scale), split, name, wider.POOLS[who], rng)
    return wider.numbered(items, "i", "pictures", seed)


def subjects(kind):
    """What a question of a kind can be about; one empty word where it names nothing."""
    if "{thing" not in KINDS[kind]["wordings"]:
        return [""]
    return [*SHAPES, NUMBER] if kind == "colour" else SHAPES


def _questions(count, split, name, pool, rng):
    """Questions, kinds and things in turn, each in wordings drawn evenly."""
    order, items = [(kind, thing) for kind in KINDS for thing in subjects(kind)], []
    order += [pair for pair in order if not pair[1]] * 3  # what has one subject is asked as often
    rng.shuffle(order)
    for i in range(count):
        kind, thing = order[i % len(order)]
        known, held_out = wider.lines_of(KINDS[kind]["wordings"])
        core = rng.choice(held_out if name == "picture_new" else known)
        text = core.format(thing=thing, things=f"{thing}s")
        voice = wider.voice_of(rng, pool)
        cell = name if split == "eval" else ""
        items.append(P.Item("", split, cell, "picture", text, voice, category=CATEGORY, core=core,
                            intent=f"picture_{kind}", slots={"thing": thing}))  # fmt: skip
    return items
