"""Hearing a question several times, each time a little later, where an answer begins unsurely.

A code stands for 40 or 60 ms of sound, and where the first one begins is chance: after 20 ms of
silence the same words get other codes. What one hearing mistakes the others often do not, so the
first words of an answer that is not sure of them are chosen anew, by what all hearings think of
them on the average; the answer then goes on from the hearing that finds these words likeliest. Who
is sure pays nothing. This is not of the paper; nothing was trained for it.
"""

import torch

from aqaa.answer import confidence
from aqaa.backbone.generation import Decoder, Step, Vocabulary, embed, generate, left_padded
from aqaa.config import SAMPLE_RATE
from aqaa.tokenizers.dialogue import Resumed

SHIFTS = 0, 20, 40, 60  # ms of silence before the question, one hearing each
BLOCK = 10  # ids: as many words as come before the first sound of an answer


class Heard(list):
    """Merged ids of a question that can be heard again: wav (N,) is its sound at 16 kHz."""

    def __init__(self, ids, wav):
        super().__init__(ids)
        self.wav = wav


class Prompt(list):
    """Ids of a dialogue whose question is a Heard; made(ids) is the same dialogue of other ids."""

    def __init__(self, question, made):
        super().__init__(made(list(question)))
        self.wav, self.made = question.wav, made

    def hearings(self, encode):
        """A prompt (a list of ids) for each of SHIFTS; encode: waves -> the merged ids of each."""
        quiet = [self.wav.new_zeros(shift * SAMPLE_RATE // 1000) for shift in SHIFTS]
        return map(self.made, encode([torch.cat([silence, self.wav]) for silence in quiet]))


def surely(model, decoder, prompt, layout, sampling):
    """Steps of an AQAA's answer to a prompt, by its `decoder`; sampling as of `generate`."""
    steps = generate(decoder, prompt, model.ids, layout, **sampling)
    if model.config.confidence.again and isinstance(prompt, Prompt):
        begun = first_words(steps)
        if unsure(model, prompt, begun):
            hearings = list(prompt.hearings(model.encode))
            begun, prompt = together(decoder, hearings, model.ids, layout, len(begun))
            said = tuple(step.id for step in begun)
            rest = {**sampling, "max_tokens": sampling["max_tokens"] - len(said)}
            steps = generate(decoder, [*prompt, *said], model.ids, Resumed(layout, said), **rest)
        yield from begun
    yield from steps


def first_words(steps):
    """The Steps up to the first that is sound, or until BLOCK of them are words; takes no more."""
    begun, words = [], 0
    for step in steps:
        begun.append(step)
        words += step.kind == "text"
        if words == BLOCK or step.kind not in ("text", "marker"):
            break
    return begun


def unsure(model, prompt, begun):
    """Whether an answer to a prompt, begun with these Steps, should hear its question again."""
    how, words = model.config.confidence, any(step.kind == "text" for step in begun)
    return isinstance(prompt, Prompt) and words and confidence(begun, how) < how.again


@torch.inference_mode()
def together(model, prompts, ids, layout, most=BLOCK):
    """(Steps of the likeliest words, `most` at most, by the mean of what K prompts, lists of ids,
    say; the prompt that finds them likeliest). model: a backbone.

    The mean is of log probs: a word that one hearing rules out does not pass.
    """
    machine, vocabulary, steps, total = layout.machine(ids), Vocabulary(model), [], 0
    new = left_padded(model, prompts)  # embeddings (K, T, D), padding (K, T)
    decoder = Decoder(model, len(prompts), new[0].shape[1] + most)
    while not machine.finished and len(steps) < most and (may := machine.allowed()).kind == "text":
        each = vocabulary.scores(decoder.feed(*new), may).log_softmax(-1)  # (K, R)
        mean = each.mean(0).log_softmax(-1)  # (R,)
        best = int(mean.argmax())
        token = int(vocabulary.legal(may)[best])
        steps.append(Step(token, "marker" if token in may.markers else "text", float(mean[best])))
        machine.advance(token)
        total += each[:, best]
        new = (embed(model, [[token]] * len(prompts)),)  # all go on with the same word
    return steps, prompts[int(total.argmax())] if steps else prompts[0]
