"""Hearing a question several times, each time a little later, where an answer begins unsurely.

A code stands for 40 or 60 ms of sound, and where the first one begins is chance: after 20 ms of
silence the same words get other codes. What one hearing mistakes the others often do not, so the
first words of an answer that is not sure of them are chosen anew, by what all hearings think of
them on the average; the answer then goes on from the hearing that finds these words likeliest. Who
is sure pays nothing. This is not of the paper; nothing was trained for it.
"""

import torch

from aqaa.answer import confidence
from aqaa.backbone.generation import Prefill, Step, Vocabulary, embed, fork, generate
from aqaa.config import GROUP_SIZE, SAMPLE_RATE
from aqaa.tokenizers.dialogue import Resumed

SHIFTS = 20, 40, 60  # ms of silence before the question, one more hearing each
LONGER = 2 * GROUP_SIZE  # ids that the latest hearing may have more than the first
BLOCK = 10  # ids: as many words as come before the first sound of an answer


class Heard(list):
    """Merged ids of a question that can be heard again: wav (N,) is its sound at 16 kHz."""

    def __init__(self, ids, wav):
        super().__init__(ids)
        self.wav = wav


class Prompt(list):
    """Ids of a dialogue whose question is a Heard; made(ids) is the same dialogue of other ids."""

    def __init__(self, question, made):
        super().__init__(made(question))
        self.wav, self.made = question.wav, made

    def hearings(self, encode):
        """Lists of ids: itself, and one for each of SHIFTS; encode: waves -> the ids of each."""
        quiet = [self.wav.new_zeros(shift * SAMPLE_RATE // 1000) for shift in SHIFTS]
        return [list(self), *map(self.made, encode([torch.cat([one, self.wav]) for one in quiet]))]


def surely(model, decoder, prompt, layout, sampling):
    """Steps of an AQAA's answer to a prompt, by its `decoder`; sampling as of `generate`."""
    steps = generate(decoder, prompt, model.ids, layout, **sampling)
    if model.config.confidence.again and isinstance(prompt, Prompt):
        begun, most = first_words(steps), sampling["max_tokens"]
        if unsure(model, prompt, begun):
            # No sound was made yet, so these words can still be taken back.
            prefill = sampling.get("prefill") or Prefill(decoder, len(prompt) + LONGER + most)
            hearings = prompt.hearings(model.encode)
            begun, prompt = together(hearings, model.ids, layout, prefill, len(begun))
            # The rest follows them as if the chosen hearing had said them by itself.
            said = tuple(step.id for step in begun)
            rest = {**sampling, "max_tokens": most - len(said), "prefill": prefill}
            prompt, layout = [*prompt, *said], Resumed(layout, said)
            steps = generate(decoder, prompt, model.ids, layout, **rest)
        yield from begun
    yield from steps


def first_words(steps):
    """The Steps up to the first that is sound, or until BLOCK of them are words; takes no more."""
    begun = []
    for step in steps:
        begun.append(step)
        words = sum(one.kind == "text" for one in begun)
        if step.kind not in ("text", "marker") or words == BLOCK:
            break
    return begun


def unsure(model, prompt, begun):
    """Whether an answer to a prompt, begun with these Steps, should hear its question again."""
    how, words = model.config.confidence, any(step.kind == "text" for step in begun)
    return isinstance(prompt, Prompt) and words and confidence(begun, how) < how.again


@torch.inference_mode()
def together(prompts, ids, layout, prefill, most=BLOCK):
    """(Steps of the likeliest words, `most` at most, by the mean of what K prompts, lists of ids,
    say; the prompt that finds them likeliest). prefill: a Prefill of the backbone.

    The mean is of log probs: a word that one hearing rules out does not pass.
    """
    machine, model, steps, total = layout.machine(ids), prefill.decoder.model, [], 0
    vocabulary, decoders, hidden = Vocabulary(model), [], []
    prefill.read(prompts[0])
    for prompt in prompts:  # they begin alike, up to the question: that is read once
        known = prefill.known(prompt)
        decoders.append(fork(prefill.decoder, known, len(prompt) + most))
        hidden.append(decoders[-1].feed(embed(model, [prompt[known:]])))
    while not machine.finished and len(steps) < most and (may := machine.allowed()).kind == "text":
        each = vocabulary.scores(torch.cat(hidden), may).log_softmax(-1)  # (K, R)
        mean = each.mean(0).log_softmax(-1)  # (R,)
        best = int(mean.argmax())
        token = int(vocabulary.legal(may)[best])
        steps.append(Step(token, "marker" if token in may.markers else "text", float(mean[best])))
        machine.advance(token)
        total += each[:, best]
        new = embed(model, [[token]])  # all go on with the same word
        hidden = [decoder.feed(new) for decoder in decoders]
    return steps, prompts[int(total.argmax())] if steps else prompts[0]
