"""Measures agree with how a sound was made; directions follow the rules and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa.evaluation import controls
from aqaa.evaluation.controls import RULES, Measures, changes, compare, direction, measure
from tests.conftest import RATE
from tests.test_judges import SOUNDS


def hum(seconds=1.0, pitch=150.0, sway=0.0, level=0.1, beats=4, pad=0.2):
    """A harmonic sound of `beats` syllables a second, pitch swaying by +-`sway` semitones, silence around it."""
    t = np.arange(int(seconds * RATE)) / RATE
    f0 = pitch * 2 ** (sway / 12 * np.sin(2 * np.pi * t / seconds))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 12))
    wave *= 0.55 - 0.45 * np.cos(2 * np.pi * beats * t)
    wave *= level / np.sqrt(np.mean(wave**2))
    return np.pad(wave, int(pad * RATE)).astype(np.float32)


def test_measures_a_known_sound():
    made = measure(hum(seconds=1.5, pitch=180, sway=3, level=0.1))
    assert made.seconds == pytest.approx(1.5, abs=0.06)
    assert made.f0 == pytest.approx(180, rel=0.02)
    assert made.f0_range == pytest.approx(2 * 3 * np.sin(0.4 * np.pi), abs=0.4)
    assert made.energy == pytest.approx(-20, abs=0.5)
    assert made.rate == pytest.approx(4, abs=0.7)
    assert measure(hum(1.5), "one two three").rate == pytest.approx(3 / 1.5, rel=0.05)


def test_nothing_measures_nothing():
    for wav in (np.zeros(0), np.zeros(9), np.zeros(RATE)):
        assert measure(wav) == Measures()
    assert compare(np.zeros(RATE), hum())["seconds"] == 0
    assert not any(direction(manner, np.zeros(RATE), hum()) for manner in RULES if manner != "soft" and manner != "sad")
    assert measure(np.random.default_rng(0).normal(0, 0.1, RATE)).f0 == 0  # noise has no pitch
    with pytest.raises(ValueError, match="mono"):
        measure(np.zeros((2, 9)))
    with pytest.raises(ValueError, match="'normal'.*slow"):
        direction("normal", hum(), hum())


@settings(deadline=None, max_examples=15)
@given(st.floats(0.05, 1.0), st.integers(0, 3000))
def test_gain_moves_energy_alone_and_silence_moves_nothing(gain, silence):
    wav = hum(sway=2)
    change = compare(np.pad(wav * gain, silence), wav)
    assert change["energy"] == pytest.approx(20 * np.log10(gain), abs=0.3)
    assert abs(change["seconds"]) < 0.03 and abs(change["f0"]) < 0.1 and abs(change["f0_range"]) < 0.3


MADE = {
    "slow": dict(seconds=1.5), "fast": dict(seconds=0.7), "high": dict(pitch=220), "low": dict(pitch=110),
    "loud": dict(level=0.2), "soft": dict(level=0.03), "happy": dict(seconds=0.85, pitch=190, sway=4),
    "sad": dict(seconds=1.3, pitch=120, sway=0.5, level=0.05), "angry": dict(seconds=0.8, pitch=165, sway=3, level=0.2),
    "calm": dict(seconds=1.2, pitch=130, sway=1.5, level=0.07),
}


@pytest.mark.parametrize("manner", RULES)
def test_direction(manner):
    normal, made = hum(sway=2), hum(**{"sway": 2, **MADE[manner]})
    assert set(MADE) == set(RULES)
    assert direction(manner, made, normal) and not direction(manner, normal, normal)
    opposite = {name: -sign for name, sign in RULES[manner].items()}
    against = [other for other, rule in RULES.items() if rule == opposite]
    assert not any(direction(other, made, normal) for other in against)


def test_speech_played_faster_is_shorter_and_higher():
    wav = SOUNDS[1]
    faster = np.interp(np.arange(0, len(wav) - 1, 1.25), np.arange(len(wav)), wav)
    change = compare(faster, wav)
    assert change["seconds"] == pytest.approx(1 / 1.25 - 1, abs=0.03)
    assert change["f0"] == pytest.approx(12 * np.log2(1.25), abs=0.3)
    assert direction("fast", faster, wav) and direction("high", faster, wav) and not direction("low", faster, wav)
    assert measure(wav, "the capital of france is paris").rate == pytest.approx(9 / measure(wav).seconds)


def test_changes_are_signed_and_zero_without_a_measure():
    one, other = Measures(2.0, 4, 200, 3, -20), Measures(1.0, 4, 100, 5, -23)
    assert changes(one, other) == {"seconds": 1.0, "f0": 12.0, "f0_range": -2, "energy": 3}
    assert set(changes(one, other)) == set(controls.MARGIN)
    assert changes(Measures(), other)["f0"] == changes(one, Measures())["seconds"] == 0


@pytest.mark.parametrize("text, count", [
    ("the cat sleeps on the kitchen table", 9), ("we walk to school every morning", 9), ("a b", 2), ("", 0),
    ("seven plus five is equal to twelve", 9), ("whole houses called wanted apples", 8), ("the bees", 2),
])
def test_syllables(text, count):
    assert abs(controls.syllables(text) - count) <= (1 if "every" in text or "whole" in text else 0)


def test_envelope_peaks():
    assert controls.envelope_peaks(hum(2.0, beats=5)) in (9, 10, 11)


class Cutter:
    """A judge that finds three words, the last one from `at` seconds on."""

    def __init__(self, at):
        self.at = at

    def when(self, wav, text):
        last = len(wav) / RATE
        return [("a", 0, self.at / 2), ("b", self.at / 2, self.at), ("c", self.at, last)] if self.at else []


def test_a_switch_is_right_where_both_parts_differ_as_asked():
    quiet, loud, plain = (hum(level=level, pad=0) for level in (0.03, 0.3, 0.1))
    normal, parts = np.concatenate([plain, plain]), [("a b", "soft"), ("c", "loud")]

    def right(first, second, at=1.0, asked=parts):
        return controls.directions(asked, np.concatenate([first, second]), normal, Cutter(at))

    assert right(quiet, loud)
    assert not right(loud, quiet) and right(loud, quiet, asked=[("a b", "loud"), ("c", "soft")])
    assert not right(quiet, quiet) and not right(plain, loud)
    assert not right(quiet, loud, at=1.9)  # at another place
    assert not right(quiet, loud, at=0)  # the words are not found
