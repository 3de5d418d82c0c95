"""What a model knows of its own solutions: predictions against what came true, and what a gate makes of them.

Pure functions on the tables of one run: an evaluation (a row a problem) or its metrics (a row a step). What several
seeds say together is the business of `compare`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import signal, special, stats

from masa_lib.method.beliefs import RATES_V, UNIFORM_V, log_binomials, log_score
from masa_lib.tasks.predictions import PASS_RATE_STEPS

#: what the metrics say of a gate; averages over the steps in which it acted
GATE = ("gate_precision", "gate_recall", "gate_f1", "signal_lost")
CAP = ("right_cut", "stopped")
SIGNIFICANT = 0.05
#: bins of a calibration, of about equally many problems each in the order of the prediction; equal ones share a bin
BINS = 10
#: steps below which no fall and rise can be told; points as which a longer run is read (means of as many steps each);
#: knots of the line that is taken for the trend; simulated series, and the share of them that is less alike than the
#: likeness that is taken
SHORTEST, LONGEST, KNOTS, PATHS, CAUTION = 40, 1000, 7, 500, 0.25
LIKENESS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
#: rounds of expectation maximisation that find the best constant
_ROUNDS = 500


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


def calibration(predicted: Any, true: Any, samples: Any = math.nan) -> dict[str, Any]:
    """How far off predictions are where they are high and where they are low.

    Args:
        predicted: of each problem.
        true: of each problem, on the same scale.
        samples: solutions behind each true rate (0 to 1), for `floor`.

    Returns:
        `bins` (mean predicted, mean true, number of problems; see BINS), `error`, their mean absolute gap over the
        problems, and `floor`: the error of a perfect predictor, as its true rates, too, are measured with so many
        solutions.
    """
    frame = pd.DataFrame({"predicted": np.asarray(predicted, float), "true": np.asarray(true, float),
                          "samples": samples}).dropna(subset=["predicted", "true"])
    table = frame.groupby(_places(frame["predicted"])).agg(
        predicted=("predicted", "mean"), true=("true", "mean"), problems=("true", "size"))
    gap = (table["predicted"] - table["true"]).abs()
    error = float((gap * table["problems"]).sum() / len(frame)) if len(frame) else math.nan
    return {"error": error, "bins": table.to_dict("records"),
            "floor": calibration_floor(frame["true"], frame["samples"])}


def calibration_floor(true: pd.Series, samples: pd.Series) -> float:
    """The calibration error to expect of predictions that are the true pass rates, from the luck of the samples alone.

    The true rates are taken for those of the Beta distribution that has the mean of the measured ones, and their
    variance less that of sampling. In a bin the gap is a mean of binomial noise, roughly normal, and so the mean of its
    absolute value is sqrt(2 / pi) of its standard deviation.

    Args:
        true: measured pass rates.
        samples: n, of each; below 2 nothing can be said, and the floor is NaN.
    """
    if len(true) < 2 or not (samples >= 2).all():
        return math.nan
    centre = float(true.mean())
    spread = float(true.var() - (true * (1 - true) / (samples - 1)).mean())
    rates = pd.Series(centre, index=range(len(true)))
    if spread > 0:
        size = max(centre * (1 - centre) / spread - 1, 0.01)
        rates[:] = stats.beta.ppf((rates.index + 0.5) / len(true), centre * size, (1 - centre) * size)
    noise = (rates * (1 - rates) * (1 / samples).mean()).groupby(_places(rates)).sum()
    return float(math.sqrt(2 / math.pi) * np.sqrt(noise).sum() / len(true))


def _places(values: pd.Series) -> pd.Series:
    """The bin of each value: about equally many in each, in their order; equal values share one."""
    return ((values.rank() - 0.5) / len(values) * BINS).astype(int)


def drop_then_align(predicted: Any, true: Any) -> dict[str, float]:
    """Whether predictions first fall and then rise towards what is true (Fig. 7a), tested on one run.

    The bottom is chosen on every other step and measured on the steps between. Start, bottom and end are windows of a
    tenth of the steps. Neighbouring steps are alike, and so noise falls and rises, too: each change is compared with
    those of level noise that is as much alike (`_level_noise`), of which it must exceed 95 %.

    Args:
        predicted: mean predicted pass rate of each step's batch, at least 40 steps.
        true: mean pass rate of each step's batch.

    Returns:
        `fall` (start - bottom), `rise` (end - bottom), `gap_bottom` and `gap_end` (true - predicted), `bottom` (share
        of the run) and `shown`: 1 where fall and rise are significant and the gap ends smaller than it was at the
        bottom, else 0. All NaN for a run too short.
    """
    pairs = pd.DataFrame({"predicted": np.asarray(predicted, float), "true": np.asarray(true, float)}).dropna()
    if len(pairs) < SHORTEST:
        return dict.fromkeys(("fall", "rise", "gap_bottom", "gap_end", "bottom", "shown"), math.nan)
    pairs = pairs.groupby(np.arange(len(pairs)) // math.ceil(len(pairs) / LONGEST)).mean()
    values = pairs["predicted"].to_numpy()
    (fall,), (rise,), (place,), width = _fall_and_rise(values[None])
    measured = (pairs["true"] - pairs["predicted"]).iloc[1::2]
    gaps = [float(measured.iloc[at:at + width].mean()) for at in (place, len(measured) - width)]
    sure = (np.array([fall, rise]) > _level_noise(values)).all()
    return {"fall": float(fall), "rise": float(rise), "gap_bottom": gaps[0], "gap_end": gaps[1],
            "bottom": float((2 * place + width) / len(pairs)), "shown": float(sure and abs(gaps[1]) < abs(gaps[0]))}


def _fall_and_rise(paths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Fall, rise and place of the bottom (among every other step) of each path (row), and the width of a window."""
    width = max(paths.shape[1] // 20, 5)
    chosen, measured = (_windows(paths[:, start::2], width) for start in (0, 1))
    place = width + chosen[:, width:measured.shape[1] - width].argmin(axis=1)
    bottom = measured[np.arange(len(paths)), place]
    return measured[:, 0] - bottom, measured[:, -1] - bottom, place, width


def _windows(paths: np.ndarray, width: int) -> np.ndarray:
    """Means of all windows of each path."""
    sums = np.cumsum(np.pad(paths, ((0, 0), (1, 0))), axis=1)
    return (sums[:, width:] - sums[:, :-width]) / width


def _level_noise(values: np.ndarray) -> np.ndarray:
    """The fall and the rise that 5 % of level series exceed whose noise is like that of a series.

    The noise is autoregressive (AR(1)). What a broken line with KNOTS knots leaves of the series shows how strong it is
    and how much alike neighbours are, once both are read off simulated noise that lost the same to such a line.
    """
    residuals = _without_trend(values[None])
    alike, variance, falls, rises = _simulated_noise(len(values)).T
    likeness = np.interp(_likeness(residuals)[0], alike, LIKENESS)
    scale = math.sqrt(residuals.var() / np.interp(likeness, LIKENESS, variance))
    return scale * np.array([np.interp(likeness, LIKENESS, bounds) for bounds in (falls, rises)])


@functools.cache
def _simulated_noise(steps: int) -> np.ndarray:
    """For each of LIKENESS, of AR(1) noise of variance 1 so long: likeness and variance without its trend; bounds.

    The likeness is one that only a share CAUTION of the paths falls below: how much alike a short series is cannot be
    known well, and to take it for less is what makes noise look like a change.
    """
    drawn, rows = np.random.default_rng(steps).standard_normal((PATHS, steps)), []
    for likeness in LIKENESS:
        shocks = drawn * np.where(np.arange(steps), math.sqrt(1 - likeness**2), 1)
        paths = signal.lfilter([1], [1, -likeness], shocks, axis=1)
        residuals, (falls, rises, *_) = _without_trend(paths), _fall_and_rise(paths)
        rows.append([np.quantile(_likeness(residuals), CAUTION), residuals.var(),
                     *(np.quantile(changes, 1 - SIGNIFICANT) for changes in (falls, rises))])
    return np.array(rows)


def _without_trend(paths: np.ndarray) -> np.ndarray:
    """What the nearest broken line with KNOTS equidistant knots leaves of each path."""
    place = np.linspace(0, KNOTS - 1, paths.shape[1])
    line, _ = np.linalg.qr(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(KNOTS))))
    return paths - (paths @ line) @ line.T


def _likeness(paths: np.ndarray) -> np.ndarray:
    """Autocorrelation of each path from step to step; 0 for one without noise."""
    return (paths[:, 1:] * paths[:, :-1]).sum(axis=1) / np.maximum((paths**2).sum(axis=1), np.finfo(float).tiny)


def best_constant(right: Sequence[int], solutions: Sequence[int]) -> np.ndarray:
    """The one belief that, held of every problem, would have scored best on these outcomes, V.

    It is the most likely distribution of the pass rates (found by expectation maximisation), so a belief has to beat it
    to have told problems apart.
    """
    likely_PV = np.exp(log_binomials(right, solutions))
    constant_V = UNIFORM_V
    for _ in range(_ROUNDS):
        joint_PV = likely_PV * constant_V
        constant_V = (joint_PV / joint_PV.sum(axis=1, keepdims=True)).mean(axis=0)
    return constant_V


def belief_measures(beliefs_PV: np.ndarray, right: Sequence[int], solutions: Sequence[int]) -> dict[str, float]:
    """How good beliefs are as beliefs: the log score a problem, that of the best constant, and the doubt (entropy).

    All three are in nats, means over the problems; NaN without any.
    """
    if not len(right):
        return dict.fromkeys(("belief_score", "belief_score_constant", "belief_entropy"), math.nan)
    constant_PV = np.broadcast_to(best_constant(right, solutions), (len(right), len(RATES_V)))
    return {"belief_score": float(log_score(beliefs_PV, right, solutions).mean()),
            "belief_score_constant": float(log_score(constant_PV, right, solutions).mean()),
            "belief_entropy": float(special.entr(np.asarray(beliefs_PV)).sum(axis=1).mean())}


def gate_quality(steps: pd.DataFrame, window: int) -> dict[str, float]:
    """How well a run's gate and cap did once they acted: means over steps.

    Args:
        steps: metrics, a row a step.
        window: steps over which the metrics of GATE and CAP look back (`gate.window`); those of GATE count only where
            the gate acted in all of them, so that they were measured by re-checks.

    Returns:
        The names of GATE and CAP, `dropped` (share of the candidates while the gate acted; a baseline's acts always),
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
