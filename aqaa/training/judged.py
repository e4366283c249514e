"""Answers of a backbone to questions of a book, judged: the words by rule, the sound by an ear.

Questions are ids already, so a backbone alone answers them; sound is only made for the ear."""

from dataclasses import dataclass

import numpy as np

from aqaa.backbone.generation import generate_batch
from aqaa.batching import MAX_ANSWER, speak_ids
from aqaa.config import TTS
from aqaa.evaluation.accuracy import make_judge
from aqaa.pipeline import MIN_AUDIO
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import normalise, tagged


@dataclass
class Judged:
    """One answer. `sound` and `agrees` are None until an ear has heard it."""

    question: int  # its place in the book
    ids: list  # up to eot
    whole: bool  # it ended before the room did
    text: str  # with its manner, as "(slow) …"
    audio: list  # whole groups
    logprob: float  # mean of its audio ids
    right: bool  # the text is right by the rule
    heard: str = ""
    sound: bool | None = None  # the expected words are heard
    agrees: bool | None = None  # its own words are heard

    @property
    def score(self):
        """2: words and sound are right; a sound that nobody judged counts as right."""
        return self.right + (self.sound is not False and self.right)


def expected(book, question):
    """The text that answers a question of a book, with its manner, as the tokenizer writes it."""
    item = book.items[question]
    return book.tokenizer.decode(book.encode(tagged(item.answer, item.manner)))


def exactly(book, question, text):
    """The rule of closed questions: the text is the expected one, manner included."""
    return text == expected(book, question)


def prompts(book, questions):
    """Prompts of the spoken questions at these places of a book."""
    turns = [[("user", book.audio[i])] for i in questions]
    return [dialogue.prompt(turn, book.tokenizer, book.config.ids) for turn in turns]


def answers(backbone, book, questions, layout, *, asked=None, rule=exactly, max_tokens=None,
            **sampling):  # fmt: skip
    """[Judged, …] of the words only. questions: places in the book; asked: other prompts for them;
    rule(book, question, text) says whether a text is right; max_tokens: MAX_ANSWER by default;
    sampling: temperature, top_p, seed."""
    ids, result = book.config.ids, []
    steps = generate_batch(backbone.eval(), asked or prompts(book, questions), ids, layout,
                           max_tokens=max_tokens or MAX_ANSWER, min_audio=MIN_AUDIO,
                           **sampling)  # fmt: skip
    for question, row in zip(questions, steps, strict=True):
        tokens = [step.id for step in row]
        text, audio = layout.parse(tokens, ids)
        text = book.tokenizer.decode(text)
        spoken = [step.logprob for step in row if step.kind in ("linguistic", "semantic")]
        result.append(Judged(
            question, tokens, bool(tokens) and tokens[-1] == ids.eot, text,
            interleave.groups(audio, ids).reshape(-1).tolist(),
            float(np.mean(spoken)) if spoken else 0.0, rule(book, question, text),
        ))  # fmt: skip
    return result


def say(backbone, book, texts, **sampling):
    """Audio ids of texts in the answer voice, by the model's own synthesis: a list of lists."""
    ids = book.config.ids
    asked = [dialogue.prompt([("user", book.encode(text))], book.tokenizer, ids, marker=TTS)
             for text in texts]  # fmt: skip
    steps = generate_batch(backbone.eval(), asked, ids, dialogue.layout("audio_only"),
                           max_tokens=MAX_ANSWER, min_audio=MIN_AUDIO, **sampling)  # fmt: skip
    rows = [interleave.groups([step.id for step in row], ids) for row in steps]
    return [row.reshape(-1).tolist() for row in rows]


def listen(model, book, judged, workers=1, seed=0, progress=None):
    """Let pocketsphinx hear every answer and fill in `heard`, `sound` and `agrees`.

    model: an AQAA, whose vocoder speaks; book: the questions' one. The ear chooses among all
    answers of the book and all texts that were written."""
    known = {normalise(item.answer) for item in book.items if item.answer}
    texts = [normalise(one.text) for one in judged]
    judge, _ = make_judge(known, texts, seed)
    sounds = [speak_ids(model, one.audio, seed) for one in judged]
    for one, text, words in zip(judged, texts, judge.hear_all(sounds, False, workers, progress)):
        one.heard = words
        one.sound = words == normalise(book.items[one.question].answer)
        one.agrees = bool(words) and words == text
