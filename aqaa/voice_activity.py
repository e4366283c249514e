"""Is somebody speaking? One answer for each frame of a microphone, from nothing but its past."""

from collections import deque

import numpy as np

from aqaa.config import SAMPLE_RATE

QUIETEST = -60.0  # dB below full scale: nothing fainter is speech
UNKNOWN = -45.0  # dB: the background is taken to be no louder until it has been heard
MEMORY = 3.0  # seconds in which a speaker breathes once, so that the background shows
BAND = 80, 4000  # Hz
PITCH = 70, 400  # Hz
EMPHASIS = 0.9  # as filter banks have: a rumble is wide then, else it would come back like a voice
NO_SILERO = "silero-vad is not installed: pip install silero-vad, or use the detector `energy`."


class Activity:
    """Energy over the background, and periodicity: detector(frame) -> whether it is speech.

    A frame, (320,) float at 16 kHz, is 20 ms. Speech begins with a frame that is `on` dB louder
    than the background and voiced: `periodic` is how much of the last 40 ms comes back after one
    period of a voice (1: all; noise stays below 0.3). It goes on while frames are `off` dB louder
    and one of the last `hold` seconds was voiced (hysteresis: consonants are fainter and have no
    pitch), and through dips of `gap` seconds. The background is the faintest 100 ms of MEMORY."""

    frame = 320

    def __init__(self, on=9.0, off=5.0, periodic=0.5, hold=0.3, gap=0.06):
        self.on, self.off, self.periodic, self.hold, self.gap = on, off, periodic, hold, gap
        self.seconds = self.frame / SAMPLE_RATE
        self._window = np.zeros(2 * self.frame, np.float32)
        self._recent = deque(maxlen=5)  # dB of 100 ms
        self._smooth = deque([UNKNOWN], maxlen=int(MEMORY / self.seconds))
        self._unvoiced = self._faint = np.inf  # seconds since the last voiced, the last loud frame
        self.speech = False

    def __call__(self, frame):
        frame = np.asarray(frame, np.float32)
        self._window = np.concatenate([self._window[len(frame) :], frame])
        level, periodic = spectral(self._window)
        self._recent.append(level)
        self._smooth.append(float(np.mean(self._recent)))
        over = level - max(min(self._smooth), QUIETEST)
        voiced = periodic > self.periodic and over > self.off
        self._unvoiced = 0.0 if voiced else self._unvoiced + self.seconds
        self._faint = 0.0 if over > self.off else self._faint + self.seconds
        if self.speech:
            self.speech = self._faint <= self.gap and self._unvoiced <= self.hold
        else:
            self.speech = voiced and over > self.on
        return self.speech


def spectral(window):
    """(N,) samples at 16 kHz -> (dB of the band of speech, its periodicity from 0 to 1)."""
    window = window[1:] - EMPHASIS * window[:-1]
    n = len(window)
    power = np.abs(np.fft.rfft(window - window.mean(), 4 * n)) ** 2
    hertz = np.arange(len(power)) * SAMPLE_RATE / (4 * n)
    power[(hertz < BAND[0]) | (hertz > BAND[1])] = 0
    # Wiener-Khinchin: the spectrum of the power is the autocorrelation.
    correlation = np.fft.irfft(power)
    energy = correlation[0] / n
    first, last = SAMPLE_RATE // PITCH[1], SAMPLE_RATE // PITCH[0]
    lags = np.arange(first, last)
    share = correlation[first:last] / max(correlation[0], 1e-12) / (1 - lags / n)  # fewer products
    return 10 * np.log10(energy + 1e-12), float(np.clip(share.max(), 0, 1))


class Silero:
    """The network of the package silero-vad in the same place, with its own hysteresis."""

    frame = 512

    def __init__(self, on=0.5, off=0.35):
        try:
            from silero_vad import load_silero_vad
        except ModuleNotFoundError:
            raise ValueError(NO_SILERO) from None
        self.network, self.on, self.off, self.speech = load_silero_vad(), on, off, False

    def __call__(self, frame):
        prob = self.network(frame, SAMPLE_RATE).item()
        self.speech = prob > (self.off if self.speech else self.on)
        return self.speech


class Pressed:
    """Everything is speech, as long as it comes: for a button, or a server's client, that says
    when a question begins and ends (`Conversation.commit`)."""

    frame = 320

    def __call__(self, frame):
        return True


DETECTORS = {"energy": Activity, "silero": Silero, "pressed": Pressed}


def detector(name):
    """A new detector by its name. Raises ValueError."""
    if name not in DETECTORS:
        raise ValueError(f"there is no detector {name!r}: choose one of {', '.join(DETECTORS)}.")
    return DETECTORS[name]()
