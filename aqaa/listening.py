"""Hearing a question while it is still being spoken, so that the answer can begin as soon as it ends.

The linguistic encoder hears packets and never takes a code back. The semantic encoder looks both ways: the 30 s piece
that is being spoken is encoded anew at every look, and any of its codes may still change, the last ones most of all
(`aqaa bench streaming` counts them); a finished piece stays. Offline, a question is first brought to a peak of 0.999.
Live, the loudest sample so far stands for the peak, and a louder one starts both encoders over. So does a change of
where the question begins, since silence before it is not encoded (audio.endpoints); the silence after it waits until
there is more to hear. The codes are always those that offline listening would give if the question ended here.
"""

import torch

from aqaa import audio
from aqaa.audio import TOO_SHORT
from aqaa.config import SAMPLE_RATE
from aqaa.processor import suited_to
from aqaa.tokenizers import interleave
from aqaa.tokenizers.semantic import FRAME, PIECE


class Listener:
    """One question: `push(samples)` returns the merged ids heard so far, `finish()` those of the whole.

    model: an AQAA. every: seconds between two looks. history: (role, text) pairs before the question. prefill: None, or
    a Prefill of the backbone, which then reads the prompt as it grows. `restarts` counts how often both encoders began
    anew, the first time not counted.

    `push` first takes the samples (`wav` holds all of them), then looks. Whatever interrupts a look (Ctrl-C, no memory)
    leaves everything as it was before that look: go on with the next packet, and the next look hears both.
    """

    def __init__(self, model, *, every=0.24, history=(), prefill=None):
        self.model, self.history, self.prefill = model, history, prefill
        self.step, self.ids, self.ended, self.restarts = max(1, int(every * SAMPLE_RATE)), [], False, -1
        self.wav, self.peak = torch.zeros(0, device=model.device), torch.full((1,), -1.0, device=model.device)
        self.heard = self.start = self.end = 0  # samples at the last look, and the part of them that was encoded
        self.session, self.linguistic, self.semantic = None, [], []

    def push(self, samples):
        """Hear (n,) float samples at 16 kHz, in packets of any size -> merged ids so far, which may still change.

        Raises AudioError for samples that are no finite numbers and after a minute (the packet is not taken), and
        ValueError after `finish`.
        """
        if self.ended:
            raise ValueError("this question has ended: begin another with listener().")
        wav = torch.cat([self.wav, audio.packet(samples).to(self.wav)])
        if len(wav) > audio.MAX_SECONDS * SAMPLE_RATE:
            raise audio.AudioError(f"the question goes on for more than {audio.MAX_SECONDS} s: ask a shorter one.")
        self.wav = wav
        if len(wav) - self.heard >= self.step:
            with self._threads():
                self._commit(self._look())
        return self.ids

    def finish(self):
        """The question has ended -> its ids: what `model.listen` finds in it. Raises AudioError as that does.

        After an AudioError the question goes on, as if it had not been asked to end.
        """
        if not self.ended:
            audio.load_question((self.wav, SAMPLE_RATE))
            with self._threads():
                state = self._look(final=True)
            if not state["ids"]:
                raise audio.AudioError(TOO_SHORT)
            self._commit({**state, "ended": True})
        return self.ids

    def stream(self, **sampling):
        """`finish`, then the answer as `model.stream` gives it, without reading again what is already read."""
        return self.model.stream(self.finish(), history=self.history, prefill=self.prefill, **sampling)

    def _look(self, final=False):
        """Encode what is new: the attributes that change, by name. Changes nothing itself but the prefill."""
        start, end = audio.endpoints(self.wav)
        peak = self.wav[start:end].abs().amax(0, keepdim=True)
        session, linguistic, semantic, restarts = self.session, self.linguistic, self.semantic, self.restarts
        known = self.end - self.start  # samples that are encoded already
        if session is None or start != self.start or end < self.end or peak != self.peak:
            session, linguistic, semantic, known = self.model.linguistic.start(), [], [], 0
            restarts += 1
        wav = self.wav[start:end]
        fresh, piece = wav[known:], known // PIECE * PIECE
        codes, session = self.model.linguistic.push(session, self._level(fresh, peak), final)
        linguistic = linguistic + codes.tolist()
        if len(fresh):
            codes = self.model.semantic.encode(self._level(wav[piece:], peak), energy_norm=False)
            semantic = semantic[: piece // FRAME] + codes.tolist()
        ids = interleave.merge(linguistic, semantic, self.model.ids)
        if self.prefill and ids:
            self.prefill.read(self.model.prompt(ids, self.history))
        return {
            "heard": len(self.wav), "start": start, "end": end, "peak": peak, "restarts": restarts,
            "session": session, "linguistic": linguistic, "semantic": semantic, "ids": ids,
        }  # fmt: skip

    def _threads(self):
        return suited_to(self.model.linguistic, self.model.semantic, *([self.model.decoder] if self.prefill else []))

    def _commit(self, state):
        vars(self).update(state)  # one call of C: an interrupt comes before all of it or after

    def _level(self, wav, peak):
        """Samples as loud as the whole is made: the peak goes with them as one more sample."""
        return audio.energy_norm(torch.cat([wav, peak]))[:-1]
