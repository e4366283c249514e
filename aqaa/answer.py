"""What an answer holds, and the times it took."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp, log
from typing import NamedTuple

import torch

from aqaa import audio


@dataclass(frozen=True)
class Piece:
    """A part of an answer: its words and (N,) float32 samples on the CPU; either may be empty."""

    text: str
    audio: torch.Tensor


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    audio (N,) float32 on the CPU at sample_rate; tokens: ids by name ("prompt", "answer", "text")
    and codes ("linguistic", "semantic"); timings and pieces: see Ledger; confidence: probability
    that the text is right, see pipeline.confidence.
    """

    text: str
    audio: torch.Tensor
    sample_rate: int
    tokens: dict
    timings: dict
    confidence: float
    pieces: tuple = ()

    @property
    def playout(self):
        """When this answer could have begun to sound, see `playout`."""
        return playout(self.pieces)

    @property
    def seconds(self):
        """Length of the sound."""
        return len(self.audio) / self.sample_rate

    @property
    def real_time_factor(self):
        """Seconds of work for a second of sound."""
        return self.timings["total"] / max(self.seconds, 1e-9)

    def save(self, path):
        """Write the sound as a wav file. Raises AudioError."""
        audio.write(path, self.audio, self.sample_rate)


class Playout(NamedTuple):
    """delay: s to wait so that speech never stalls; gaps: s of silence before each piece if not."""

    delay: float
    gaps: tuple


def playout(pieces):
    """(ready, seconds) of each piece in turn, `ready` counted from the beginning -> Playout.

    A player that starts each piece as soon as it is ready is silent for the gaps. Their sum, waited
    before the first piece, leaves no gap between the others.
    """
    end = 0.0  # when the pieces so far have been played
    gaps = []
    for ready, seconds in pieces:
        gaps.append(max(0.0, ready - end))
        end = max(ready, end) + seconds
    return Playout(sum(gaps), tuple(gaps))


@dataclass
class Ledger:
    """Seconds of read, linguistic, semantic, generate, vocode, first_token, first_audio, total.

    first_* count from the start; first_audio_share is the share of the answer's ids known when the
    first sound came (not a time). pieces: (when ready, length) of each part of the sound, seconds.
    """

    began: float = field(default_factory=time.perf_counter)
    times: dict = field(default_factory=dict)
    pieces: list = field(default_factory=list)

    @contextmanager
    def step(self, name):
        """Add the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start

    def mark(self, name):
        """Note the time since the beginning, once."""
        self.times.setdefault(name, time.perf_counter() - self.began)


def confidence(steps, how):
    """Probability that the text of an answer's Steps is right, 0 without text. how: the
    ConfidenceConfig that makes it of the geometric mean of the probabilities of its ids."""
    logprobs = [step.logprob for step in steps if step.kind == "text"]
    if not logprobs:
        return 0.0
    # A mean of 1 has no logit: 1 - 1e-7 is as near to it as fp32 comes.
    mean = min(max(exp(sum(logprobs) / len(logprobs)), 1e-7), 1 - 1e-7)
    return 1 / (1 + exp(-how.slope * log(mean / (1 - mean)) - how.offset))
