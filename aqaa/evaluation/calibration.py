"""`aqaa bench calibration`: how often is an answer right that the model is so sure of?

The two numbers of ConfidenceConfig are fitted on questions of the development split; how well they
do is measured on the evaluation's, from codes, without sound. `--store` writes them beside the
weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit
from tqdm import tqdm

from aqaa.batching import BATCH, answer_prompts
from aqaa.config import ConfidenceConfig
from aqaa.corpus.dialogues import dialogues
from aqaa.files import read_object, write_json
from aqaa.weights import sources

BINS, DRAWS = 10, 1000


def measure(model, preset="mini", limit=None, seed=0, store=False, progress=False):
    """Ask an AQAA, as text, all questions of both splits, or `limit` of each. Returns the fitted
    "slope" and "offset", "error" (of the calibration, see below, with 95 % of its draws), the same
    "before" (of the bare mean probability) and "picture": a row a bin."""
    config = model.config
    model.config = replace(config, confidence=ConfidenceConfig())  # what is to be fitted is bare
    try:
        sure, right = _asked(model, preset, "dev", limit, seed, progress)
        slope, offset = fit(sure, right)
        tried, truly = _asked(model, preset, "eval", limit, seed, progress)
    finally:
        model.config = config
    fitted = expit(slope * logit(tried) + offset)
    result = {
        "fitted_on": len(sure), "measured_on": len(tried), "right": round(float(truly.mean()), 4),
        "slope": round(slope, 4), "offset": round(offset, 4),
        "error": interval(fitted, truly, seed), "before": interval(tried, truly, seed),
        "picture": picture(fitted, truly),
    }  # fmt: skip
    if store:
        path = Path(sources.find(preset)) / "config.json"
        settings = read_object(path, "get the file again")
        fitted = {name: result[name] for name in ("slope", "offset")}
        settings["confidence"] = settings.get("confidence", {}) | fitted
        write_json(path, settings)
    return result


def fit(sure, right):
    """(slope, offset) of the likeliest sigmoid(slope * logit(sure) + offset), slope above 0."""
    x = logit(sure)

    def loss(values):  # a little pull to the bare probability keeps few or perfect ones finite
        slope, offset = np.exp(values[0]), values[1]
        likely = np.logaddexp(0, np.where(right, -1, 1) * (slope * x + offset)).sum()
        return likely + 0.5 * (values[0] ** 2 + 0.1 * offset**2)

    found = minimize(loss, np.zeros(2)).x
    return float(np.exp(found[0])), float(found[1])


def calibration_error(sure, right):
    """Expected calibration error in points: the mean distance between confidence and share right,
    over BINS bins of as many answers each."""
    order = np.argsort(sure, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [len(part) * abs(sure[part].mean() - right[part].mean()) for part in bins]
    return 100 * sum(gaps) / len(sure)


def interval(sure, right, seed=0):
    """{"points", "low", "high"}: the error, and where 95 % of draws of as many answers lie."""
    rng = np.random.default_rng(seed)
    drawn = [calibration_error(sure[rows], right[rows])
             for rows in rng.integers(len(sure), size=(DRAWS, len(sure)))]  # fmt: skip
    low, high = np.percentile(drawn, [2.5, 97.5])
    points = calibration_error(sure, right)
    return {name: round(float(value), 2)
            for name, value in (("points", points), ("low", low), ("high", high))}  # fmt: skip


def picture(sure, right):
    """[{"sure", "right", "n"}, …]: mean confidence and share right, a row a bin."""
    bins = np.array_split(np.argsort(sure, kind="stable"), BINS)
    means = [(sure[part].mean(), right[part].mean(), len(part)) for part in bins if len(part)]
    return [{"sure": round(float(one), 3), "right": round(float(other), 3), "n": n}
            for one, other, n in means]  # fmt: skip


def _asked(model, preset, split, limit, seed, progress):
    """(mean probability (N,), whether the text is right (N,)) of the questions of a split."""
    asked = sorted(dialogues(preset, split, limit), key=lambda one: one.start)
    sure, right = [], []
    for start in tqdm(range(0, len(asked), BATCH), split, disable=not progress, leave=False):
        some = asked[start : start + BATCH]
        answers = answer_prompts(model, [one.prompt for one in some], seed)
        sure += [mean for _, _, mean in answers]
        right += [text == one.answer for one, (text, _, _) in zip(some, answers, strict=True)]
    return np.array(sure), np.array(right)
