"""Group-relative advantages: how much better a rollout did than the others of its group.

What the update asks of a model is decided here, not by the height of a reward: in a group with two different answers,
the division by the standard deviation leaves only which of them did better. So every score that falls with the error
asks for the median of the pass rates, and the quadratic one for their mean only where nothing is divided
(`normalise_meta = "none"`). No tensors of torch are needed, so that records can be read anywhere. Suffixes: `_P`
problem, `_G` member of a group.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pandas as pd

from masa_lib.config import Config
from masa_lib.method import rewards
from masa_lib.method.rewards import PARTS

#: an array of numpy or a tensor of torch
Array = TypeVar("Array")
#: turns of taking off averages until neither is left; what is below the second number is rounding
_ROUNDS, _ROUNDING = 20, 1e-9
#: what a predicted pass rate gains by being said seldom, a nat of its surprise
_RARE = 0.2


def advantages(rewards_PG: Array, normalise_std: bool = True) -> Array:
    """Rewards relative to their group's mean, over the group's sample standard deviation plus 1e-6.

    Args:
        rewards_PG: one row a group of at least two; an array or a tensor.
        normalise_std: divide by the standard deviation.

    Returns:
        Advantages of the same kind and shape; exactly 0 throughout a group whose rewards are all equal.

    Source: DeepSeekMath (2402.03300), section 4.1.2; sample standard deviation as in the released code.
    """
    centred = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if normalise_std:
        variance = (centred**2).sum(axis=1, keepdims=True) / (rewards_PG.shape[1] - 1)
        centred = centred / (variance**0.5 + 1e-6)
    return centred * ~zero_variance(rewards_PG)[:, None]


def zero_variance(rewards_PG: Array) -> Array:
    """Which groups carry no gradient because all their rewards are equal; shape P, bool."""
    return (rewards_PG == rewards_PG[:, :1]).all(axis=1)


def stream_advantages(stream: pd.DataFrame, config: Config) -> pd.Series:
    """The advantages of one stream's groups; a rollout that is alone in its group has none.

    Args:
        stream: columns stream (one value), group and reward; PARTS too where the meta stream's parts are normalised,
            and predicted_pass_rate for a contrast.
        config: the weights of the parts, and how advantages are normalised.
    """
    sizes = stream.groupby("group")["group"].transform("size")

    def of(column: str, normalise: bool) -> pd.Series:
        """Advantages of a column within each group, 0 for one that is alone; groups of a size together."""
        values = pd.Series(0.0, stream.index)
        for size, rows in stream[sizes > 1].groupby(sizes):
            rewards_PG = rows[column].to_numpy(dtype=float).reshape(-1, size)
            values[rows.index] = advantages(rewards_PG, normalise and config.update.normalise_std).ravel()
        return values

    mode = config.update.normalise_meta if stream["stream"].iloc[0] == "meta" else "reward"
    if mode not in ("parts", "contrast"):
        return of("reward", mode == "reward")
    parts = {part: of(part, True) for part in PARTS}
    if mode == "contrast":
        parts["reward_difficulty"].update(contrasted(stream[(sizes > 1) & stream["predicted_pass_rate"].notna()]))
    return rewards.weighted(parts, rewards.effective(config.reward))


def contrasted(values: pd.DataFrame) -> pd.Series:
    """Difficulty advantages that teach to tell problems apart, and keep all values in use.

    All problems move the chance of a value together much faster than apart, so predictions collapse to a constant
    before a model learns to tell problems apart. What a group and what a value earn on average are taken off, as in a
    two-way analysis of variance, and a value that is seldom said in the step gains a little, which holds against drift.
    The predictions then rank problems, over the whole scale; nothing trains their mean.

    Args:
        values: predictions that parsed; columns group, predicted_pass_rate and reward_difficulty.

    Returns:
        What remains, over the standard deviation that the step's rewards have within groups, and the gain of rarity.
    """
    groups, rates = values["group"], values["predicted_pass_rate"]
    reward, surprise = values["reward_difficulty"].astype(float), -np.log(rates.map(rates.value_counts(normalize=True)))
    centred = left = reward - reward.groupby(groups).transform("mean")
    for _ in range(_ROUNDS):
        left = left - left.groupby(rates).transform("mean")
        left = left - left.groupby(groups).transform("mean")
    found = left / (centred.std(ddof=0) + 1e-6) + _RARE * (surprise - surprise.groupby(groups).transform("mean"))
    return found.astype(float).where(found.abs() > _ROUNDING, 0.0)
