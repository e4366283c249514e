"""Sound that nobody could understand, for the answer that says so: spoilt speech, or none."""

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

from aqaa.config import SAMPLE_RATE
from aqaa.corpus.degrade import noise, rms
from aqaa.corpus.voices import to_16k

SPEAKERS = ("en-us+m2", "en-us+f2", "en+m5", "en-us+f5")  # of espeak-ng


def speakers(kind):
    """Voices of espeak-ng that a kind of noise is made of."""
    return SPEAKERS[: {"reversed": 1, "muffled": 1, "crowd": 4}.get(kind, 0)]


def spoil(kind, spoken, how):
    """(samples (N,) float, 16000) of a kind: hiss, hum, tones, reversed, crowd, muffled.

    spoken: (samples, rate) of each speaker; how: a Draw, from which chance is taken."""
    rng = np.random.default_rng(int(1e6 * how.lead))
    waves = [to_16k(*one) for one in spoken]
    seconds = rng.uniform(0.8, 4)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE  # (N,) s
    if kind == "reversed":
        wave = waves[0][::-1]
    elif kind == "muffled":  # a wall between: little above 300 Hz is left, and noise as loud
        low = sosfilt(butter(6, 300, fs=SAMPLE_RATE, output="sos"), waves[0])
        wave = noise(low, rng.uniform(-3, 3), rng, 0.9)
    elif kind == "crowd":  # all at once, none in front
        wave = np.zeros(max(map(len, waves)))
        for one in waves:
            start = int(rng.integers(len(wave) - len(one) + 1))
            wave[start : start + len(one)] += np.roll(one, int(rng.integers(len(one)))) / rms(one)
    elif kind == "tones":  # a tune of pure tones
        notes = rng.integers(-12, 13, 40)
        steps = (time / rng.uniform(0.12, 0.5)).astype(int) % len(notes)
        pitch = 220 * 2 ** (notes[steps] / 12)
        wave = sum(np.sin(2 * np.pi * k * np.cumsum(pitch) / SAMPLE_RATE) / k for k in (1, 2, 3))
    elif kind == "hum":  # of the mains, and its harmonics
        base = rng.choice([50, 60, 100, 120])
        wave = sum(rng.uniform(0, 1) * np.sin(2 * np.pi * base * k * time) for k in range(1, 8))
        wave = noise(wave, rng.uniform(5, 25), rng, 0.9)
    elif kind == "hiss":  # restless noise of any colour
        wave = lfilter([1], [1, -rng.uniform(-0.5, 0.97)], rng.standard_normal(len(time)))
        points = rng.uniform(0.1, 1, int(seconds * rng.uniform(1, 8)) + 2)
        wave = wave * np.interp(time, np.linspace(0, seconds, len(points)), points)
    else:
        raise ValueError(f"no kind of noise is called {kind}")
    return (wave / np.abs(wave).max() * 0.5).astype(np.float32), SAMPLE_RATE
