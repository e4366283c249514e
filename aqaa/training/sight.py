"""How the mini learns to see, when it can hear and speak: drawn pictures (corpus/pictures.py).

First the encoder alone, which the published model also got ready-made: from each of its rows
linear heads read all that a picture holds. Then encoder, projector and low-rank changes of the
backbone learn together, from questions and answers in letters and in sound: short ones teach to see
in fewer steps, long ones to hear and to speak of it. The backbone itself stays frozen, and scenes
are drawn anew for every batch."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aqaa.backbone.vision import Vision, patches, pixels
from aqaa.config import AQTA
from aqaa.corpus import pictures
from aqaa.tokenizers import interleave
from aqaa.training.examples import Examples, swapped
from aqaa.training.objectives import NextToken
from aqaa.training.turns import AdaptedTask


def shown(scenes, size):
    """Pictures (M, 3, size, size) in -1..1 of scenes, as `pixels` makes them of any picture."""
    return torch.stack([pixels(pictures.draw(scene, size), size) for scene in scenes])


def facts(scene):
    """What a picture holds, as one class for each head: of every shape how many, in which colour,
    at which side; and the digit with its colour. 0: none."""
    row = []
    for name in pictures.SHAPES:
        there = scene.of(name)
        colour = 1 + list(pictures.COLOURS).index(there[0].colour) if there else 0
        side = 0
        if there and scene.sides:
            side = 1 + list(pictures.PLACES).index(scene.sides[scene.things.index(there[0])])
        row += [len(there), colour, side]
    first, digit = scene.things[0], 0
    if first.name in pictures.DIGITS:
        digit = 1 + pictures.DIGITS.index(first.name)
    return [*row, digit, 1 + list(pictures.COLOURS).index(first.colour) if digit else 0]


OFTEN = {"where": 3.0}  # how much more often kinds are asked than others: few scenes have sides
DECIDES = 4.0  # weight of the words of an answer that the picture decides, among its words
COUNTS, INKS = pictures.MOST + 1, len(pictures.COLOURS) + 1
CLASSES = [COUNTS, INKS, len(pictures.PLACES) + 1] * len(pictures.SHAPES)
CLASSES += [len(pictures.DIGITS) + 1, INKS]


class VisionTask:
    """Cross-entropy of `facts`, read by linear heads from every row of a picture: the backbone then
    finds them wherever it looks, which saves it many steps."""

    lr, warmup = 2e-3, 0.05

    def __init__(self, config, size=64):
        self.model, self.size, self.pixels = Vision(config), size, config.vision.image_size
        self.heads = nn.Linear(config.backbone.hidden_size, sum(CLASSES))
        self.modules = {"model": self.model, "heads": self.heads}

    @classmethod
    def from_run(cls, run, stage):
        task = cls(run.config, **stage.settings)
        run.start(stage, task.model)
        return task

    def batch(self, rng):
        scenes = [pictures.scene(rng) for _ in range(self.size)]
        targets = torch.tensor([facts(scene) for scene in scenes])
        return {"pictures": shown(scenes, self.pixels), "targets": targets}

    def loss(self, batch, step):
        rows = self.model(batch["pictures"])  # (B, P, D)
        logits = self.heads(rows).float().flatten(0, 1).split(CLASSES, -1)  # (B P, classes) each
        targets = batch["targets"].repeat_interleave(rows.shape[1], 0).unbind(-1)
        losses = [F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
        right = [one.argmax(-1) == target for one, target in zip(logits, targets, strict=True)]
        return sum(losses), {"right": torch.stack(right).float().mean(),
                             "all_right": torch.stack(right).all(0).float().mean()}  # fmt: skip


class PictureExamples(Examples):
    """Questions with a picture behind them: about it, or about anything else (`aqtaa`).

    items, codes: of pictures.plan. An example is (ids, weights, scene)."""

    def __init__(self, book, mixture, items, codes, **options):
        super().__init__(book, mixture, **options)
        self.patches = patches(book.config)
        self.answers = {}  # text: (its ids, audio ids, first and last of the ids that differ)
        self.questions = {}  # (intent, thing): [(audio ids, ids of the words), …]
        for item in items:
            audio = np.array(interleave.merge(*codes[item.id], self.ids), np.int64)
            words = book.encode(item.text)
            if item.role == "answer":
                self.answers[item.text] = words, audio, *undecided(item.text, book)
            elif item.split == "train":
                same = self.questions.setdefault((item.intent, item.slots["thing"]), [])
                same.append((audio, words))

    def draw(self, rng):
        scene = pictures.scene(rng)
        kind = rng.choice(list(self.mixture), p=np.array(list(self.mixture.values())))
        ids, weights = self.aqtaa(rng) if kind == "aqtaa" else self.picture(rng, scene, kind)
        # It comes last in its turn: its rows have heard the question, the answer is not far.
        at, room = int(np.flatnonzero(ids == self.ids.eot)[0]), len(self.patches)
        ids = np.concatenate([ids[:at], self.patches, ids[at:]])
        return ids, np.concatenate([weights[:at], np.zeros(room), weights[at:]]), scene

    def picture(self, rng, scene, kind):
        """A question about a scene, heard or ("read") not, answered in words or ("spoken") also in
        sound. Kinds come first, so that one with many shapes is not asked more than others; words
        that the picture decides weigh more."""
        asked = {}
        for name, thing in pictures.asked(scene):
            if (f"picture_{name}", thing) in self.questions:  # a small corpus lacks some
                asked.setdefault(name, []).append(thing)
        often = np.array([OFTEN.get(name, 1.0) for name in asked])
        name = rng.choice(list(asked), p=often / often.sum())
        things = asked[name]
        # Few of the shapes are in a picture: "no" would do for three of four questions. So every
        # second one asks for a shape that is there.
        if name in ("count", "is_there") and rng.random() < 0.5:
            things = [thing for thing in things if scene.of(thing)] or things
        thing = things[rng.integers(len(things))]
        variants = self.questions[f"picture_{name}", thing]
        audio, letters = variants[rng.integers(len(variants))]
        audio = swapped(audio, self.ids, self.noise, rng)
        words, sound, first, last = self.answers[pictures.answer(scene, name, thing)]
        answer = [*words, self.ids.eot]
        if kind == "spoken":
            answer = self.layout.arrange(words, sound, self.ids)
        marker = AQTA if kind == "written" else None
        ids, weights = self.example(marker, letters if kind == "read" else audio, answer)
        written = np.flatnonzero((ids >= self.ids.first_text) & (ids < self.ids.n_text))
        weights[written[len(written) - len(words) :][first:last]] *= DECIDES
        return ids, weights


def undecided(text, book):
    """Where the ids of an answer begin and end to differ from those of its question's others."""
    mine, ends = book.encode(text), []
    asked = [(kind, thing) for kind in pictures.KINDS for thing in pictures.subjects(kind)]
    for texts in (pictures.answers(*one) for one in asked if text in pictures.answers(*one)):
        for other in (book.encode(one) for one in texts if one != text):
            ends.append((alike(mine, other), len(mine) - alike(mine[::-1], other[::-1])))
    return min(first for first, _ in ends), max(last for _, last in ends)


def alike(ours, theirs):
    """How many ids two lists begin alike."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(ours), len(theirs)))


class SightTask(AdaptedTask):
    """Next-token prediction with pictures, by the backbone with the changes of Vision.lora."""

    def __init__(self, book, mixture, items, codes, *, rows=8, length=512):
        NextToken.__init__(self, book.config)
        self.examples = PictureExamples(book, mixture, items, codes)
        vision = Vision(book.config)
        self.freeze(vision, vision.lora)
        self.rows, self.length, self.pixels = rows, length, book.config.vision.image_size

    @classmethod
    def from_run(cls, run, stage):
        task = cls(run.book(), stage.mixture, pictures.plan(run.scale, run.seed), run.stored(),
                   **stage.settings)  # fmt: skip
        return task.begin(run, stage)

    def batch(self, rng):
        batch, scenes = self.packed(rng)
        return batch | {"pictures": shown(scenes, self.pixels)}

    def embedded(self, embeddings, batch):
        return self.model.embedded(embeddings, batch["input_ids"], batch["pictures"])
