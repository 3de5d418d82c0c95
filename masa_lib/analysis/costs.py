"""What a training cost, and what it cost to be as accurate as another: one accuracy, or all between half and most.

A cost is one of four things that are counted, or a sum of computed tokens; none is the cost, so every comparison shows
them side by side. Pure functions on a run's metrics and its held-out curve, which must be of the same problems
throughout. Evaluations are no cost, nor is what an oracle measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

#: the streams whose tokens are written; a record without one of them had none
COST = ("tokens_solution", "tokens_recheck", "tokens_meta", "tokens_anchor")
#: prompts as the engine computed them, and what is read without an answer being written
READ = ("tokens_prefill", "tokens_read")
TOKENS = (*COST, "tokens_oracle", "tokens_decode", *READ, "tokens_update")
#: what is counted, by column of a run's totals: the four costs and the two sums of computed tokens
COSTS = {"tokens": "tokens written", "read": "prompts read", "tokens_update": "tokens through the update",
         "seconds": "seconds", "computed": "all computed tokens", "computed_thrice": "all, the update thrice"}
#: the accuracies at which costs are compared, as shares of the reference's gain
SHARES = tuple(np.arange(50, 96, 5) / 100)
#: an accuracy that equals a target is one that reaches it, whatever the last bit says
ROUNDING = 1e-9
#: share of the reference's mean gain at which one crossing is read off
TARGET_SHARE = 0.9


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of a run and its costs until then, element by element: arrays over its evaluations.

    `costs` has an array for each cost; `spent` is what the whole run cost.
    """

    steps: np.ndarray
    accuracy: np.ndarray
    costs: dict[str, np.ndarray]
    spent: dict[str, float]

    def to_reach(self, accuracy: float, cost: str) -> float:
        """`time_to_target` of one cost."""
        return time_to_target(self.steps, self.accuracy, self.costs[cost], accuracy)


def totals(metrics: pd.DataFrame) -> pd.DataFrame:
    """Each of COSTS, the streams and the updates so far, a row a step of a run's metrics (index: the step).

    A column that the metrics lack counts as 0; those of `READ` add up, and so do all computed tokens: once each, and
    with the update three times, as it goes forward once and backward for twice as much.
    """
    counted = [*dict.fromkeys((*TOKENS, "seconds_total", "updates"))]
    spent = metrics.reindex(columns=counted).fillna(0.0).cumsum().set_axis(metrics["step"])
    spent["tokens"], spent["read"] = spent[list(COST)].sum(axis=1), spent[list(READ)].sum(axis=1)
    spent["computed"] = spent["tokens"] + spent["read"] + spent["tokens_update"]
    return spent.assign(computed_thrice=spent["computed"] + 2 * spent["tokens_update"], seconds=spent["seconds_total"])


def time_to_target(steps: Sequence[float], accuracy: Sequence[float], cost: Sequence[float], target: float) -> float:
    """Cost at which a monotone (isotonic) fit of the curve first reaches the target; infinite if it never does.

    Args:
        steps: of the evaluations, in any order.
        accuracy: held-out accuracy at each, of the same problems.
        cost: tokens or seconds spent until each; between two, fit and cost are straight lines.
        target: accuracy to reach; NaN (there is none) gives NaN.
    """
    order = np.argsort(steps, kind="stable")
    cost = np.asarray(cost, dtype=float)[order]
    if math.isnan(target):
        return math.nan
    fit = optimize.isotonic_regression(np.asarray(accuracy, dtype=float)[order]).x
    reached = fit >= target - ROUNDING
    if not reached[-1]:
        return math.inf
    after = int(np.argmax(reached))
    if after == 0:
        return float(cost[0])
    share = (target - fit[after - 1]) / (fit[after] - fit[after - 1])
    return float(cost[after - 1] + share * (cost[after] - cost[after - 1]))


def equal_accuracy(reference: Curve, curve: Curve, cost: str) -> tuple[float, float]:
    """How much dearer the reference is where both are equally accurate, by the whole curve.

    The accuracies are SHARES of the reference's gain on its first evaluation. One that the curve never reaches counts
    with all that was spent, which is a bound: the true ratio is lower.

    Args:
        reference: of the same seed and the same held-out problems.
        curve: to compare.
        cost: one of COSTS.

    Returns:
        The mean over the accuracies of log(cost of the reference / cost), and the share of them that is a bound; NaN
        where the reference gained nothing, or the curve has one of the accuracies before it cost anything.
    """
    first, gain = reference.accuracy[0], reference.accuracy[-1] - reference.accuracy[0]
    if not gain > 0:
        return math.nan, math.nan
    theirs, ours = ([one.to_reach(first + share * gain, cost) for share in SHARES] for one in (reference, curve))
    missed = np.isinf(ours)
    paid = np.where(missed, curve.spent[cost], ours)
    if not (np.isfinite(paid).all() and (paid > 0).all() and min(theirs) > 0):
        return math.nan, float(missed.mean())
    return float(np.log(np.array(theirs) / paid).mean()), float(missed.mean())
