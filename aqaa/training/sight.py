"""How the mini learns to see, when it can hear and speak: drawn pictures (corpus/pictures.py).

First the encoder alone, which the published model also got ready-made: from the mean of its rows
linear heads read what a picture holds. Then encoder, projector and low-rank changes of the backbone
learn together, from spoken questions and their spoken answers; the backbone itself stays frozen.
Scenes are drawn anew for every batch."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from aqaa.backbone.vision import Vision, patches
from aqaa.corpus import pictures
from aqaa.tokenizers import dialogue, interleave
from aqaa.training.examples import Examples, swapped
from aqaa.training.objectives import LanguageTask, NextToken


def shown(scenes, size):
    """Pictures (M, 3, size, size) in -1..1 of scenes."""
    arrays = [np.asarray(pictures.draw(scene, size)) for scene in scenes]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


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


COUNTS, INKS = pictures.MOST + 1, len(pictures.COLOURS) + 1
CLASSES = [COUNTS, INKS, len(pictures.PLACES) + 1] * len(pictures.SHAPES)
CLASSES += [len(pictures.DIGITS) + 1, INKS]


class VisionTask:
    """Cross-entropy of `facts`, read from the mean row of a picture by linear heads."""

    lr, warmup = 2e-3, 0.05

    def __init__(self, config, size=64):
        self.model, self.size, self.pixels = Vision(config), size, config.vision.image_size
        self.heads = nn.Linear(config.backbone.hidden_size, sum(CLASSES))
        self.modules = {"model": self.model, "heads": self.heads}

    @classmethod
    def from_run(cls, run, stage):
        task = cls(run.config, **stage.settings)
        if run.init and (run.init / "vision.safetensors").exists():
            run.start(stage, task.model)
        return task

    def batch(self, rng):
        scenes = [pictures.scene(rng) for _ in range(self.size)]
        targets = torch.tensor([facts(scene) for scene in scenes])
        return {"pictures": shown(scenes, self.pixels), "targets": targets}

    def loss(self, batch, step):
        rows = self.model(batch["pictures"])  # (B, P, D)
        logits = self.heads(rows.mean(1)).float().split(CLASSES, -1)
        targets = batch["targets"].unbind(-1)
        losses = [F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
        right = [one.argmax(-1) == target for one, target in zip(logits, targets, strict=True)]
        return sum(losses), {"right": torch.stack(right).float().mean(),
                             "all_right": torch.stack(right).all(0).float().mean()}  # fmt: skip


class PictureExamples(Examples):
    """Spoken questions behind a picture: about it, or about anything else (`aqtaa`).

    items, codes: of pictures.plan. An example is (ids, weights, scene)."""

    def __init__(self, book, mixture, items, codes, **options):
        super().__init__(book, mixture, **options)
        self.hold, said = patches(book.config), {}
        opened = dialogue.prompt([("user", [])], book.tokenizer, self.ids, answer=False)
        self.before = len(opened) - 1  # ids before what a user says
        for item in items:
            audio = np.array(interleave.merge(*codes[item.id], self.ids), np.int64)
            if item.role == "answer":
                said[item.text] = book.encode(item.text), audio
            elif item.split == "train":
                said.setdefault((item.intent, item.slots["thing"]), []).append(audio)
        self.said = said

    def draw(self, rng):
        scene = pictures.scene(rng)
        kind = rng.choice(list(self.mixture), p=np.array(list(self.mixture.values())))
        ids, weights = self.picture(rng, scene) if kind == "picture" else self.aqtaa(rng)
        at, room = self.before, len(self.hold)  # the picture comes first in its turn
        ids = np.concatenate([ids[:at], self.hold, ids[at:]])
        return ids, np.concatenate([weights[:at], np.zeros(room), weights[at:]]), scene

    def picture(self, rng, scene):
        """A question about a scene: kinds first, so that none is asked more than another."""
        asked = [(kind, thing) for kind, thing in pictures.asked(scene)
                 if (f"picture_{kind}", thing) in self.said]  # fmt: skip
        kinds = list(dict.fromkeys(kind for kind, _ in asked))
        kind = kinds[rng.integers(len(kinds))]
        things = [thing for one, thing in asked if one == kind]
        thing = things[rng.integers(len(things))]
        variants = self.said[f"picture_{kind}", thing]
        audio = swapped(variants[rng.integers(len(variants))], self.ids, self.noise, rng)
        words, sound = self.said[pictures.answer(scene, kind, thing)]
        return self.example(None, audio, self.layout.arrange(words, sound, self.ids))


class SightTask(LanguageTask):
    """Next-token prediction behind a picture, by the backbone with the changes of Vision.lora."""

    warmup, lr, floor = 0.03, 2e-3, 0.02

    def __init__(self, book, mixture, items, codes, *, rows=8, length=512):
        NextToken.__init__(self, book.config)
        self.examples = PictureExamples(book, mixture, items, codes)
        self.backbone = self.model.requires_grad_(False)
        self.model = Vision(book.config)
        self.modules = {"model": self.model}
        self.rows, self.length, self.pixels = rows, length, book.config.vision.image_size

    @classmethod
    def from_run(cls, run, stage):
        task = cls(run.book(), stage.mixture, pictures.plan(run.scale, run.seed), run.stored(),
                   **stage.settings)  # fmt: skip
        run.start(stage, task.model)
        run.part(run.makers()["backbone"], task.backbone)
        return task

    def batch(self, rng):
        """Examples in rows, one behind the other; the pictures in the order of their places."""
        batch = self.blank(self.rows, self.length)
        scenes = [[] for _ in range(self.rows)]
        filled = np.zeros(self.rows, dtype=int)
        for _ in range(4 * self.rows):
            ids, weights, scene = self.examples.draw(rng)
            room = np.flatnonzero(filled + len(ids) - 1 <= self.length)
            if len(room):
                row = room[0]
                self.put(batch, row, filled[row], ids, weights)
                filled[row] += len(ids) - 1
                scenes[row].append(scene)
        batch = {key: torch.from_numpy(value) for key, value in batch.items()}
        return batch | {"pictures": shown(sum(scenes, []), self.pixels)}

    def scores(self, batch):
        ids = batch["input_ids"]
        trunk = self.backbone.to(ids.device).model
        weights = {name: trunk.get_parameter(name) + change
                   for name, change in self.model.lora.changes()}  # fmt: skip
        embeddings = self.model.embedded(trunk.embed_tokens(ids), ids, batch["pictures"])
        given = {"inputs_embeds": embeddings, "segment_ids": batch["segments"]}
        hidden = functional_call(trunk, weights, kwargs=given).last_hidden_state  # (B, T, D)
        return lambda at, rows: self.backbone.logits(hidden, at, rows)
