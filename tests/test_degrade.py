"""Rooms, noise, lines and codecs: as many samples as before, all finite, and each does what its name says."""

import numpy as np
import pytest

from aqaa.corpus import degrade as D

RATE = 16_000


@pytest.fixture(scope="module")
def speech():
    """Two seconds (N,) of something like a voice: harmonics of a gliding tone up to 7 kHz, in syllables."""
    time = np.arange(2 * RATE) / RATE
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * time)) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 46))
    return 0.2 * wave * (0.2 + np.sin(2 * np.pi * 2 * time) ** 2)


def share(wav, low, high):
    """Share of the energy that lies between two frequencies."""
    power = np.abs(np.fft.rfft(wav)) ** 2
    at = np.fft.rfftfreq(len(wav), 1 / RATE)
    return power[(at >= low) & (at <= high)].sum() / power.sum()


def likeness(one, other):
    return np.corrcoef(one, other)[0, 1]


@pytest.mark.parametrize("name", D.LINES)
@pytest.mark.parametrize("samples", [1, 999, 16_001])
def test_a_line_keeps_length_and_finite_values(name, samples):
    wav = 3 * np.random.default_rng(0).standard_normal(samples)  # beyond full scale too
    made = D.LINES[name](wav)
    assert made.shape == wav.shape and np.isfinite(made).all()


@pytest.mark.parametrize("name", D.LINES)
def test_a_line_keeps_silence_silent_and_speech_as_loud_as_its_band(speech, name):
    assert np.abs(D.LINES[name](np.zeros(RATE))).max() < 1e-3
    assert 0.3 < D.rms(D.LINES[name](speech)) / D.rms(speech) < 1.1


def test_a_telephone_has_no_lows_and_no_highs(speech):
    assert share(speech, 0, 200) > 0.3 and share(speech, 4000, 8000) > 0.005
    for name in ("telephone", "gsm", "ulaw"):
        made = D.LINES[name](speech)
        assert share(made, 0, 200) < 0.1 and share(made, 4000, 8000) < 0.001, name
    assert share(D.narrow(speech), 4200, 8000) < 1e-4


@pytest.mark.parametrize("name, before, least", [
    ("mp3", lambda wav: wav, 0.97), ("opus", lambda wav: wav, 0.9), ("narrow", lambda wav: wav, 0.98),
    ("ulaw", D.telephone, 0.99), ("gsm", D.telephone, 0.8),
])  # fmt: skip
def test_a_codec_stays_near_what_went_in(speech, name, before, least):
    made = D.LINES[name](speech)
    assert least < likeness(made, before(speech)) < 1


def test_noise_is_as_far_below_as_asked(speech):
    for snr in (5, 20):
        added = D.noise(speech, snr, np.random.default_rng(1)) - speech
        assert 20 * np.log10(D.rms(speech) / D.rms(added)) == pytest.approx(snr, abs=0.01)
    rumble = D.noise(0 * speech, 0, np.random.default_rng(1), color=0.95, level=1)
    assert share(rumble, 0, 500) > 0.8 > 0.2 > share(D.noise(0 * speech, 0, np.random.default_rng(1), level=1), 0, 500)


def test_a_room_lasts_longer_and_leaves_the_speech_in_front(speech):
    made = D.room(speech, 0.3, 0.3, np.random.default_rng(2))
    assert len(made) == len(speech) + 0.3 * RATE - 1 and np.isfinite(made).all()
    assert D.rms(made[len(speech) :]) > 0 and likeness(made[: len(speech)], speech) > 0.9
