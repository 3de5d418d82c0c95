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

from masa_lib import files, health
from masa_lib.awareness import calibration as calibration
from masa_lib.awareness import correlation as correlation
from masa_lib.awareness import drop_then_align, gate_quality, meta_awareness, problem_measures
from masa_lib.awareness import within_level_correlation as within_level_correlation
from masa_lib.config import METHODS
from masa_lib.errors import MasaError
from masa_lib.predictions import PASS_RATE_STEPS
from masa_lib.runs import Run, is_run

REFERENCE, EFFICIENT, FRESH = "grpo", "masa-efficient", "-fresh"
#: arms that know what a training does not: the problems' levels, or their true pass rates
PRIVILEGED = ("level-table", "oracle")
TARGET_SHARE = 0.9
#: most cores that other processes may use, on average, in a run that had the machine to itself
ALONE = 0.25
PAPER = Path(__file__).resolve().parent.parent / "data" / "paper"
#: the streams whose tokens are cost; a record without one of them had none
COST = ("tokens_solution", "tokens_recheck", "tokens_meta", "tokens_cloning")
TOKENS = (*COST, "tokens_oracle", "tokens_prefill", "tokens_decode", "tokens_update")
STEP_COLUMNS = (*TOKENS, "seconds_total", "updates")
ENDS = ("before", "after")
# Names in the comparison's JSON -> names of meta_awareness.
MEASURES = {"r_pass_rate": "pass_rate_r", "r_pass_rate_within": "pass_rate_r_within", "mae_pass_rate": "pass_rate_mae",
            "r_length": "length_r", "r_length_within": "length_r_within", "mae_length": "length_mae",
            "r_length_all": "length_all_r", "r_prompt_length": "r_prompt_length",
            "r_prompt_length_within": "r_prompt_length_within", "predicted_pass_rate": "predicted_pass_rate",
            "parse_rate": "parse_rate"}
#: measures of gate and cap in the comparison's JSON, from `gate_quality`
GATES = ("gate_precision", "gate_recall", "gate_f1", "signal_lost", "dropped", "gate_steps", "gate_start",
         "gate_switches", "cap_steps", "right_cut", "stopped", "collapsed")


class AnalysisError(MasaError, ValueError):
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


def calibration_curve(problems: pd.DataFrame) -> pd.DataFrame:
    """The true pass rate where a pass rate is predicted: a row an arm and eighth, over the seeds.

    Args:
        problems: columns arm, seed, predicted_pass_rate and pass_rate, such as `Comparison.problems` of one end.

    Returns:
        Columns arm, bin (the nearest eighth of the mean prediction), predicted, true, low, high (t-interval over
        seeds), seeds and problems (how many lie behind the point).
    """
    known = problems.dropna(subset=["predicted_pass_rate"])
    places = (known["predicted_pass_rate"] * PASS_RATE_STEPS).round().astype(int).rename("bin")
    by_seed = known.groupby(["arm", places, "seed"]).agg(
        predicted=("predicted_pass_rate", "mean"), true=("pass_rate", "mean"), problems=("pass_rate", "size"))
    rows = [{"arm": arm, "bin": place, "predicted": part["predicted"].mean(), "seeds": len(part),
             "problems": int(part["problems"].sum()),
             **dict(zip(("true", "low", "high"), mean_interval(part["true"]), strict=True))}
            for (arm, place), part in by_seed.groupby(level=["arm", "bin"])]
    return pd.DataFrame(rows, columns=["arm", "bin", "predicted", "true", "low", "high", "seeds", "problems"])


def compare_runs(paths: str | Path | Iterable[str | Path]) -> Comparison:
    """Compare run folders, or the runs inside a folder, arm by arm; every ratio is against `reference` of the arm.

    An arm is the folder's name without `-s<seed>`, or the method where a folder is not named so. The target is the
    base accuracy plus 90 % of the reference's mean gain; the tokens of COST and seconds of training are cost,
    evaluations and what an oracle measures are not. Seconds to the target are those of runs that had the machine to
    themselves, by `cores_others` of their metrics (cores that other processes used, mean of a step).

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
    found = {name: _target(runs[runs["arm"] == name], name) for name in dict.fromkeys(map(reference, runs["arm"]))}
    runs["target"] = [found[reference(arm)][0] for arm in runs["arm"]]
    for cost in ("step", "tokens", "seconds", *COST):
        runs[f"{cost}_to_target"] = [time_to_target(curve["step"], curve["accuracy"], curve[cost], target)
                                     for target, (_, curve, *_) in zip(runs["target"], records, strict=True)]
    runs.loc[~runs["alone"], "seconds_to_target"] = math.nan
    methods = {arm: _arm_summary(group, runs, problems[problems["arm"] == arm])
               for arm, group in runs.groupby("arm", sort=False)}
    notes = [note for _, note in found.values() if note]
    summary = {"methods": methods, "target": found.get(REFERENCE, (math.nan,))[0], "warnings": notes + _warnings(runs)}
    return Comparison(_plain(summary), runs, curves, steps, problems)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The run folders among `paths` and directly inside them.

    Raises:
        AnalysisError: a path holds no run.
    """
    found = []
    for path in map(Path, paths):
        here = [folder for folder in [path, *sorted(path.glob("*/"))] if is_run(folder)]
        if not here:
            raise AnalysisError(f"There is no run in {path}. Name runs (folders with a config.toml, as `masa train` "
                                "writes them) or a folder that holds runs.")
        found += here
    return list(dict.fromkeys(found))


def arm_rank(arm: str) -> tuple[bool, int, str]:
    """Sorting key of arms: the methods in their order, then others by name; arms on a fresh stream come last."""
    base = arm.removesuffix(FRESH)
    return base != arm, METHODS.index(base) if base in METHODS else len(METHODS), arm


def reference(arm: str) -> str:
    """The arm that another is measured against: grpo, for arms on a fresh stream grpo on a fresh stream."""
    return REFERENCE + FRESH if arm.endswith(FRESH) else REFERENCE


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
    steps = run.metrics()
    files.check_columns(steps, f"The metrics of the run {path}",
                        numbers=[name for name in STEP_COLUMNS if name in steps])
    steps = steps.select_dtypes("number")
    steps = steps.reindex(columns=list(dict.fromkeys(["step", *STEP_COLUMNS, *steps])))
    spent = steps[list(STEP_COLUMNS)].fillna(0.0).cumsum().set_axis(steps["step"])
    spent = spent.assign(tokens=spent[list(COST)].sum(axis=1), seconds=spent["seconds_total"])
    steps = steps.assign(tokens=spent["tokens"].to_numpy(), seconds=spent["seconds"].to_numpy(), **key)
    curve = run.evaluations().assign(**key)
    files.check_columns(curve, f"The evaluations of the run {path}", numbers=("accuracy",) if len(curve) else ())
    if curve.empty or steps.empty:
        raise AnalysisError(f"The run {path} has no evaluation or no finished step yet: there is nothing to compare.")
    costs = ["tokens", "seconds", *COST]
    curve[costs] = spent[costs].reindex(curve["step"], method="ffill").fillna(0.0).to_numpy()
    row = key | {"path": path.name, "steps": len(steps), "planned": run.config.steps,
                 "troubles": health.troubles(steps, run.config.model.precision),
                 "difficulty": run.config.reward.difficulty_mode, **spent.iloc[-1].drop("seconds_total"),
                 "alone": bool("cores_others" in steps and steps["cores_others"].mean() <= ALONE),
                 **gate_quality(steps, run.config.gate.window), **_fall_and_rise(steps)}
    problems = []
    for when, end in zip(ENDS, (curve.iloc[0], curve.iloc[-1]), strict=True):
        table = run.evaluation_table(int(end["step"]))
        check_problems(table, f"The evaluation of step {int(end['step'])} of the run {path}")
        table = problem_measures(table)
        row[f"accuracy_{when}"] = float(end["accuracy"])
        row |= {f"{name}_{when}": value for name, value in meta_awareness(table).items()}
        row[f"calibration_error_{when}"] = calibration(table["predicted_pass_rate"], table["pass_rate"])["error"]
        problems.append(table.assign(when=when, **key))
    return row, curve, steps, pd.concat(problems)


def check_problems(table: pd.DataFrame, what: str) -> None:
    """Refuse what is no table of an evaluation, one row a problem, with a RunError that calls it `what`."""
    files.check_columns(table, what, texts=("problem_id", "problem"), lists=("predictions", "predicted_lengths"),
                        numbers=("level", "prompt_length", "n", "c", "mean_length", "correct_length", "parsed",
                                 "meta_samples"))
    if table.empty or not table["n"].ge(1).all() or not table["c"].between(0, table["n"]).all():
        raise files.RunError(f"{what} has a problem without solutions, or with more right ones than there are.")


def _fall_and_rise(steps: pd.DataFrame) -> dict[str, float]:
    """`drop_then_align` of the steps without a gate, whose batches are all that was asked."""
    table = steps.reindex(columns=["predicted_pass_rate", "accuracy", "gate_on"])
    table = table[~(table["gate_on"] > 0)]
    return {f"align_{name}": value
            for name, value in drop_then_align(table["predicted_pass_rate"], table["accuracy"]).items()}


def _target(runs: pd.DataFrame, name: str) -> tuple[float, str]:
    """The accuracy that time-to-target asks for, from the runs of a reference arm; without one, the reason."""
    if runs.empty:
        return math.nan, f"There is no {name} arm, so there is no target and no ratio."
    base, final = runs[["accuracy_before", "accuracy_after"]].mean()
    if not final > base:
        return math.nan, f"The {name} arm has not gained accuracy, so there is no target and no ratio."
    return float(base + TARGET_SHARE * (final - base)), ""


def _warnings(runs: pd.DataFrame) -> list[str]:
    """What makes the comparison unfair, a sentence each."""
    notes = [f"{row.path} stands at step {row.steps} of {row.planned}." for row in runs.itertuples()
             if row.steps < row.planned]
    notes += [f"{row.path}: {said}" for row in runs.itertuples() for said in row.troubles]
    if runs["updates"].nunique() > 1:
        notes.append("The runs took different numbers of optimiser updates, so they are not compared at equal updates: "
                     + ", ".join(f"{row.path} {row.updates:g}" for row in runs.itertuples()) + ".")
    if not runs["alone"].all():
        notes.append(f"{(~runs['alone']).sum()} of {len(runs)} runs do not show that they had the machine to "
                     "themselves, so their seconds are not compared.")
    return notes


def _arm_summary(runs: pd.DataFrame, everything: pd.DataFrame, problems: pd.DataFrame) -> dict[str, Any]:
    """The JSON entry of an arm: `runs` are its own, a row a seed, `problems` the rows of both its evaluations."""
    arm = runs["arm"].iloc[0]
    runs, base, efficient = (everything[everything["arm"] == name].set_index("seed") for name in (
        arm, reference(arm), EFFICIENT + (FRESH if arm.endswith(FRESH) else "")))
    rates = (problems["c"] / problems["n"]).groupby([problems["level"], problems["when"]]).mean().unstack()
    never = int(np.isinf(runs["tokens_to_target"]).sum())
    undefined = int(runs["pass_rate_r_after"].isna().sum())
    notes = {f"{never} of {len(runs)} seeds never reach the target and are left out of the ratios.": never,
             f"r of the pass rate after training is undefined in {undefined} of {len(runs)} seeds.": undefined}
    return {
        "seeds": len(runs), "privileged": arm.removesuffix(FRESH) in PRIVILEGED, "reference": reference(arm),
        "target": runs["target"].iloc[0], "difficulty": " and ".join(runs["difficulty"].unique()),
        "accuracy_base": runs["accuracy_before"].mean(),
        "accuracy_final": over_seeds(runs["accuracy_after"]),
        "accuracy_above_grpo": over_seeds(runs["accuracy_after"] - base["accuracy_after"]),
        **{name: runs[name].mean() for name in ("tokens", *TOKENS, "seconds", "updates")},
        **{f"{cost}s_to_target_ratio": paired_ratio(base[f"{cost}s_to_target"], runs[f"{cost}s_to_target"])
           for cost in ("token", "second")},
        **_arithmetic(runs, base),
        "tokens_below_efficient": paired_ratio(efficient["tokens_to_target"], runs["tokens_to_target"]),
        **{name: {when: runs[f"{column}_{when}"].mean() for when in ENDS} for name, column in MEASURES.items()},
        "final": {name: over_seeds(runs[f"{MEASURES[name]}_after"]) for name in ("r_pass_rate", "r_pass_rate_within",
                                                                                "r_length", "mae_pass_rate")},
        "calibration_error": {when: over_seeds(runs[f"calibration_error_{when}"]) for when in ENDS},
        **{name: over_seeds(runs[name]) for name in GATES},
        "drop_then_align": {"measured": int(runs["align_shown"].count()), "shown": int(runs["align_shown"].sum()),
                            **{name: over_seeds(runs[f"align_{name}"]) for name in ("fall", "rise")}},
        "never_crossed": never, "note": " ".join(note for note, count in notes.items() if count),
        "gain_by_level": {str(level): gain for level, gain in (rates["after"] - rates["before"]).items()},
        **{f"pass_at_32_{name}": _interval(pass_at_k_interval(problems[problems["when"] == when], 32))
           if problems["n"].min() >= 32 else None for name, when in (("base", "before"), ("final", "after"))},
    }


def _arithmetic(runs: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
    """Where the tokens to the target went: each stream as a share of what the reference spends, and the steps.

    Means over the seeds in which both reach the target; the streams add up to `tokens`.
    """
    both = runs.index.intersection(base.index)
    both = both[np.isfinite(runs.loc[both, "tokens_to_target"]) & np.isfinite(base.loc[both, "tokens_to_target"])]
    parts = {name: (runs.loc[both, f"{name}_to_target"] / base.loc[both, "tokens_to_target"]).mean()
             for name in ("tokens", *COST)}
    return {"tokens_of_reference": parts, "steps_to_target_ratio": paired_ratio(
        base.loc[both, "step_to_target"], runs.loc[both, "step_to_target"])}


def over_seeds(values: Iterable[float]) -> dict[str, float]:
    """`mean_interval` by name."""
    return _interval(mean_interval(values))


def _interval(values: Iterable[float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), values, strict=True))


def _plain(value: Any) -> Any:
    """Nested plain values; a number that is not finite becomes None, so that every JSON reader takes it."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
