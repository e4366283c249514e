"""Hearing a question while it is still being spoken, so that the answer can begin as soon as it ends.

The linguistic encoder hears packets and never takes a code back. The semantic encoder looks both ways: the 30 s piece
that is being spoken is encoded anew at every look, and any of its codes may still change, the last ones most of all
(`aqaa bench streaming` counts them); a finished piece stays. Offline, a question is first brought to a peak of 0.999.
Live, the loudest sample so far stands for the peak, and a louder one starts both encoders over: the codes are always
those that offline listening would give if the question ended here.
"""

import torch

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.pipeline import TOO_SHORT
from aqaa.tokenizers import interleave
from aqaa.tokenizers.semantic import FRAME, PIECE


class Listener:
    """One question: `push(samples)` returns the merged ids heard so far, `finish()` those of the whole.

    model: an AQAA. every: seconds between two looks. history: (role, text) pairs before the question. prefill: None, or
    a Prefill of the backbone, which then reads the prompt as it grows. `restarts` counts the louder samples.
    """

    def __init__(self, model, *, every=0.24, history=(), prefill=None):
        self.model, self.history, self.prefill = model, history, prefill
        self.step, self.ids, self.ended, self.restarts = max(1, int(every * SAMPLE_RATE)), [], False, -1
        self.wav, self.peak = torch.zeros(0, device=model.device), torch.full((1,), -1.0, device=model.device)
        self.heard = 0  # samples at the last look

    def push(self, samples):
        """Hear (n,) float samples at 16 kHz, in packets of any size -> merged ids so far, which may still change.

        Raises AudioError after a minute, ValueError after `finish`.
        """
        if self.ended:
            raise ValueError("this question has ended: begin another with listener().")
        self.wav = torch.cat([self.wav, torch.as_tensor(samples).to(self.wav)])
        if len(self.wav) > audio.MAX_SECONDS * SAMPLE_RATE:
            raise audio.AudioError(f"the question goes on for more than {audio.MAX_SECONDS} s: ask a shorter one.")
        if len(self.wav) - self.heard >= self.step:
            self._look()
        return self.ids

    def finish(self):
        """The question has ended -> its ids: what `model.listen` finds in it. Raises AudioError as that does."""
        if not self.ended:
            audio.load_question((self.wav, SAMPLE_RATE))
            self._look(final=True)
            if not self.ids:
                raise audio.AudioError(TOO_SHORT)
            self.ended = True
        return self.ids

    def stream(self, **sampling):
        """`finish`, then the answer as `model.stream` gives it, without reading again what is already read."""
        return self.model.stream(self.finish(), history=self.history, prefill=self.prefill, **sampling)

    def _look(self, final=False):
        if (peak := self.wav.abs().amax(0, keepdim=True)) > self.peak:
            self.peak, self.heard, self.restarts = peak, 0, self.restarts + 1
            self.session, self.linguistic, self.semantic = self.model.linguistic.start(), [], []
        fresh, piece = self.wav[self.heard :], self.heard // PIECE * PIECE
        codes, self.session = self.model.linguistic.push(self.session, self._level(fresh), final)
        self.linguistic = self.linguistic + codes.tolist()
        if len(fresh):
            codes = self.model.semantic.encode(self._level(self.wav[piece:]), energy_norm=False)
            self.semantic = self.semantic[: piece // FRAME] + codes.tolist()
        self.heard = len(self.wav)
        self.ids = interleave.merge(self.linguistic, self.semantic, self.model.ids)
        if self.prefill and self.ids:
            self.prefill.read(self.model.prompt(self.ids, self.history))

    def _level(self, wav):
        """Samples as loud as the whole is made: the peak goes with them as one more sample."""
        return audio.energy_norm(torch.cat([wav, self.peak]))[:-1]
