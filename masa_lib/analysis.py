"""What a run has learned and what it cost: pure functions on data frames, and the comparison of recorded runs.

Every number of a comparison is computed from per-step records (metrics, evaluations, one row a problem), never from a
stored summary. Deliberately no drawing, and no smoothing beyond the monotone fit by which time-to-target is read off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from masa_lib.runs import Run

REFERENCE = "grpo"
TARGET_SHARE = 0.9
PAPER = Path(__file__).resolve().parent.parent / "data" / "paper"
TOKENS = ("tokens_solution", "tokens_meta", "tokens_prefill", "tokens_update")
STEP_COLUMNS = (*TOKENS, "seconds_total", "updates")
ENDS = ("before", "after")
# Names in the comparison's JSON -> names of meta_awareness.
MEASURES = {"r_pass_rate": "pass_rate_r", "r_pass_rate_within": "pass_rate_r_within", "mae_pass_rate": "pass_rate_mae",
            "r_length": "length_r", "r_length_within": "length_r_within", "mae_length": "length_mae",
            "r_length_all": "length_all_r", "r_prompt_length": "r_prompt_length",
            "r_prompt_length_within": "r_prompt_length_within", "predicted_pass_rate": "predicted_pass_rate",
            "parse_rate": "parse_rate"}


class AnalysisError(ValueError):
    """The runs cannot be compared; the message says which and why."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: the JSON-ready summary and the tables behind it, each with the columns `arm` and `seed`.

    `runs` has a row a run, `curves` a row an evaluation (with its cost so far), `steps` a row a training step and
    `problems` a row a held-out problem of a run's first (`when` = before) and last (after) evaluation.
    """

    summary: dict[str, Any]
    runs: pd.DataFrame
    curves: pd.DataFrame
    steps: pd.DataFrame
    problems: pd.DataFrame


def pass_at_k(samples: Any, correct: Any, k: int) -> np.ndarray:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) (Chen et al. 2021), element by element.

    Args:
        samples: n, solutions sampled of each problem.
        correct: c, how many of them are right.
        k: at most n.

    Raises:
        AnalysisError: if k is below 1 or above the smallest n.
    """
    n, c = np.broadcast_arrays(np.asarray(samples, dtype=float), np.asarray(correct, dtype=float))
    if k < 1 or (n.size and k > n.min()):
        raise AnalysisError(f"pass@{k} needs 1 to n samples a problem; the smallest n here is {n.min():g}.")

    def log_choose(total: np.ndarray) -> np.ndarray:
        return special.gammaln(total + 1) - special.gammaln(total - k + 1)

    return -np.expm1(log_choose(n - c) - log_choose(n))


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and t-interval of values (seeds, mostly), NaN left out; the ends are NaN for fewer than two."""
    kept = np.asarray(list(values), dtype=float)
    kept = kept[np.isfinite(kept)]
    if kept.size < 2:
        return (float(kept[0]) if kept.size else math.nan), math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, kept.size - 1) * kept.std(ddof=1) / math.sqrt(kept.size)
    return float(kept.mean()), float(kept.mean() - half), float(kept.mean() + half)


def pass_at_k_interval(table: pd.DataFrame, k: int, *, level: float = 0.95, draws: int = 2000,
                       seed: int = 0) -> tuple[float, float, float]:
    """Mean pass@k and its bootstrap interval over problems (a problem that several seeds met is drawn as one).

    Args:
        table: evaluation tables with the columns problem_id, n and c.
        k: at most the smallest n.
        level: of the percentile interval.
        draws: resamples of the problems.
        seed: of the resampling.
    """
    values = pd.Series(pass_at_k(table["n"], table["c"], k), index=table["problem_id"].to_numpy())
    values = values.groupby(level=0).mean().to_numpy()
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


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

    return table.assign(pass_rate=table["c"] / table["n"],
                        predicted_pass_rate=np.asarray(means(table["predictions"])) / 8,
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
    return {"error": float((gap * table["problems"]).sum() / len(frame)), "bins": table.to_dict("records")}


def time_to_target(steps: Sequence[float], accuracy: Sequence[float], cost: Sequence[float], target: float) -> float:
    """Cost at which a monotone (isotonic) fit of the curve first reaches the target; infinite if it never does.

    Args:
        steps: of the evaluations, in any order.
        accuracy: held-out accuracy at each.
        cost: tokens or seconds spent until each; between two, fit and cost are straight lines.
        target: accuracy to reach; NaN (there is none) gives NaN.
    """
    order = np.argsort(steps, kind="stable")
    cost = np.asarray(cost, dtype=float)[order]
    if math.isnan(target):
        return math.nan
    fit = optimize.isotonic_regression(np.asarray(accuracy, dtype=float)[order]).x
    if fit[-1] < target:
        return math.inf
    after = int(np.argmax(fit >= target))
    if after == 0:
        return float(cost[0])
    share = (target - fit[after - 1]) / (fit[after] - fit[after - 1])
    return float(cost[after - 1] + share * (cost[after] - cost[after - 1]))


def paired_ratio(reference: pd.Series, costs: pd.Series) -> dict[str, float]:
    """Geometric mean of reference / cost over the seeds (index) both have, with the t-interval of its logarithm."""
    pairs = pd.concat([reference, costs], axis=1, join="inner").to_numpy(dtype=float)
    pairs = pairs[np.isfinite(pairs).all(axis=1) & (pairs > 0).all(axis=1)]
    return _interval(np.exp(mean_interval(np.log(pairs[:, 0] / pairs[:, 1]))))


def compare_runs(paths: str | Path | Iterable[str | Path]) -> Comparison:
    """Compare run folders, or the runs inside a folder, arm by arm; every ratio is against the arm `grpo`.

    An arm is the folder's name without `-s<seed>`, or the method where a folder is not named so. The target is the
    base accuracy plus 90 % of grpo's mean gain; sampled tokens and seconds of training are cost, evaluations are not.

    Raises:
        AnalysisError: no run is found, two runs are the same arm and seed, or a run has only begun.
        RunError: a run cannot be read.
    """
    records = sorted(map(_read_run, find_runs([paths] if isinstance(paths, str | Path) else paths)),
                     key=lambda record: (*arm_rank(record[0]["arm"]), record[0]["seed"]))
    runs = pd.DataFrame([record[0] for record in records])
    curves, steps, problems = (pd.concat(parts, ignore_index=True) for parts in list(zip(*records, strict=True))[1:])
    double = runs[runs.duplicated(["arm", "seed"], keep=False)]
    if len(double):
        raise AnalysisError(f"The runs {' and '.join(double['path'])} are all arm {double['arm'].iloc[0]!r} with seed "
                            f"{double['seed'].iloc[0]}; leave one out, or name the folders <arm>-s<seed>.")
    target, notes = _target(runs[runs["arm"] == REFERENCE])
    for cost in ("tokens", "seconds"):
        runs[f"{cost}_to_target"] = [
            time_to_target(curve["step"], curve["accuracy"], curve[cost], target) for _, curve, *_ in records]
    methods = {arm: _arm_summary(group, runs[runs["arm"] == REFERENCE], problems[problems["arm"] == arm])
               for arm, group in runs.groupby("arm", sort=False)}
    summary = {"methods": methods, "target": target, "warnings": notes + _warnings(runs)}
    return Comparison(_plain(summary), runs, curves, steps, problems)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The run folders among `paths` and directly inside them.

    Raises:
        AnalysisError: a path holds no run.
    """
    found = []
    for path in map(Path, paths):
        here = [folder for folder in [path, *sorted(path.glob("*/"))] if (folder / "config.toml").is_file()]
        if not here:
            raise AnalysisError(f"There is no run in {path}. Name runs (folders with a config.toml, as `masa train` "
                                "writes them) or a folder that holds runs.")
        found += here
    return list(dict.fromkeys(found))


def arm_rank(arm: str) -> tuple[int, str]:
    """Sorting key of arms: grpo, masa, then the others by name."""
    return ({REFERENCE: 0, "masa": 1}.get(arm, 2), arm)


def paper_points(measure: str, folder: Path = PAPER) -> pd.DataFrame:
    """The points of the paper's Fig. 1a (arm grpo) and 1b (masa) as columns arm, predicted and actual.

    Args:
        measure: pass_rate (0 to 1) or length (tokens).
        folder: of the published numbers.
    """
    name = "difficulty" if measure == "pass_rate" else measure
    frames = [pd.read_csv(folder / "figures" / f"fig1{panel}_{name}.csv").iloc[:, :3] for panel in "ab"]
    points = pd.concat([frame.set_axis(["arm", "predicted", "actual"], axis=1) for frame in frames], ignore_index=True)
    return points.assign(arm=points["arm"].str.lower())


def _read_run(path: Path) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """One run as (row of totals, evaluations with costs, training steps, measured problems before and after)."""
    run = Run.open(path)
    name = re.fullmatch(r"(.+)-s\d+", path.resolve().name)
    key = {"arm": name[1] if name else run.config.method, "seed": run.config.seed}
    steps = run.metrics().select_dtypes("number")
    steps = steps.reindex(columns=list(dict.fromkeys(["step", *STEP_COLUMNS, *steps])))
    filled = steps[list(STEP_COLUMNS)].fillna(0.0)
    steps = steps.assign(tokens=(filled["tokens_solution"] + filled["tokens_meta"]).cumsum(),
                         seconds=filled["seconds_total"].cumsum(), **key)
    curve = run.evaluations().assign(**key)
    if curve.empty or steps.empty:
        raise AnalysisError(f"The run {path} has no evaluation or no finished step yet: there is nothing to compare.")
    spent = [steps.loc[steps["step"] <= step, ["tokens", "seconds"]].max() for step in curve["step"]]
    curve[["tokens", "seconds"]] = pd.DataFrame(spent).fillna(0.0).to_numpy()
    totals = filled.sum()
    row = key | {"path": path.name, "steps": len(steps), "planned": run.config.steps,
                 "seconds": totals["seconds_total"], "tokens": totals["tokens_solution"] + totals["tokens_meta"],
                 **totals[[*TOKENS, "updates"]]}
    problems = []
    for when, end in zip(ENDS, (curve.iloc[0], curve.iloc[-1]), strict=True):
        table = run.evaluation_table(int(end["step"]))
        row[f"accuracy_{when}"] = float(end["accuracy"])
        row |= {f"{name}_{when}": value for name, value in meta_awareness(table).items()}
        problems.append(problem_measures(table).assign(when=when, **key))
    return row, curve, steps, pd.concat(problems)


def _target(grpo: pd.DataFrame) -> tuple[float, list[str]]:
    """The accuracy that time-to-target asks for, and a note where there is none."""
    if grpo.empty:
        return math.nan, ["There is no grpo arm, so there is no target and no ratio."]
    base, final = grpo[["accuracy_before", "accuracy_after"]].mean()
    if not final > base:
        return math.nan, ["The grpo arm has not gained accuracy, so there is no target and no ratio."]
    return float(base + TARGET_SHARE * (final - base)), []


def _warnings(runs: pd.DataFrame) -> list[str]:
    """What makes the comparison unfair, a sentence each."""
    notes = [f"{row.path} stands at step {row.steps} of {row.planned}." for row in runs.itertuples()
             if row.steps < row.planned]
    if runs["updates"].nunique() > 1:
        notes.append("The runs took different numbers of optimiser updates, so they are not compared at equal updates: "
                     + ", ".join(f"{row.path} {row.updates:g}" for row in runs.itertuples()) + ".")
    return notes


def _arm_summary(runs: pd.DataFrame, grpo: pd.DataFrame, problems: pd.DataFrame) -> dict[str, Any]:
    """The JSON entry of an arm; `runs` and `grpo` have a row a seed, `problems` the rows of both its evaluations."""
    runs, grpo = runs.set_index("seed"), grpo.set_index("seed")
    rates = (problems["c"] / problems["n"]).groupby([problems["level"], problems["when"]]).mean().unstack()
    never = int(np.isinf(runs["tokens_to_target"]).sum())
    undefined = int(runs["pass_rate_r_after"].isna().sum())
    notes = {f"{never} of {len(runs)} seeds never reach the target and are left out of the ratios.": never,
             f"r of the pass rate after training is undefined in {undefined} of {len(runs)} seeds.": undefined}
    return {
        "seeds": len(runs),
        "accuracy_base": runs["accuracy_before"].mean(),
        "accuracy_final": _interval(mean_interval(runs["accuracy_after"])),
        "accuracy_above_grpo": _interval(mean_interval(runs["accuracy_after"] - grpo["accuracy_after"])),
        **{name: runs[name].mean() for name in ("tokens", *TOKENS, "seconds", "updates")},
        **{f"{cost}_to_target_ratio": paired_ratio(grpo[f"{cost}_to_target"], runs[f"{cost}_to_target"])
           for cost in ("tokens", "seconds")},
        **{name: {when: runs[f"{column}_{when}"].mean() for when in ENDS} for name, column in MEASURES.items()},
        "never_crossed": never, "note": " ".join(note for note, count in notes.items() if count),
        "gain_by_level": {str(level): gain for level, gain in (rates["after"] - rates["before"]).items()},
        **{f"pass_at_32_{name}": _interval(pass_at_k_interval(problems[problems["when"] == when], 32))
           if problems["n"].min() >= 32 else None for name, when in (("base", "before"), ("final", "after"))},
    }


def _interval(values: Iterable[float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), values, strict=True))


def _plain(value: Any) -> Any:
    """Nested plain values; a number that is not finite becomes None, so that every JSON reader takes it."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
