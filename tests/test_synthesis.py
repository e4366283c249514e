"""Distances are zero for equal sounds, grow with the damage, and copy-synthesis counts what the judge hears."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa.evaluation.synthesis import copy_synthesis, f0_error, mel_cepstral_distance
from tests.test_judges import SOUNDS

WAV = SOUNDS[2]


def faster(factor):
    return np.interp(np.arange(0, len(WAV) - 1, factor), np.arange(len(WAV)), WAV)


@settings(deadline=None, max_examples=10)
@given(st.floats(0.3, 1.0))
def test_the_same_sound_at_any_level_is_no_distance_away(gain):
    assert mel_cepstral_distance(WAV * gain, WAV) < 0.6
    error = f0_error(WAV * gain, WAV)
    assert error["semitones"] < 0.01 and error["slips"] == 0 and error["voicing"] < 0.01


def test_distance_grows_with_noise():
    noise = np.random.default_rng(0).normal(0, 1, len(WAV))
    distances = [mel_cepstral_distance(WAV + scale * noise, WAV) for scale in (0.001, 0.01, 0.1)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_f0_error_in_semitones():
    """The first half second played 6 % higher; later the two are out of step."""
    assert f0_error(faster(2 ** (1 / 12))[:8000], WAV[:8000])["semitones"] == pytest.approx(1, abs=0.3)
    assert f0_error(WAV * 0, WAV)["voicing"] > 0.4


def test_nothing_to_compare_is_not_a_number():
    assert np.isnan(mel_cepstral_distance(np.zeros(0), np.zeros(0)))
    assert np.isnan(f0_error(np.zeros(99), np.zeros(99))["semitones"])


def test_copy_synthesis_counts():
    codes, teacher = [[0], [2]], [np.r_[0, WAV], np.r_[1, WAV]]  # the first sample is the number of a text
    judge = SimpleNamespace(hear_all=lambda wavs, *_: [["one", "two", ""][int(wav[0])] for wav in wavs])
    result = copy_synthesis(lambda ids: np.r_[float(ids[0]), WAV], codes, teacher, ["One", "two"], judge)
    assert result["n"] == 2 and result["lenient"] == result["strict"] == 0.5
    assert result["teacher_lenient"] == result["teacher_strict"] == 1
    assert result["misheard"] == [{"said": "two", "heard": ""}]
    assert result["f0_semitones"] < 0.1 and result["mel_cepstral_distance_db"] < 1.5
