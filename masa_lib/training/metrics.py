"""What a step's scored rollouts say, as numbers: accuracy, rewards, predicted against true, tokens by stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from masa_lib.analysis.awareness import belief_measures, correlation
from masa_lib.method.beliefs import Belief
from masa_lib.method.rollouts import outcomes
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.tasks.predictions import PASS_RATE_STEPS


def batch_metrics(table: pd.DataFrame) -> dict[str, float]:
    """What a step's scored rollouts say: accuracy, rewards, predicted against true, tokens by stream.

    `tokens_solution` leaves out the solutions of problems that were dropped and re-checked: `tokens_recheck`.
    """
    solved, meta = solutions_of(table), predictions_of(table)
    parsed = meta.dropna(subset=["predicted_pass_rate"])
    true = pd.DataFrame({
        "rate": solved.groupby("group")["reward"].mean(),
        "length": solved[solved["reward"] > 0].groupby("group")["length"].mean(),
        "predicted_rate": parsed.groupby("group")["predicted_pass_rate"].mean().astype(float) / PASS_RATE_STEPS,
        "predicted_length": parsed.groupby("group")["predicted_length"].mean().astype(float)})
    scored = table[table["reward"].notna()]
    flat = ~scored["advantage"].ne(0).groupby([scored["stream"], scored["group"]]).any()
    zero_variance = flat.groupby("stream").mean()
    return {
        "accuracy": solved["correct"].mean(), "reward_solution": solved["reward"].mean(),
        "reward_meta": meta["reward"].mean(), "reward_difficulty": meta["reward_difficulty"].mean(),
        "reward_length": meta["reward_length"].mean(), "reward_notion": meta["reward_notion"].mean(),
        "parse_rate": len(parsed) / len(meta) if len(meta) else math.nan,
        "pass_rate_r": correlation(true["predicted_rate"], true["rate"]),
        "pass_rate_mae": (true["predicted_rate"] - true["rate"]).abs().mean(),
        "length_r": correlation(true["predicted_length"], true["length"]),
        "length_mae": (true["predicted_length"] - true["length"]).abs().mean(),
        "predicted_pass_rate": true["predicted_rate"].mean(), "predicted_pass_rate_std": true["predicted_rate"].std(),
        "predicted_length": true["predicted_length"].mean(), "solution_length": solved["length"].mean(),
        "truncated": (solved["finish"] == "length").mean(),
        "stopped": (solved["capped"] & (solved["finish"] == "length")).mean(),
        "zero_variance_solution": zero_variance.get("solution", math.nan),
        "zero_variance_meta": zero_variance.get("meta", math.nan),
        "tokens_solution": int(solved.loc[solved["admitted"], "length"].sum()),
        "tokens_recheck": int(solved.loc[~solved["admitted"], "length"].sum()),
        "tokens_meta": int(meta["length"].sum())}


def belief_metrics(table: pd.DataFrame, found: Sequence[Belief | None]) -> dict[str, float]:
    """What a step's scored rollouts say of the beliefs about its problems, in place of what sampled predictions would.

    Args:
        table: `group` is the problem's place among the candidates.
        found: the belief about each candidate; empty metrics where none was read.
    """
    if not found or found[0] is None:
        return {}
    went = outcomes(table)
    read_PV = np.array([found[group].probabilities for group in went.index]).reshape(len(went), -1)
    means, rates = pd.Series([found[group].mean for group in went.index]), went["right"] / went["solutions"]
    return {"pass_rate_r": correlation(means, rates), "pass_rate_mae": (means.to_numpy() - rates).abs().mean(),
            "predicted_pass_rate": means.mean(), "predicted_pass_rate_std": means.std(),
            "belief_outside": float(np.mean([belief.outside for belief in found])),
            **belief_measures(read_PV, went["right"].tolist(), went["solutions"].tolist())}
