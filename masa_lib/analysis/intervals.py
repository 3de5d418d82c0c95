"""How sure a number is: intervals of means over seeds, of shares over problems, and of ratios of costs.

Pure functions on plain numbers. An interval stays inside the values that its number can take, and its coverage is
shown by simulation in the tests. Deliberately no tests of significance and no resampling: every interval repeats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

ANY, SHARE, SIGNED, POSITIVE = (-math.inf, math.inf), (0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)
#: weight of each of the two problems, one never and one always solved, that `share_interval` imagines (Jeffreys' prior)
IMAGINED = 0.5
#: where an interval of 95 % ends
TAIL = 0.975


def mean_interval(values: Iterable[float], bounds: tuple[float, float] = ANY) -> tuple[float, float, float]:
    """Mean and 95 % t-interval of values (seeds, mostly), NaN left out; the ends are NaN for fewer than two.

    Args:
        values: independent, roughly normal; means over many problems are. For shares of few, see `share_interval`.
        bounds: what the mean can be, such as SHARE; the interval ends there, which costs no coverage.
    """
    kept = np.asarray(list(values), dtype=float)
    kept = kept[np.isfinite(kept)]
    if kept.size < 2:
        return (float(kept[0]) if kept.size else math.nan), math.nan, math.nan
    half = stats.t.ppf(TAIL, kept.size - 1) * kept.std(ddof=1) / math.sqrt(kept.size)
    low, high = np.clip([kept.mean() - half, kept.mean() + half], *bounds)
    return float(kept.mean()), float(low), float(high)


def share_interval(rates: Iterable[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of rates between 0 and 1, one a problem (its accuracy, its pass@k); NaN left out.

    The interval is that of a Beta distribution with the mean and variance of a Bayesian bootstrap that sees, beside the
    problems, half a problem never and half a problem always solved; t instead of normal tails for few problems. For
    rates of 0 and 1 alone that is Jeffreys' interval. It stays inside [0, 1] and has a width where all rates are equal.

    Args:
        rates: of problems drawn independently.
    """
    kept = np.asarray(list(rates), dtype=float)
    kept = kept[np.isfinite(kept)]
    if not kept.size:
        return math.nan, math.nan, math.nan
    weight = kept.size + 2 * IMAGINED
    centre = (kept.sum() + IMAGINED) / weight
    variance = (((kept - centre) ** 2).sum() + IMAGINED * (centre**2 + (1 - centre) ** 2)) / (weight * (weight + 1))
    variance *= (stats.t.ppf(TAIL, max(kept.size - 1, 1)) / stats.norm.ppf(TAIL)) ** 2
    size = max(centre * (1 - centre) / variance - 1, 2 * IMAGINED)  # one problem says as little as none at least
    low, high = stats.beta.ppf([1 - TAIL, TAIL], centre * size, (1 - centre) * size)
    mean = float(kept.mean())
    return mean, min(float(low), mean) if mean > 0 else 0.0, max(float(high), mean) if mean < 1 else 1.0


def over_seeds(values: Iterable[float], bounds: tuple[float, float] = ANY) -> dict[str, float]:
    """`mean_interval` by name."""
    return named(mean_interval(values, bounds=bounds))


def paired_ratio(reference: pd.Series, costs: pd.Series, reference_spent: pd.Series | None = None,
                 spent: pd.Series | None = None) -> dict[str, float]:
    """Geometric mean of reference / cost over the seeds (index) both have, with the t-interval of its logarithm.

    Args:
        reference: cost of each seed; infinite where the target was never reached.
        costs: of the arm.
        reference_spent: all that the reference's run cost; counts where it never reached the target, as a bound.
        spent: the same of the arm. A seed without it that never reached the target is left out.
    """
    if reference_spent is not None:
        reference = reference.where(~np.isinf(reference), reference_spent)
    if spent is not None:
        costs = costs.where(~np.isinf(costs), spent)
    pairs = pd.concat([reference, costs], axis=1, join="inner").to_numpy(dtype=float)
    pairs = pairs[np.isfinite(pairs).all(axis=1) & (pairs > 0).all(axis=1)]
    return ratio_of_logs(np.log(pairs[:, 0] / pairs[:, 1]))


def ratio_of_logs(logs: Iterable[float]) -> dict[str, float]:
    """Geometric mean of ratios, given as logarithms (a seed each), with the t-interval of the logarithm."""
    return named(np.exp(mean_interval(logs)).tolist())


def named(values: Iterable[float]) -> dict[str, float]:
    """Mean and ends of an interval by name."""
    return dict(zip(("mean", "low", "high"), values, strict=True))
