"""Why the number of updates confounds a comparison: how far an optimiser walks, and what a second update changed.

The released training cuts the batch of a step in two for one method and not for the other. `travelled` shows on bare
gradients why that matters under Adam; `comparison` reads what came of it where both methods were trained both ways.
Deliberately no training and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib import DATA
from masa_lib.analysis import compare
from masa_lib.analysis.intervals import mean_interval
from masa_lib.runs.folder import runs_in

ONE, TWO = DATA / "runs" / "baseline", DATA / "runs" / "updates"
#: what is compared with what
CONTRASTS = {"released: masa two, grpo one": ("masa-two", "grpo"), "both one": ("masa", "grpo"),
             "both two": ("masa-two", "grpo-two"), "second update alone, grpo": ("grpo-two", "grpo"),
             "second update alone, masa": ("masa-two", "masa")}
#: of Adam, as PyTorch has them
BETAS, SMALL = (0.9, 0.999), 1e-8


def travelled(gradients_UW: np.ndarray, optimiser: str, rate: float = 1e-3) -> float:
    """How far weights are from where they began after the updates of these gradients.

    Args:
        gradients_UW: a row an update, a column a weight.
        optimiser: `plain` (gradient descent) or `adam`.
        rate: the learning rate.

    Source: Adam (1412.6980), algorithm 1.
    """
    first, second, moved = (np.zeros(gradients_UW.shape[1]) for _ in range(3))
    for update, gradient in enumerate(gradients_UW, 1):
        if optimiser == "plain":
            moved -= rate * gradient
            continue
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        steady, size = first / (1 - BETAS[0]**update), second / (1 - BETAS[1]**update)
        moved -= rate * steady / (np.sqrt(size) + SMALL)
    return float(np.linalg.norm(moved))


def walks(noise: float = 1.0, share: float = 0.75, *, steps: int = 20, weights: int = 2000,
          seed: int = 0) -> pd.DataFrame:
    """Distances of three ways to learn from the same batches, relative to one whole update a step.

    A batch's gradient is the mean of two halves, each a fixed direction and noise of its own. `halves` takes an update
    of each half, whose loss counts half as the batch's does; `diluted` multiplies the batch's loss by `share`, as a
    mean over both streams does to that of the solutions, whose share of the tokens it is.

    Args:
        noise: standard deviation in a half, in units of the direction.
        share: above 0, at most 1.
        steps: batches.
        weights: numbers that learn.
        seed: of direction and noise.

    Returns:
        A row a way, columns updates, plain and adam.
    """
    random = np.random.default_rng(seed)
    halves_SHW = random.normal(size=weights) + noise * random.normal(size=(steps, 2, weights))
    whole_UW = halves_SHW.mean(axis=1)
    ways = {"whole batch": whole_UW, "halves": halves_SHW.reshape(2 * steps, weights) / 2, "diluted": share * whole_UW}
    rows = {name: {"updates": len(gradients), **{kind: travelled(gradients, kind) for kind in ("plain", "adam")}}
            for name, gradients in ways.items()}
    table = pd.DataFrame(rows).T
    return table.assign(updates=table["updates"].astype(int), **(table / table.loc["whole batch"])[["plain", "adam"]])


def comparison(one: Path = ONE, two: Path = TWO) -> compare.Comparison:
    """The runs with one update a step, and beside them those with two, if there are any."""
    return compare.compare_runs([one, *([two] if runs_in(two) else [])])


def accuracies(study: compare.Comparison) -> pd.DataFrame:
    """Held-out accuracy by seed: a column an arm, for the measures `end` and `mean`; NaN where an arm lacks the seed.

    A run that has not gone all its steps counts as lacking.

    `end` is that of the final evaluation, on all its problems, as a comparison has it; `mean` that of all evaluations,
    on the problems that all of them have.
    """
    index = ["arm", "seed"]
    ended = study.runs[study.runs["steps"] >= study.runs["planned"]].set_index(index)["accuracy_after"]
    mean = study.curves.groupby(index)["accuracy"].mean()
    return pd.DataFrame({"end": ended, "mean": mean.reindex(ended.index)}).unstack("arm")


def contrasts(study: compare.Comparison, measure: str = "end") -> pd.DataFrame:
    """Differences of accuracy in points, mean over the seeds of both with its 95 % t-interval, a row of CONTRASTS each.

    Args:
        study: as `comparison` gives it; contrasts with an arm that it lacks are left out.
        measure: `end`, or `mean` over the training.
    """
    table = accuracies(study)[measure]
    rows = {name: _row(100 * (table[left] - table[right])) for name, (left, right) in CONTRASTS.items()
            if {left, right} <= set(table)}
    return pd.DataFrame.from_dict(rows, orient="index")


def _row(points: pd.Series) -> dict[str, Any]:
    found = dict(zip(("points", "low", "high"), mean_interval(points.dropna()), strict=True))
    return {**found, "seeds": int(points.notna().sum()), "shown": shown(found)}


def shown(interval: Mapping[str, float]) -> str:
    """What an interval of a difference shows: `higher`, `lower` or `not shown to differ`."""
    low, high = interval["low"], interval["high"]
    if math.isnan(low) or low <= 0 <= high:
        return "not shown to differ"
    return "higher" if low > 0 else "lower"


def costs(study: compare.Comparison) -> pd.DataFrame:
    """What a run of each arm cost, mean over seeds: updates, and the four denominators; NaN is not comparable."""
    names = {"updates": "updates", "tokens": "tokens written", "read": "prompts read",
             "tokens_update": "tokens through the update", "seconds": "seconds"}
    found = study.runs.groupby("arm", sort=False)[list(names)].mean()
    found["seconds"] = found["seconds"].where(study.runs.groupby("arm")["alone"].all())
    return found.rename(columns=names)
