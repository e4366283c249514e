"""Encoding a question while it is being spoken, so that the answer can begin as soon as it ends.

The linguistic encoder is causal: it takes packets and never changes a code. The semantic encoder
looks both ways: the 30 s piece being spoken is encoded anew at every look, and any of its codes may
still change, most often the last ones (`aqaa bench streaming` counts them); a finished piece stays.
Offline, a question is first brought to a peak of 0.999. Live, the loudest sample so far stands for
the peak, and a louder one starts both encoders over. So does a new beginning of the question, since
silence before it is not encoded (audio.endpoints); silence after it waits until more is spoken. The
codes are always those that offline listening gives if the question ends here.
"""

import torch

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.hearings import Heard
from aqaa.processor import suited_to
from aqaa.tokenizers import interleave
from aqaa.tokenizers.semantic import FRAME, PIECE


class Listener:
    """One question: `push(samples)` returns the merged ids so far, `finish()` those of the whole.

    model: an AQAA. every: seconds between two looks. history: (role, text) pairs before the
    question. prefill: None, or a Prefill of the backbone, which reads the prompt as it grows.
    `restarts` counts how often both encoders began anew, the first time not counted.

    `push` takes the samples into `wav`, then looks. An interrupt of a look (Ctrl-C, no memory)
    leaves everything else as it was: the next look encodes both packets.
    """

    def __init__(self, model, *, every=0.24, history=(), prefill=None):
        self.model, self.history, self.prefill = model, history, prefill
        self.step = max(1, int(every * SAMPLE_RATE))  # samples between two looks
        self.wav = torch.zeros(0, device=model.device)  # (N,)
        self.ids, self.ended = [], False
        # What the last look knew; these are set together.
        self.heard = self.start = self.end = 0  # samples so far, and the part that was encoded
        self.peak = torch.full((1,), -1.0, device=model.device)  # of that part; -1: none yet
        self.session, self.linguistic, self.semantic = None, [], []
        self.restarts = -1

    def push(self, samples):
        """Take (n,) float samples at 16 kHz, any n -> merged ids so far, which may still change.

        Raises AudioError for samples that are no finite numbers and after a minute (the packet is
        not taken), and ValueError after `finish`.
        """
        if self.ended:
            raise ValueError("this question has ended: begin another with listener().")
        wav = torch.cat([self.wav, audio.packet(samples).to(self.wav)])
        if len(wav) > audio.MAX_SECONDS * SAMPLE_RATE:
            limit = f"more than {audio.MAX_SECONDS} s"
            raise audio.AudioError(f"the question goes on for {limit}: ask a shorter one.")
        self.wav = wav
        if len(wav) - self.heard >= self.step:
            with self._threads():
                state = self._look()
            vars(self).update(state)  # one call of C: an interrupt comes before all of it or after
        return self.ids

    def finish(self):
        """End the question -> its ids, equal to `model.listen` of all samples. Raises AudioError.

        After an AudioError the question goes on, as if it had not been asked to end.
        """
        if not self.ended:
            vars(self).update(self._last_look(), ended=True)
        return self.ids

    def peek(self):
        """The ids of the whole if the question ended here; it goes on. Raises AudioError."""
        return self._last_look()["ids"]

    def _last_look(self):
        """What `_look` finds if no more comes. Raises AudioError where that is no question."""
        audio.load_question((self.wav, SAMPLE_RATE))  # the checks of a question in a file
        with self._threads():
            state = self._look(final=True)
        if not state["ids"]:
            raise audio.AudioError(audio.TOO_SHORT)
        return state

    def stream(self, **sampling):
        """`finish`, then the answer as `model.stream` gives it; the prefill is not read again."""
        ids = self.finish()
        return self.model.stream(ids, history=self.history, prefill=self.prefill, **sampling)

    def _look(self, final=False):
        """Encode what is new: the changed attributes by name. Changes nothing but the prefill."""
        start, end = audio.endpoints(self.wav)
        wav = self.wav[start:end]
        peak = wav.abs().amax(0, keepdim=True)  # (1,)
        session, linguistic, semantic = self.session, self.linguistic, self.semantic
        n_encoded = self.end - self.start
        # Codes depend on where the question starts and on its level: if either moved, start over.
        moved = start != self.start or end < self.end or bool(peak != self.peak)
        if restart := session is None or moved:
            session, linguistic, semantic = self.model.linguistic.start(), [], []
            n_encoded = 0
        # Causal: only the new samples go in, and old codes stay.
        new = self._level(wav[n_encoded:], peak)
        codes, session = self.model.linguistic.push(session, new, final)
        linguistic = linguistic + codes.tolist()
        # Both ways, in pieces of 30 s: the piece being spoken is encoded again as a whole.
        if len(wav) > n_encoded:
            piece = n_encoded // PIECE * PIECE  # its first sample
            codes = self.model.semantic.encode(self._level(wav[piece:], peak), energy_norm=False)
            semantic = semantic[: piece // FRAME] + codes.tolist()
        ids = Heard(interleave.merge(linguistic, semantic, self.model.ids), wav)
        if self.prefill and ids:
            prompt = self.model.prompt(ids, self.history)
            self.prefill.suit(self.model.decoder_for(prompt))
            self.prefill.read(prompt)
        return {
            "heard": len(self.wav), "start": start, "end": end, "peak": peak, "session": session,
            "restarts": self.restarts + restart, "linguistic": linguistic, "semantic": semantic,
            "ids": ids,
        }  # fmt: skip

    def _threads(self):
        decoder = [self.model.decoder] if self.prefill else []
        return suited_to(self.model.linguistic, self.model.semantic, *decoder)

    def _level(self, wav, peak):
        """Samples at the level of the whole question: its peak goes along as one more sample."""
        return audio.energy_norm(torch.cat([wav, peak]))[:-1]
