"""Mean opinion scores: what listeners' marks from 1 (bad) to 5 (excellent) say, and how surely."""

from statistics import fmean, stdev

import numpy as np

SCALE = (1.0, 5.0)  # marks that a listener can give


def interval(marks, level=0.95, scale=SCALE):
    """(mean, low, high) by Student's t over the marks; low and high are None for fewer than two. No
    mean of marks lies outside their scale, so the interval ends there."""
    from scipy.stats import t  # here: it is slow to import, and few notebooks need it

    mean = fmean(marks)
    if len(marks) < 2:
        return mean, None, None
    reach = float(t.ppf((1 + level) / 2, len(marks) - 1)) * stdev(marks) / len(marks) ** 0.5
    return mean, max(mean - reach, scale[0]), min(mean + reach, scale[1])


def mean(marks, scale=SCALE):
    """{"n", "mean", "interval"} of marks, rounded; the interval is None for a single one."""
    middle, low, high = interval(marks, scale=scale)
    edges = None if low is None else [round(low, 2), round(high, 2)]
    return {"n": len(marks), "mean": round(middle, 2), "interval": edges}


def wilson(right, n):
    """{"n", "share", "interval"} in percent: Wilson's interval of 95 %, which leaves room where all
    of a few are right, as draws of the same few would not."""
    share, z = right / n, 1.96
    center = share + z * z / (2 * n)
    reach = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    edges = [100 * (center + side) / (1 + z * z / n) for side in (-reach, reach)]
    return {"n": n, "share": round(100 * share, 1), "interval": [round(edge, 1) for edge in edges]}


def resampled(wrong, counts, seed=0, draws=2000):
    """{"error", "interval"}: errors `wrong` (N,) among `counts` (N,) in percent, and between what
    it lies in 95 of 100 draws of as many recordings."""
    wrong, counts = np.asarray(wrong), np.asarray(counts)
    drawn = np.random.default_rng(seed).integers(0, len(counts), (draws, len(counts)))
    shares = 100 * wrong[drawn].sum(1) / counts[drawn].sum(1)
    interval = [round(float(edge), 1) for edge in np.percentile(shares, (2.5, 97.5))]
    return {"error": round(float(100 * wrong.sum() / counts.sum()), 1), "interval": interval}
