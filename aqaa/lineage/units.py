"""Answers in steps: texts, one behind the other, then sound, all in one sequence of ids.

SpeechGPT and AudioPaLM tell one model by words in the prompt which of several tasks it has, and
both let it write what it will say before it says it. `TASKS` names the tasks, `Steps` is the layout
of an answer: every text but a last one ends with text_end, the sound is whole groups, eot ends all.
The letters of a group are kinds of ids: "SSS" are 120 ms of one codebook, the semantic one, and
"LLSSS" the mini's merged groups (AQAA paper 2.1)."""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from aqaa.backbone.generation import generate
from aqaa.config import SAMPLE_RATE
from aqaa.lineage.system import SILENCE, Aqaa, Reply
from aqaa.pipeline import MIN_AUDIO, SAMPLING
from aqaa.processor import suited
from aqaa.tokenizers import dialogue
from aqaa.tokenizers.dialogue import END_OF_SEQUENCE, Allowed
from aqaa.weights.model_folder import build

UNITS, MERGED = "SSS", "LLSSS"


class Task(NamedTuple):
    """hears: the question is sound, else text; texts: which are written, "heard", the words of the
    question, and "said", those of the answer; speaks: sound follows."""

    hears: bool
    texts: tuple
    speaks: bool


TASKS = {
    "asr": Task(True, ("heard",), False),
    "tts": Task(False, (), True),
    "text": Task(False, ("said",), False),
    "answer": Task(True, ("said",), False),
    "asr_answer": Task(True, ("heard", "said"), False),
    "direct": Task(True, (), True),
    "read": Task(False, ("said",), True),
    "speak": Task(True, ("said",), True),
    "chain": Task(True, ("heard", "said"), True),
}


def layout(task, group):
    """Steps of the answers to a task whose sound has groups of these letters."""
    return Steps(len(TASKS[task].texts), group if TASKS[task].speaks else "")


def prompt(tag, question, tokenizer, ids, turns=()):
    """Ids of a dialogue whose last question, a list of ids, stands behind the words of its task."""
    return dialogue.prompt([*turns, ("user", [tag, question])], tokenizer, ids)


def sound(audio, group, ids):
    """What a system with these groups reads of merged audio ids (N,), an array."""
    return audio[audio >= ids.semantic_start] if group == UNITS else audio


@dataclass(frozen=True)
class Steps:
    """A Layout (see tokenizers/dialogue.py) of `texts` texts, then sound in groups; "": none."""

    texts: int
    group: str = ""

    def arrange(self, texts, audio, ids):
        """The answer's ids, eot included. texts: a list of lists of text ids; audio: (N,) ids.

        Raises ValueError where the machine does not allow such an answer."""
        parts = [[*map(int, text)] for text in texts]
        answer = [token for text in parts for token in (*text, ids.text_end)]
        if not self.group and answer:
            answer.pop()  # there eot ends the last text
        answer += [*map(int, audio), ids.eot]
        machine = self.machine(ids)
        for token in answer:
            machine.advance(token)
        return answer

    def split(self, tokens, ids):
        """(the texts, lists of ids; the audio ids) of an answer, up to its eot."""
        texts, audio = [[]], []
        for token in map(int, tokens):
            if token in (ids.eot, END_OF_SEQUENCE):
                break
            if token == ids.text_end:
                texts.append([])
            elif token >= ids.first_text:
                (texts[-1] if token < ids.n_text else audio).append(token)
        return (texts + [[]] * self.texts)[: self.texts], audio

    def parse(self, tokens, ids):
        """(ids of the last text, audio ids): the words of the answer and its sound."""
        texts, audio = self.split(tokens, ids)
        return texts[-1] if texts else [], audio

    def machine(self, ids, min_audio=0):
        return Machine(self, ids, min_audio)


class Machine:
    """Follows an answer id by id: text after text, then group after group, then eot.

    The last text has at least one id; those before it may be empty, as noise has no words."""

    def __init__(self, steps, ids, min_audio=0):
        self.steps, self.ids, self.min_audio = steps, ids, min_audio
        self.texts_done = self.in_text = self.audio_total = 0
        self.finished = False

    def allowed(self):
        """Allowed: the kind and range of the next id, and the markers that may come instead."""
        ids, group = self.ids, self.steps.group
        if self.finished:
            return Allowed("end", 0, 0, ())
        if self.texts_done < self.steps.texts:
            last = self.texts_done == self.steps.texts - 1
            end = ids.eot if last and not group else ids.text_end
            markers = () if last and not self.in_text else (end,)
            return Allowed("text", ids.first_text, ids.n_text, markers)
        place = self.audio_total % len(group)
        # A group that is cut short would leave codes that the vocoder cannot use.
        ends = place == 0 and self.audio_total >= max(self.min_audio, 1)
        markers = (ids.eot,) if ends else ()
        if group[place] == "L":
            return Allowed("linguistic", ids.n_text, ids.semantic_start, markers)
        return Allowed("semantic", ids.semantic_start, ids.end, markers)

    def advance(self, token):
        """Take the next id. Raises ValueError if it is not legal here."""
        may = self.allowed()
        if token not in may.markers and not may.start <= token < may.stop:
            legal = f"{may.kind} {may.start}..{may.stop - 1} or {may.markers}"
            raise ValueError(f"id {token} is not legal here: {legal}")
        if token == self.ids.eot:
            self.finished = True
        elif token == self.ids.text_end:
            self.texts_done, self.in_text = self.texts_done + 1, 0
        elif may.kind == "text":
            self.in_text += 1
        else:
            self.audio_total += 1


class Stepwise(Aqaa):
    """A system whose one language model is told its task in words and answers in steps.

    A class of it has `stage`, the last one of the model's training; `words`, {task: (what heads the
    question, …)}; `group`; and merged(audio ids) -> the ids that the vocoder takes. task: of TASKS,
    that of its answers."""

    stage, words, group = "", {}, MERGED

    def __init__(self, model, seed=0, folder=None, task="chain"):
        super().__init__(model, seed, folder)
        self.task = task

    @cached_property
    def language(self):
        return self.part(self.stage, build("backbone", self.model.config, plain=True))

    def answer(self, turns):
        began, said = time.monotonic(), self.before(turns[:-1])
        texts, audio = self.think(turns[-1], said)
        merged, words = self.merged(audio), texts[-1] if texts else ""
        wave = self.model.synthesize(merged, seed=self.seed) if merged else SILENCE
        took, rate = time.monotonic() - began, self.model.vocoder.sample_rate
        return Reply(words, np.asarray(wave, np.float32), rate, took, took)  # it speaks last

    def heard(self, turn, said):
        (transcript, words), _ = self.think(turn, said, "chain")
        return transcript, words

    def think(self, turn, said=(), task=None):
        """([text, …], audio ids) that follow a spoken question (N,) behind earlier turns."""
        task, ids, text = task or self.task, self.model.ids, self.model.text
        question = sound(np.array(self.model.listen((turn, SAMPLE_RATE))), self.group, ids)
        asked = prompt(self.words[task][0], question, text, ids, said)
        steps = layout(task, self.group)
        options = {**SAMPLING, "seed": self.seed, "min_audio": MIN_AUDIO}
        drawn = suited(generate(self.language, asked, ids, steps, **options), self.language)
        texts, audio = steps.split([step.id for step in drawn], ids)
        return [text.decode(one).strip() for one in texts], audio
