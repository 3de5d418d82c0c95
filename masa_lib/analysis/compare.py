"""What a run has learned and what it cost: pure functions on data frames, and the comparison of recorded runs.

Every number of a comparison is computed from per-step records (metrics, evaluations, one row a problem), never from a
stored summary. Deliberately no drawing, and no smoothing beyond the monotone fit by which time-to-target is read off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from masa_lib import DATA
from masa_lib import crash_safe_files as files
from masa_lib.analysis.costs import COST, COSTS, TARGET_SHARE, TOKENS, Curve, equal_accuracy
from masa_lib.analysis.intervals import (
    POSITIVE,
    SHARE,
    SIGNED,
    mean_interval,
    named,
    over_seeds,
    paired_ratio,
    ratio_of_logs,
    share_interval,
)
from masa_lib.analysis.records import (
    CROSSED,
    ENDS,
    REFERENCE,
    AnalysisError,
    Record,
    arms_of,
    differing_settings,
    find_runs,
    read_run,
)
from masa_lib.config import METHODS
from masa_lib.runs.folder import Run
from masa_lib.tasks.predictions import PASS_RATE_STEPS

EFFICIENT, FRESH = "masa-efficient", "-fresh"
#: arms that know what a training does not: the problems' levels, or their true pass rates
PRIVILEGED = ("level-table", "oracle")
PAPER = DATA / "paper"
# Names in the comparison's JSON -> names of meta_awareness.
MEASURES = {"r_pass_rate": "pass_rate_r", "r_pass_rate_within": "pass_rate_r_within", "mae_pass_rate": "pass_rate_mae",
            "r_length": "length_r", "r_length_within": "length_r_within", "mae_length": "length_mae",
            "r_length_all": "length_all_r", "r_prompt_length": "r_prompt_length",
            "r_prompt_length_within": "r_prompt_length_within", "predicted_pass_rate": "predicted_pass_rate",
            "parse_rate": "parse_rate"}
#: measures after training that have an interval over seeds, and what they can be
FINAL = {"r_pass_rate": SIGNED, "r_pass_rate_within": SIGNED, "r_length": SIGNED, "mae_pass_rate": SHARE}
#: measures of gate and cap in the comparison's JSON, from `gate_quality`, and what they can be
GATES = dict.fromkeys(("gate_precision", "gate_recall", "gate_f1", "signal_lost", "dropped", "gate_steps", "cap_steps",
                       "right_cut", "stopped", "collapsed"), SHARE) | dict.fromkeys(("gate_start", "gate_switches"),
                                                                                    POSITIVE)


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


def pass_at_k_interval(table: pd.DataFrame, k: int) -> tuple[float, float, float]:
    """Mean pass@k and its `share_interval` over problems (a problem that several seeds met counts as one).

    Args:
        table: evaluation tables with the columns problem_id, n and c.
        k: at most the smallest n.
    """
    values = pd.Series(pass_at_k(table["n"], table["c"], k), index=table["problem_id"].to_numpy())
    return share_interval(values.groupby(level=0).mean())


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
             **dict(zip(("true", "low", "high"), mean_interval(part["true"], bounds=SHARE), strict=True))}
            for (arm, place), part in by_seed.groupby(level=["arm", "bin"])]
    return pd.DataFrame(rows, columns=["arm", "bin", "predicted", "true", "low", "high", "seeds", "problems"])


def compare_runs(paths: str | Path | Iterable[str | Path]) -> Comparison:
    """Compare run folders, or the runs inside a folder, arm by arm; every ratio is against `reference` of the arm.

    An arm is the folder's name without `-s<seed>`, or the method where a folder is not named so; see `_arms` for runs
    that these do not tell apart. Costs are those of `costs.COSTS`. They are compared at equal accuracy and at one
    target, the base accuracy plus 90 % of the reference's mean gain; the curves of both have the same held-out problems
    at all their points. Seconds are compared where both runs had the machine to themselves, by `cores_others` of their
    metrics (cores that other processes used, mean of a step).

    Raises:
        AnalysisError: no run is found, or a run has only begun.
        RunError: a run cannot be read.
    """
    found = find_runs([paths] if isinstance(paths, str | Path) else paths)
    arms, first = arms_of({path: Run.open(path) for path in found})
    records = sorted((read_run(path, arm) for path, arm in arms.items()),
                     key=lambda record: (*arm_rank(record.row["arm"]), record.row["seed"]))
    references = {arm: first or reference(arm) for arm in dict.fromkeys(record.row["arm"] for record in records)}
    notes = _compare_costs(records, references)
    runs = pd.DataFrame([record.row for record in records])
    curves, steps, problems = (pd.concat([getattr(record, name) for record in records], ignore_index=True)
                               for name in ("evaluations", "steps", "problems"))
    methods = {arm: _arm_summary(group, runs, problems[problems["arm"] == arm], references)
               for arm, group in runs.groupby("arm", sort=False)}
    target = next((arm["target"] for name, arm in methods.items() if references[name] in (first, REFERENCE)), math.nan)
    summary = {"methods": methods, "target": target, "settings": differing_settings(records),
               "warnings": notes + _warnings(runs)}
    return Comparison(files.decode(files.line(summary)), runs, curves, steps, problems)  # NaN as None


def arm_rank(arm: str) -> tuple[bool, int, str]:
    """Sorting key of arms: the methods in their order, then others by name; arms on a fresh stream come last."""
    base = arm.removesuffix(FRESH)
    return base != arm, [*METHODS].index(base) if base in METHODS else len(METHODS), arm


def reference(arm: str) -> str:
    """The arm that another is measured against: grpo, for arms on a fresh stream grpo on a fresh stream."""
    return REFERENCE + FRESH if arm.endswith(FRESH) else REFERENCE


def paper_points(measure: str) -> pd.DataFrame:
    """The points of the paper's Fig. 1a (arm grpo) and 1b (masa) as columns arm, predicted and actual.

    `measure` is pass_rate (0 to 1) or length (tokens).
    """
    name = "difficulty" if measure == "pass_rate" else measure
    frames = [pd.read_csv(PAPER / "figures" / f"fig1{panel}_{name}.csv").iloc[:, :3] for panel in "ab"]
    points = pd.concat([frame.set_axis(["arm", "predicted", "actual"], axis=1) for frame in frames], ignore_index=True)
    return points.assign(arm=points["arm"].str.lower())


def _compare_costs(records: Sequence[Record], references: Mapping[str, str]) -> list[str]:
    """Put each run's costs to the target and at equal accuracy into its row, on problems that its reference has.

    Beside each cost to the target stands that of the reference with the same seed on the same problems. Returns what
    stands in the way, a sentence each.
    """
    notes = dict.fromkeys(note for name in dict.fromkeys(references.values())
                          if (note := _no_target([record for record in records if record.row["arm"] == name], name)))
    for record in records:
        row, name = record.row, references[record.row["arm"]]
        base = [other for other in records if other.row["arm"] == name]
        shared = record.held_out.intersection(*(other.held_out for other in base))
        row |= {"target": math.nan, "equal_missed": math.nan, **{f"{cost}_equal": math.nan for cost in COSTS},
                **{f"{cost}_to_target{of}": math.nan for cost in CROSSED for of in ("", "_reference")}}
        if not base or not shared:
            notes |= {f"{row['path']} and {name} have no held-out problem in common, so there is no ratio.": None
                      } if base else {}
            continue
        theirs, curve = {other.row["seed"]: other.on(shared) for other in base}, record.on(shared)
        ends = np.array([[one.accuracy[0], one.accuracy[-1]] for one in theirs.values()]).mean(axis=0)
        if not ends[1] > ends[0]:
            continue
        row["target"] = float(ends[0] + TARGET_SHARE * (ends[1] - ends[0]))
        alone = row["alone"] and all(other.row["alone"] for other in base if other.row["seed"] == row["seed"])
        _compare_with(row, curve, theirs.get(row["seed"]), [cost for cost in CROSSED if alone or cost != "seconds"])
    return list(notes)


def _compare_with(row: dict[str, Any], curve: Curve, theirs: Curve | None, crossed: Sequence[str]) -> None:
    """Put a run's costs beside those of its reference of the same seed, if there is one; see `_compare_costs`."""
    for cost in crossed:
        row[f"{cost}_to_target"] = curve.to_reach(row["target"], cost)
        if theirs is not None:
            reached = theirs.to_reach(row["target"], cost)
            row[f"{cost}_to_target_reference"] = reached
            row[f"{cost}_reference"] = theirs.spent[cost]
            if cost in COSTS:
                row[f"{cost}_equal"], row["equal_missed"] = equal_accuracy(theirs, curve, cost)


def _no_target(base: Sequence[Record], name: str) -> str:
    """Why there is no target from the runs of a reference; nothing where there is one."""
    if not base:
        return f"There is no {name} arm, so there is no target and no ratio."
    ends = np.array([record.on(record.held_out).accuracy[[0, -1]] for record in base]).mean(axis=0)
    return "" if ends[1] > ends[0] else f"The {name} arm has not gained accuracy, so there is no target and no ratio."


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


def _arm_summary(runs: pd.DataFrame, everything: pd.DataFrame, problems: pd.DataFrame,
                 references: Mapping[str, str]) -> dict[str, Any]:
    """The JSON entry of an arm: `runs` are its own, a row a seed, `problems` the rows of both its evaluations."""
    arm = runs["arm"].iloc[0]
    runs, base, efficient = (everything[everything["arm"] == name].set_index("seed") for name in (
        arm, references[arm], EFFICIENT + (FRESH if arm.endswith(FRESH) else "")))
    rates = (problems["c"] / problems["n"]).groupby([problems["level"], problems["when"]]).mean().unstack()
    return {
        "seeds": len(runs), "privileged": arm.removesuffix(FRESH) in PRIVILEGED, "reference": references[arm],
        "target": runs["target"].iloc[0], "method": " and ".join(runs["method"].unique()),
        "difficulty": " and ".join(runs["difficulty"].unique()),
        "accuracy_base": runs["accuracy_before"].mean(),
        "accuracy_final": _accuracy(runs["accuracy_after"]),
        "accuracy_above_grpo": over_seeds(runs["accuracy_after"] - base["accuracy_after"], SIGNED),
        **{name: runs[name].mean() for name in (*TOKENS, *COSTS, "updates")},
        "seconds": runs["seconds"].mean() if runs["alone"].all() else math.nan,
        **_ratios(runs, is_reference=arm == references[arm]),
        **_arithmetic(runs),
        "tokens_below_efficient": ratio_of_logs((runs["tokens_equal"] - efficient["tokens_equal"]).dropna()),
        **{name: {when: runs[f"{column}_{when}"].mean() for when in ENDS} for name, column in MEASURES.items()},
        "final": {name: over_seeds(runs[f"{MEASURES[name]}_after"], bounds) for name, bounds in FINAL.items()},
        "calibration_error": {when: over_seeds(runs[f"calibration_error_{when}"], SHARE) for when in ENDS},
        "calibration_floor": {when: runs[f"calibration_floor_{when}"].mean() for when in ENDS},
        **{name: over_seeds(runs[name], bounds) for name, bounds in GATES.items()},
        "drop_then_align": {"measured": int(runs["align_shown"].count()), "shown": int(runs["align_shown"].sum()),
                            **{name: over_seeds(runs[f"align_{name}"], SIGNED) for name in ("fall", "rise")}},
        "gain_by_level": {str(level): gain for level, gain in (rates["after"] - rates["before"]).items()},
        **{f"pass_at_32_{name}": named(pass_at_k_interval(problems[problems["when"] == when], 32))
           if problems["n"].min() >= 32 else None for name, when in (("base", "before"), ("final", "after"))},
    }


def _accuracy(values: pd.Series) -> dict[str, float]:
    """Accuracy over seeds; alike in all, as near 0 and 1, they tell no spread, and it is that of shares."""
    alike = values.count() > 1 and values.nunique() == 1
    return named(share_interval(values)) if alike else over_seeds(values, SHARE)


def _ratios(runs: pd.DataFrame, is_reference: bool) -> dict[str, Any]:
    """The costs of an arm compared with its reference's, at equal accuracy and at the target, and what is a bound.

    `equal_bound` and `target_bound` are `<=` where the arm never reaches an accuracy, so that its ratio is at most the
    one given, `>=` where its reference does not, `~` for both, and else empty.
    """
    never, undefined = np.isinf(runs["tokens_to_target"]), int(runs["pass_rate_r_after"].isna().sum())
    theirs = np.isinf(runs["tokens_to_target_reference"]) & (not is_reference)
    count, missed = int(never.sum()), runs["equal_missed"].mean()
    without = int((runs["tokens_equal"].isna() & runs.get("tokens_reference", pd.Series(dtype=float)).notna()).sum())
    notes = {f"{count} of {len(runs)} seeds never reach the target: all that they spent is counted, so the ratio there "
             "is at most the one given.": count,
             f"{without} of {len(runs)} seeds have no ratio at equal accuracy: their reference gained nothing, or they "
             "had the accuracy before any cost.": without,
             f"r of the pass rate after training is undefined in {undefined} of {len(runs)} seeds.": undefined}
    return {
        **{f"{cost}_equal_ratio": ratio_of_logs(runs[f"{cost}_equal"]) for cost in COSTS},
        **{f"{name}_to_target_ratio": paired_ratio(
            runs[f"{cost}_to_target_reference"], runs[f"{cost}_to_target"], runs.get(f"{cost}_reference"), runs[spent])
           for name, cost, spent in (("steps", "step", "steps"), ("tokens", "tokens", "tokens"),
                                     ("seconds", "seconds", "seconds"))},
        "never_crossed": count, "equal_missed": missed, "equal_bound": "<=" * bool(missed > 0),
        "target_bound": "" if is_reference else {(True, False): "<=", (False, True): ">=", (True, True): "~"}.get(
            (bool(never.any()), bool(theirs.any())), ""),
        "note": " ".join(note for note, known in notes.items() if known)}


def _arithmetic(runs: pd.DataFrame) -> dict[str, Any]:
    """Where the tokens to the target went: each stream as a share of what the reference spends.

    Means over the seeds in which both reach the target; the streams add up to `tokens`.
    """
    both = runs[np.isfinite(runs["tokens_to_target"]) & np.isfinite(runs["tokens_to_target_reference"])]
    return {"tokens_of_reference": {name: (both[f"{name}_to_target"] / both["tokens_to_target_reference"]).mean()
                                    for name in ("tokens", *COST)}}
