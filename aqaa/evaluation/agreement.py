"""Do two systems, or two judges, err on the same questions? Paired tests, Cohen's κ, overlap."""

from itertools import combinations
from math import comb

import numpy as np

from aqaa.files import ModelError

SCORES = ("text", "spoken", "agrees", "manner")  # shares; `words` is a word error in percent
DRAWS = 1000  # of the interval


def kappa(ours, theirs, seed=0):
    """{"kappa", "interval"}: agreement of two lists of booleans beyond chance (Cohen 1960), 1 where
    they never differ; None where chance alone explains all, as of two that are always right."""
    pairs = np.array([ours, theirs], bool)  # (2, N)
    n = pairs.shape[1]
    drawn = pairs[:, np.random.default_rng(seed).integers(0, n, (DRAWS, n))]  # (2, draws, N)
    value, others = _kappa(pairs), _kappa(drawn)
    if not np.isfinite(value):
        return {"kappa": None, "interval": None}
    edges = np.percentile(others[np.isfinite(others)], (2.5, 97.5))
    return {"kappa": round(float(value), 3), "interval": [round(float(edge), 3) for edge in edges]}


def _kappa(pairs):
    """(2, ..., N) booleans -> (...)."""
    same, (first, second) = (pairs[0] == pairs[1]).mean(-1), pairs.mean(-1)
    chance = first * second + (1 - first) * (1 - second)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (same - chance) / (1 - chance), np.nan) + 0.0  # no -0


def ranked(pairs):
    """Percent of two answers, one right and one not, of which the right one has the higher mark, an
    equal one half (AUC: 50 is chance), of [(right, mark), …]; None where only one kind is there."""
    from scipy.stats import mannwhitneyu  # here: it is slow to import

    good, bad = ([mark for right, mark in pairs if right == kind] for kind in (True, False))
    if good and bad:
        return round(100 * mannwhitneyu(good, bad).statistic / len(good) / len(bad), 1)


def compare(ours, theirs):
    """{score: {"n", "only_first", "only_second", "difference", "p", "kappa", "interval",
    "both_wrong", "overlap"}} of two runs, on the questions that both were asked. p: of as uneven a
    split by chance (McNemar's exact test); overlap: share of all errors that both make."""
    others, found = {row["id"]: row for row in theirs}, {}
    pairs = [(row, others[row["id"]]) for row in ours if row["id"] in others]
    if not pairs:
        raise ModelError("the two runs have no question in common: compare runs of one set.")
    for score in SCORES:
        both = [(a[score], b[score]) for a, b in pairs
                if a.get(score) is not None and b.get(score) is not None]  # fmt: skip
        if not both:
            continue
        first, second = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
        n, least, wrong = first + second, min(first, second), sum(not a and not b for a, b in both)
        p = min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)
        found[score] = {"n": len(both), "only_first": first, "only_second": second,
                        "difference": round(100 * (first - second) / len(both), 1),
                        "p": round(p, 4), **kappa(*zip(*both, strict=True)), "both_wrong": wrong,
                        "overlap": round(100 * wrong / (wrong + n), 1) if wrong + n else None,
                        }  # fmt: skip
    return found


def between(verdicts):
    """{"one - other": {"n", "kappa", "interval"}} of judges {name: [True, False or None, …]} of the
    same items, pair by pair, where both have a verdict."""
    found = {}
    for one, other in combinations(verdicts, 2):
        both = zip(verdicts[one], verdicts[other], strict=True)
        if pairs := [pair for pair in both if None not in pair]:
            found[f"{one} - {other}"] = {"n": len(pairs), **kappa(*zip(*pairs, strict=True))}
    return found


def lines(found):
    """`compare` as lines of text."""
    for name, one in found.items():
        if name == "preferred":
            yield f"a judge prefers: {', '.join(f'{key} {n}' for key, n in one.items())}"
            continue
        low, high = one["interval"] or ("-", "-")
        yield (f"{name}: {one['n']} questions, {one['only_first']} right only in the first, "
               f"{one['only_second']} only in the second, {one['difference']:+} points, p "
               f"{one['p']}; {one['both_wrong']} wrong in both ({one['overlap']} % of all errors), "
               f"kappa {one['kappa']} ({low}–{high})")  # fmt: skip
