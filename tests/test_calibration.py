"""How sure is right: the fit, its error, and what is written beside the weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from aqaa import config, pipeline
from aqaa.corpus.dialogues import Dialogue
from aqaa.evaluation import calibration as K


def drawn(slope, offset, n=4000, seed=0):
    """Confidences, and answers that are right as often as sigmoid(slope * logit(c) + offset) says."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.02, 0.999, n)
    return sure, rng.random(n) < expit(slope * logit(sure) + offset)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.3, 3), st.floats(-2, 1.5))
def test_the_fit_finds_what_made_the_answers(slope, offset):
    sure, right = drawn(slope, offset)
    found = K.fit(sure, right)
    assert found == pytest.approx((slope, offset), abs=0.3)
    fitted = expit(found[0] * logit(sure) + found[1])
    assert K.calibration_error(fitted, right) < 4


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_are_all_alike_give_finite_numbers(right):
    sure, _ = drawn(1, 0, 50)
    assert np.isfinite(K.fit(sure, np.full(50, right))).all()


def test_the_error_is_the_distance_in_points():
    sure, right = np.full(100, 0.9), np.arange(100) % 10 < 6
    assert K.calibration_error(sure, right) == pytest.approx(30)
    assert K.calibration_error(np.full(100, 0.6), right) == pytest.approx(0, abs=1e-9)
    told = K.interval(sure, right)
    assert told["low"] < told["points"] == 30 < told["high"]
    assert sum(row["n"] for row in K.picture(sure, right)) == 100


def test_confidence_rises_with_the_mean_and_is_the_mean_as_it_stands():
    bare = config.ConfidenceConfig()

    def of(logprob, how=bare):
        steps = [SimpleNamespace(kind="text", logprob=logprob)] * 3 + [SimpleNamespace(kind="semantic", logprob=-9)]
        return pipeline.confidence(steps, how)

    assert of(-0.5) == pytest.approx(np.exp(-0.5)) and of(0.0) == pytest.approx(1, abs=1e-6)
    how = config.ConfidenceConfig(slope=0.5, offset=-1)
    values = [of(x, how) for x in (-50, -2, -0.1, 0)]
    assert values == sorted(values) and 0 < values[0] and values[-1] < 1
    assert pipeline.confidence([], how) == 0


def test_it_is_fitted_on_one_split_measured_on_another_and_stored(monkeypatch, tmp_path):
    """A model that is always 0.9 sure and right in half: the stored numbers make 0.5 of it."""
    tiny = config.preset("mini")
    asked = [Dialogue([1, 2, i], 3, f"{i}") for i in range(40)]
    monkeypatch.setattr(K, "dialogues", lambda source, split, count: asked)
    monkeypatch.setattr(K, "answer_prompts", lambda model, prompts, seed: [
        (str(p[-1] if p[-1] % 2 else "?"), [], 0.9) for p in prompts])  # fmt: skip
    monkeypatch.setattr(K.sources, "find", lambda source: tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_dict()), encoding="utf-8")
    model = SimpleNamespace(config=tiny)
    result = K.measure(model, store=True)
    assert result["before"]["points"] == pytest.approx(40) and result["error"]["points"] < 3
    stored = config.AQAAConfig.from_dict(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    assert expit(stored.confidence.slope * logit(0.9) + stored.confidence.offset) == pytest.approx(0.5, abs=0.03)
    assert model.config is tiny and result["measured_on"] == 40
