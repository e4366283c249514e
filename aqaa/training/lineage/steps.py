"""What SpeechGPT and AudioPaLM learn from alike: tasks told in words, answered in steps."""

import numpy as np
import torch

from aqaa.corpus.wider import turns_before
from aqaa.lineage.units import TASKS, UNITS, layout, prompt, sound
from aqaa.tokenizers.text import normalise, tagged
from aqaa.training.examples import ANSWER_WEIGHT, HEARD_WEIGHT, TEXT_WEIGHT, UNHEARD, Examples
from aqaa.training.objectives import LINGUISTIC, SEMANTIC, LanguageTask, NextToken
from aqaa.weights.model_folder import load_part

FOLLOWS, CHATS = 0.15, 0.15  # shares of spoken questions behind a first one, and behind any turn


def book(run, dev=False):
    """The book of a run, read once for all its stages and the runs beside it: it takes a minute."""
    books = run.__dict__.setdefault("books", {})
    if dev not in books:
        books[dev] = run.book(dev)
    return books[dev]


class StepExamples(Examples):
    """Draws examples of `units.TASKS`, and "next": sound continued. mixture: {task: share}; words:
    {task: its wordings}; group: letters of a group of sound, see lineage/units.py."""

    def __init__(self, book, mixture, words, group, **options):
        super().__init__(book, mixture, **options)
        self.words, self.group = words, group

    def draw(self, rng):
        kind = str(rng.choice(list(self.mixture), p=list(self.mixture.values())))
        return self.next(rng) if kind == "next" else self.steps(rng, kind, **self.parts(rng, kind))

    def next(self, rng):
        ids, weights = super().next(rng)
        audio = sound(ids[1:], self.group, self.ids)
        return np.concatenate([ids[:1], audio]), weights[: len(audio) + 1]

    def parts(self, rng, kind):
        """{"question": ids, and, where they are known: "heard", "said", "audio", "turns"}."""
        book, encode = self.book, self.book.encode
        if kind == "text":
            line = book.lines[rng.integers(len(book.lines))]
            said = encode(tagged(line["answer"], line["manner"]))
            return {"question": encode(line["question"]), "said": said}
        if kind == "tts":
            words, audio = book.spoken(book.voiced[rng.integers(len(book.voiced))])
            return {"question": words, "audio": audio}
        if kind == "asr":
            index = book.spoken_words[rng.choice(len(self.asr_probs), p=self.asr_probs)]
            return {"question": self.noisy(rng, index), "heard": self.transcript(index)}
        if not TASKS[kind].hears:
            index, answer = self.pair(rng, self.written_probs)
            question, turns = encode(book.items[index].text), []
        else:
            index, answer, turns = self.asked(rng)
            question = self.noisy(rng, index)
        said, audio = book.spoken(answer)
        return {"question": question, "heard": self.transcript(index), "said": said,
                "audio": audio, "turns": turns}  # fmt: skip

    def transcript(self, index):
        """Ids of the words of an utterance; noise has none."""
        item = self.book.items[index]
        return [] if item.intent == UNHEARD else self.book.encode(normalise(item.text))

    def asked(self, rng):
        """Places in the book of a spoken question and its answer, and the turns before it."""
        chance = rng.random()
        if chance < FOLLOWS and self.book.follows:
            index = self.book.follows[rng.choice(len(self.follow_probs), p=self.follow_probs)]
            item = self.book.items[index]
            return index, self.book.answers[item.answer_id], turns_before(item)
        turns = self.some_turn(rng, self.book.lines) if chance > 1 - CHATS else []
        return (*self.pair(rng, self.probs), turns)

    def steps(self, rng, kind, question, heard=(), said=(), audio=(), turns=()):
        """One example: ids (N,) and the weight of each as a target (N,), as `Examples.example`."""
        task, texts = TASKS[kind], {"heard": heard, "said": said}
        if task.hears:
            question = sound(question, self.group, self.ids)
        tag = self.words[kind][rng.integers(len(self.words[kind]))]
        asked = prompt(tag, question, self.book.tokenizer, self.ids, turns)
        audio = sound(audio, self.group, self.ids) if task.speaks else ()
        texts = [texts[name] for name in task.texts]
        answer = layout(kind, self.group).arrange(texts, audio, self.ids)
        ids = np.array([*asked, *answer], dtype=np.int64)
        weights = np.zeros(len(ids), dtype=np.float32)
        end = len(asked) - self.open_turn
        weights[end - len(question) + 1 : end] = self.heard
        in_words = ids[len(asked) :] < self.ids.n_text
        weights[len(asked) :] = np.where(in_words, TEXT_WEIGHT, ANSWER_WEIGHT)
        return ids, weights


class StepsTask(LanguageTask):
    """Next-token prediction on packed `StepExamples`. In sound of one codebook a unit competes with
    the other units, and with eot where it could end; no linguistic id is ever a target."""

    def __init__(self, book, mixture, words, group, *, model=None, rows=6, length=512,
                 lr=1e-3, floor=0.02, heard=HEARD_WEIGHT, noise=0.05):  # fmt: skip
        NextToken.__init__(self, book.config, model)
        self.examples = StepExamples(book, mixture, words, group, heard=heard, noise=noise)
        self.rows, self.length, self.lr, self.floor = rows, length, lr, floor
        self.one_codebook = group == UNITS

    def kinds(self, ids):
        kinds = super().kinds(ids)
        return np.where(kinds == LINGUISTIC, SEMANTIC, kinds) if self.one_codebook else kinds

    def head_rows(self):
        text, linguistic, semantic = super().head_rows()
        if self.one_codebook:
            semantic = torch.cat([semantic, torch.tensor([self.ids.eot])])
        return [text, linguistic, semantic]

    def columns(self, targets, kind):
        columns = super().columns(targets, kind)
        if kind == SEMANTIC and self.one_codebook:
            return torch.where(targets == self.ids.eot, self.ids.n_semantic, columns)
        return columns


def left_by(run, stage, module):
    """`module` with the weights that a stage of this run left, or of the one that it is beside, in
    eval mode. Raises ModelError where it has not run."""
    places = [place / "parts" for place in (run.base, run.out) if place]
    there = [place for place in places if (place / f"{stage}.safetensors").exists()]
    return load_part((there or places)[-1], stage, module)


def begin(run, stage, module):
    """Give `module` the weights that a stage starts from: its parent's, or the shipped ones."""
    if stage.parent:
        left_by(run, stage.parent, module).train()
    else:
        run.start(stage, module)
