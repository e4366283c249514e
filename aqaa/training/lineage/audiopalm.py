"""Training of AudioPaLM (2306.12925): a text model from scratch, then, grown by the audio ids,
several tagged tasks at once. `compare` trains and measures what the paper compares."""

from dataclasses import replace

import numpy as np
import torch

from aqaa.backbone import step1
from aqaa.corpus.plan import spread
from aqaa.evaluation.stepeval import wilson
from aqaa.files import write_json
from aqaa.lineage.audiopalm import TAGS, grow
from aqaa.lineage.units import MERGED, layout, prompt
from aqaa.training import judged
from aqaa.training.lineage.steps import StepsTask, begin, book, left_by
from aqaa.training.objectives import TEXT
from aqaa.training.stages import Stage
from aqaa.weights.model_folder import build

STAGES = (
    Stage("text", "a language model that reads and writes, from scratch",
          "aqaa.training.lineage.audiopalm:TextTask", 300, mixture={"text": 1.0}, floor=0.3,
          settings={"length": 256}),
    Stage("speech", "the same, grown by audio ids: several tagged tasks",
          "aqaa.training.lineage.audiopalm:TaggedTask", 800, parent="text",
          mixture={"asr": 0.35, "asr_answer": 0.25, "chain": 0.15, "tts": 0.10, "speak": 0.05,
                   "answer": 0.05, "text": 0.05}),
)  # fmt: skip
ANSWERS = "answer"  # the task that variants are measured on
VARIANTS = {  # of the stage "speech": what differs from it
    "text model, all tasks": {},
    "scratch, all tasks": {"settings": {"start": "scratch"}},
    "text model, one task": {"mixture": {ANSWERS: 1.0}},
}


def text_model(config):
    """A fresh Step-1 model of the backbone's size that has text ids only."""
    return step1.build(replace(config.backbone, vocab_size=config.ids.n_text))


class TextTask(StepsTask):
    """Questions and answers of the book in writing; the whole dialogue is learnt."""

    @classmethod
    def from_run(cls, run, stage):
        return cls(book(run), stage.mixture, TAGS, MERGED, model=text_model(run.config),
                   lr=2e-3, heard=1.0, floor=stage.floor, **stage.settings)  # fmt: skip


class TaggedTask(StepsTask):
    """Tagged tasks on text and audio ids."""

    @classmethod
    def from_run(cls, run, stage):
        """settings of the stage: start, "text", from the grown text model, or "scratch"."""
        settings = {"start": "text", **stage.settings}
        start, small = settings.pop("start"), text_model(run.config)
        if start not in ("text", "scratch"):
            raise ValueError(f"unknown start {start!r}: choose text or scratch")
        if start == "text":
            begin(run, stage, small)
        model = grow(small, run.config.ids.n_audio)
        task = cls(book(run), stage.mixture, TAGS, MERGED, model=model, lr=2e-3,
                   floor=stage.floor, **settings)  # fmt: skip
        task.hear_alike(*run.codebooks())  # audio rows only
        return task


def compare(run, steps, *, questions=200, variants=VARIANTS, settings=None):
    """Train variants of the stage "speech" for as many steps each, and measure them on questions
    of the development split: [{"variant", "steps", "loss", "right"}, …], see `measure`; also in
    compare.json of the run. The stage "text" must have run. settings: of all variants."""
    (stage,) = [one for one in STAGES if one.name == "speech"]
    asked, rows = book(run, dev=True), []
    for number, (variant, changes) in enumerate(variants.items()):
        child = run.beside(run.out / "compare" / str(number), run.training_seed)
        child.steps = steps
        told = {**stage.settings, **(settings or {}), **changes.get("settings", {})}
        torch.manual_seed(run.training_seed)
        child.train(replace(stage, **{**changes, "settings": told}))
        model = left_by(child, stage.name, build("backbone", run.config))
        rows.append({"variant": variant, "steps": steps, **measure(model, asked, questions)})
        write_json(run.out / "compare.json", {"rows": rows})
    return rows


def measure(model, asked, questions, task=ANSWERS):
    """{"loss", "right"} of a model's answers to spoken questions of a book in one task: the mean
    loss of their text ids in nats, and the share of texts that are right, drawn greedily."""
    task_of = StepsTask(asked, {task: 1.0}, TAGS, MERGED, model=model, heard=0.0, noise=0.0)
    chosen, losses = spread(asked.questions, questions), []
    for index in chosen:
        losses += text_losses(task_of, task, index)
    prompts = [prompt(TAGS[task][0], asked.audio[i], asked.tokenizer, asked.config.ids)
               for i in chosen]  # fmt: skip
    answers = judged.answers(model, asked, chosen, layout(task, MERGED), asked=prompts,
                             temperature=0.0)  # fmt: skip
    right = wilson(sum(one.right for one in answers), len(answers))
    return {"loss": round(float(np.mean(losses)), 4), "right": right}


@torch.no_grad()
def text_losses(task_of, task, index):
    """Losses of the text ids of the answer to one spoken question, in nats."""
    book = task_of.examples.book
    said, audio = book.spoken(book.answers[book.items[index].answer_id])
    heard = task_of.examples.transcript(index)
    rng = np.random.default_rng(0)  # there is one wording of a tag
    ids, weights = task_of.examples.steps(rng, task, book.audio[index], heard, said, audio)
    batch = task_of.blank(1, len(ids) - 1)
    task_of.put(batch, 0, 0, ids, weights)
    batch = {key: torch.from_numpy(value) for key, value in batch.items()}
    return [float(one) for kind, _, found in task_of.losses(batch) if kind == TEXT for one in found]
