"""What a model knows of its own solutions: predictions against what came true, and what a gate makes of them.

Pure functions on the tables of one run: an evaluation (a row a problem) or its metrics (a row a step). What several
seeds say together is the business of `analysis`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from masa_lib.predictions import PASS_RATE_STEPS

#: what the metrics say of a gate; averages over the steps in which it acted
GATE = ("gate_precision", "gate_recall", "gate_f1", "signal_lost")
CAP = ("right_cut", "stopped")
SIGNIFICANT = 0.05


def correlation(x: Any, y: Any) -> float:
    """Pearson's r over the pairs where both are known; NaN if a side is constant or fewer than three pairs remain."""
    pairs = np.stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)])
    x, y = pairs[:, np.isfinite(pairs).all(axis=0)]
    if x.size < 3 or np.allclose(x, x[0]) or np.allclose(y, y[0]):
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def within_level_correlation(x: Any, y: Any, level: Any) -> float:
    """Pearson's r after each side's mean of the level is taken off: what is known beyond the problem's level."""
    frame = pd.DataFrame({"x": np.asarray(x, float), "y": np.asarray(y, float), "level": np.asarray(level)}).dropna()
    centred = frame[["x", "y"]] - frame.groupby("level")[["x", "y"]].transform("mean")
    return correlation(centred["x"], centred["y"])


def problem_measures(table: pd.DataFrame) -> pd.DataFrame:
    """An evaluation table with the true and the mean predicted pass rate (0 to 1) and length (tokens) beside it."""
    def means(lists: Iterable[Any]) -> list[float]:
        return [float(np.mean(entry)) if entry is not None and len(entry) else math.nan for entry in lists]

    said = means(table["predictions"])
    if "belief" in table:  # read instead of sampled, in thousandths: the mean of the nine rates
        said = [float(np.dot(belief, range(PASS_RATE_STEPS + 1)) / np.sum(belief)) for belief in table["belief"]]
    return table.assign(pass_rate=table["c"] / table["n"],
                        predicted_pass_rate=np.asarray(said) / PASS_RATE_STEPS,
                        predicted_length=means(table["predicted_lengths"]))


def meta_awareness(table: pd.DataFrame) -> dict[str, float]:
    """How well the mean of the M predictions of a problem matches its solutions, over one evaluation table.

    `*_within` takes the level's means off first; `length_*` compares with the mean length of the correct solutions,
    which is what the reward pays for (a problem without one is left out), `length_all_*` with that of all;
    `r_prompt_length` is the R of a regression of the true pass rate on the prompt's length alone.
    """
    frame = problem_measures(table)
    prompt = frame["prompt_length"]
    measures = {}
    for name, predicted, true in (("pass_rate", "predicted_pass_rate", "pass_rate"),
                                  ("length", "predicted_length", "correct_length"),
                                  ("length_all", "predicted_length", "mean_length")):
        measures[f"{name}_r"] = correlation(frame[predicted], frame[true])
        measures[f"{name}_r_within"] = within_level_correlation(frame[predicted], frame[true], frame["level"])
        measures[f"{name}_mae"] = float((frame[predicted] - frame[true]).abs().mean())
    asked = frame["meta_samples"].sum()
    return measures | {
        "parse_rate": float((frame["parsed"] * frame["meta_samples"]).sum() / asked) if asked else math.nan,
        "predicted_pass_rate": float(frame["predicted_pass_rate"].mean()),
        "r_prompt_length": abs(correlation(prompt, frame["pass_rate"])),
        "r_prompt_length_within": abs(within_level_correlation(prompt, frame["pass_rate"], frame["level"])),
    }


def calibration(predicted: Any, true: Any, bins: int = 10) -> dict[str, Any]:
    """How far off predictions are where they are high and where they are low.

    Args:
        predicted: of each problem.
        true: of each problem, on the same scale.
        bins: of about equally many problems each, in the order of the prediction; equal predictions share a bin.

    Returns:
        `bins` (mean predicted, mean true, number of problems) and `error`, their mean absolute gap over the problems.
    """
    frame = pd.DataFrame({"predicted": np.asarray(predicted, float), "true": np.asarray(true, float)}).dropna()
    places = ((frame["predicted"].rank() - 0.5) / len(frame) * bins).astype(int)
    table = frame.groupby(places).agg(predicted=("predicted", "mean"), true=("true", "mean"), problems=("true", "size"))
    gap = (table["predicted"] - table["true"]).abs()
    error = float((gap * table["problems"]).sum() / len(frame)) if len(frame) else math.nan
    return {"error": error, "bins": table.to_dict("records")}


def drop_then_align(predicted: Any, true: Any) -> dict[str, float]:
    """Whether predictions first fall and then rise towards what is true (Fig. 7a), tested on one run.

    The bottom is chosen on every other step and measured on the steps between, so that choosing makes no fall. Start,
    bottom and end are windows of a tenth of the steps; fall and rise are each tested with Welch's t-test.

    Args:
        predicted: mean predicted pass rate of each step's batch, at least 40 steps.
        true: mean pass rate of each step's batch.

    Returns:
        `fall` (start - bottom), `rise` (end - bottom), `gap_bottom` and `gap_end` (true - predicted), `bottom` (share
        of the run) and `shown`: 1 where fall and rise are significant and the gap ends smaller than it was at the
        bottom, else 0. All NaN for a run too short.
    """
    pairs = pd.DataFrame({"predicted": np.asarray(predicted, float), "true": np.asarray(true, float)}).dropna()
    chosen, measured = pairs.iloc[::2]["predicted"].to_numpy(), pairs.iloc[1::2]
    width = max(len(pairs) // 20, 5)
    if len(pairs) < 8 * width:
        return dict.fromkeys(("fall", "rise", "gap_bottom", "gap_end", "bottom", "shown"), math.nan)
    means = np.convolve(chosen, np.full(width, 1 / width), "valid")
    place = width + int(means[width:len(measured) - 2 * width + 1].argmin())
    start, bottom, end = (measured.iloc[at:at + width] for at in (0, place, len(measured) - width))
    rates = [part["predicted"].mean() for part in (start, bottom, end)]
    gaps = [(part["true"] - part["predicted"]).mean() for part in (bottom, end)]
    sure = all(stats.ttest_ind(part["predicted"], bottom["predicted"], equal_var=False, alternative="greater").pvalue
               < SIGNIFICANT for part in (start, end))
    return {"fall": rates[0] - rates[1], "rise": rates[2] - rates[1], "gap_bottom": gaps[0], "gap_end": gaps[1],
            "bottom": (2 * place + width) / len(pairs), "shown": float(sure and abs(gaps[1]) < abs(gaps[0]))}


def gate_quality(steps: pd.DataFrame, window: int) -> dict[str, float]:
    """How well a run's gate and cap did once they acted: means over steps.

    Args:
        steps: metrics, a row a step.
        window: steps over which the metrics of GATE and CAP look back (`gate.window`); those of GATE count only where
            the gate acted in all of them, so that they were measured by re-checks.

    Returns:
        The names of GATE and CAP, `dropped` (share of the candidates while the gate acted; a rival's acts always),
        `gate_steps` and `cap_steps` (shares of the run), `gate_start` (first step), `gate_switches` (how often it went
        off again) and `collapsed` (share of the steps with collapsed predictions); NaN where nothing acted.
    """
    table = steps.reindex(columns=[*GATE, *CAP, "dropped", "gate_on", "cap_on", "predictions_collapsed", "step"])
    gate, cap = table["gate_on"].fillna(0) > 0, table["cap_on"].fillna(0) > 0
    settled = gate.astype(float).rolling(window).min() == 1
    return {**table.loc[settled, list(GATE)].mean(), **table.loc[cap, list(CAP)].mean(),
            "dropped": table.loc[gate | ~gate.any(), "dropped"].mean(),
            "gate_steps": gate.mean(), "cap_steps": cap.mean(), "gate_start": float(table.loc[gate, "step"].min()),
            "gate_switches": float((gate.astype(int).diff() < 0).sum()) if gate.any() else math.nan,
            "collapsed": table["predictions_collapsed"].mean()}
