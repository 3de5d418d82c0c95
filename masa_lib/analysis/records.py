"""Recorded runs as they are compared: which arm each is of, its costs and its held-out curve, checked on reading."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib import crash_safe_files as files
from masa_lib.analysis import health
from masa_lib.analysis.awareness import calibration, drop_then_align, gate_quality, meta_awareness, problem_measures
from masa_lib.analysis.costs import COST, COSTS, TOKENS, Curve, totals
from masa_lib.errors import MasaError
from masa_lib.runs import parquet
from masa_lib.runs.folder import Run, is_run, runs_in

#: the arm that others are measured against
REFERENCE = "grpo"
#: a run's first and last evaluation
ENDS = ("before", "after")
#: most cores that other processes may use, on average, in a run that had the machine to itself
ALONE = 0.25
#: costs of a run whose value at the target is kept: those that are compared, the streams, and the steps
CROSSED = ("step", *COSTS, *COST)
#: settings that differ by design, or have no say in what is learned
UNCOMPARED = re.compile(r"seed$|record\.")


class AnalysisError(MasaError, ValueError):
    """The runs cannot be compared; the message says which and why."""


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The runs among `paths` and directly inside them, as folders or packed.

    Raises:
        AnalysisError: a path holds no run.
    """
    found = []
    for path in map(Path, paths):
        here = [path] * is_run(path) + runs_in(path)
        if not here:
            raise AnalysisError(f"There is no run in {path}. Name runs (folders with a config.toml, as `masa train` "
                                "writes them, or runs of a packed study) or a folder that holds runs.")
        found += here
    return list(dict.fromkeys(found))


def arms_of(runs: Mapping[Path, Run]) -> tuple[dict[Path, str], str | None]:
    """The arm of each run, and the arm that all are measured against where that is not `reference`.

    Folders not named `<arm>-s<seed>` are the arm of their method, unless such runs share a seed or differ in a setting:
    then each is an arm by its folder's name. Arms that still meet in a seed take the folder above into their names. So
    a method can be compared with itself; where no arm is called grpo then, the first run given is the reference.
    """
    shown = {path: re.fullmatch(r"(.+)-s\d+", path.resolve().name) for path in runs}
    plain = {path: shown[path][1] if shown[path] else run.config.method for path, run in runs.items()}
    unnamed, arms = [path for path in runs if not shown[path]], dict(plain)
    for path in unnamed:
        alike = [other for other in runs if plain[other] == plain[path] and other != path]
        if any(runs[other].config.seed == runs[path].config.seed or _settings(runs[other]) != _settings(runs[path])
               for other in alike):
            arms[path] = path.resolve().name
    depth, renamed = 1, arms != plain
    while double := _double(arms, runs):
        depth += 1
        for path in double:
            folders = path.resolve().parts[-depth:-1]
            arms[path] = "/".join([*folders, shown[path][1] if shown[path] else path.resolve().name])
        renamed = True
    first = next(iter(arms.values()))
    return arms, first if renamed and REFERENCE not in arms.values() else None


def _double(arms: Mapping[Path, str], runs: Mapping[Path, Run]) -> list[Path]:
    """The runs whose arm another run with the same seed has, too, and with them all of those arms."""
    keys = [(arm, runs[path].config.seed) for path, arm in arms.items()]
    double = {arm for arm, seed in keys if keys.count((arm, seed)) > 1}
    return [path for path, arm in arms.items() if arm in double]


def _settings(run: Run) -> dict[str, str]:
    """The compared settings of a run as text, with what was changed while it ran."""
    changes = run.changes()
    return {key: " then ".join([str(configs.get(run.config, key)),
                                *(str(change["changes"][key]) for change in changes if key in change["changes"])])
            for key in configs.settings() if not UNCOMPARED.search(key)}


def differing_settings(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """The settings in which arms differ: by setting, by arm, its value (several, where its seeds differ)."""
    found = {}
    for key in configs.settings():
        values: dict[str, dict[str, None]] = {}
        for record in records:
            if key in record.settings:
                values.setdefault(record.row["arm"], {})[record.settings[key]] = None
        said = {arm: " or ".join(those) for arm, those in values.items()}
        if len(set(said.values())) > 1:
            found[key] = said
    return found


@dataclass
class Record:
    """A run: its row of totals, its evaluations with costs, its steps, its problems before and after, its settings.

    `held_out` are the problems that every one of its evaluations has, `on` gives its curve over some of them.
    """

    row: dict[str, Any]
    evaluations: pd.DataFrame
    steps: pd.DataFrame
    problems: pd.DataFrame
    settings: dict[str, str]
    held_out: frozenset[str]
    on: Callable[[Collection[str]], Curve]


def read_run(path: Path, arm: str) -> Record:
    """A run as a record of its arm."""
    run = Run.open(path)
    key = {"arm": arm, "seed": run.config.seed}
    counted = ["step", *TOKENS, "seconds_total", "updates"]
    steps, curve = run.metrics(), run.evaluations().assign(**key)
    parquet.check_columns(steps, f"The metrics of the run {path}", numbers=[name for name in counted if name in steps])
    parquet.check_columns(curve, f"The evaluations of the run {path}",
                        numbers=[name for name in ("accuracy", "problems") if len(curve) and (
                            name == "accuracy" or name in curve)])
    steps = steps.select_dtypes("number")
    if curve.empty or steps.empty:
        raise AnalysisError(f"The run {path} has no evaluation or no finished step yet: there is nothing to compare.")
    steps = steps.reindex(columns=list(dict.fromkeys([*counted, *steps])))
    spent = totals(steps)
    steps = steps.assign(tokens=spent["tokens"].to_numpy(), seconds=spent["seconds"].to_numpy(), **key)
    start = pd.DataFrame(0.0, index=[0], columns=spent.columns)
    so_far = pd.concat([start, spent[spent.index > 0]]).reindex(curve["step"], method="ffill").reset_index(drop=True)
    curve = curve.reset_index(drop=True).join(so_far[[name for name in so_far if name not in curve]]).assign(
        tokens=so_far["tokens"], seconds=so_far["seconds"])
    row = {**key, "path": path.name, "folder": str(path), "method": run.config.method,
           "model": run.config.model.name, "steps": len(steps), "planned": run.config.steps,
           "troubles": health.troubles(steps, run.config.model.precision),
           "difficulty": run.config.reward.difficulty_mode, **spent.iloc[-1].drop("seconds_total"),
           "alone": bool("cores_others" in steps and steps["cores_others"].mean() <= ALONE),
           **gate_quality(steps, run.config.gate.window), **_fall_and_rise(steps)}
    problems = [_end(run, row, end, when) for when, end in zip(ENDS, (curve.iloc[0], curve.iloc[-1]), strict=True)]
    held_out, on = _held_out(run, curve, problems, row)
    evaluations = curve.assign(accuracy=on(held_out).accuracy)
    return Record(row, evaluations, steps, pd.concat(problems).assign(**key), _settings(run), held_out, on)


def _end(run: Run, row: dict[str, Any], end: pd.Series, when: str) -> pd.DataFrame:
    """The measured problems of a run's first or last evaluation; puts what they say into its row."""
    table = problem_measures(_evaluation(run, int(end["step"])))
    row[f"accuracy_{when}"] = float(end["accuracy"])
    row |= {f"{name}_{when}": value for name, value in meta_awareness(table).items()}
    found = calibration(table["predicted_pass_rate"], table["pass_rate"], table["n"])
    row |= {f"calibration_{name}_{when}": found[name] for name in ("error", "floor")}
    return table.assign(when=when)


def _held_out(run: Run, curve: pd.DataFrame, ends: Sequence[pd.DataFrame],
              row: Mapping[str, Any]) -> tuple[frozenset[str], Callable[[Collection[str]], Curve]]:
    """The problems that all evaluations of a run have, and its curve over some of them.

    The evaluations of a run have the same problems, or the first so many of them (`evaluation.evaluate_step`). The
    accuracy of one that has others, too, is computed from its table.
    """
    whole = {int(curve["step"].iloc[0]): ends[0], int(curve["step"].iloc[-1]): ends[1]}
    counts = curve.get("problems", pd.Series(index=curve.index, dtype=float)).fillna(len(ends[1]))
    least = int(curve["step"].loc[counts.idxmin()])
    small = whole[least] if least in whole else _evaluation(run, least)
    common = frozenset(small["problem_id"]).intersection(*(end["problem_id"] for end in ends))

    def accuracy(step: int, recorded: float, count: int, problems: Collection[str]) -> float:
        if count == len(problems) == len(common):
            return recorded
        table = whole[step] if step in whole else _evaluation(run, step)
        kept = table[table["problem_id"].isin(problems)]
        return float((kept["c"] / kept["n"]).mean())

    def on(problems: Collection[str]) -> Curve:
        rows = zip(curve["step"], curve["accuracy"], counts, strict=True)
        return Curve(curve["step"].to_numpy(), np.array([accuracy(int(step), float(recorded), int(count), problems)
                                                         for step, recorded, count in rows]),
                     {cost: curve[cost].to_numpy(dtype=float) for cost in CROSSED},
                     {cost: float(row["steps"] if cost == "step" else row[cost]) for cost in CROSSED})

    return common, on


def _evaluation(run: Run, step: int) -> pd.DataFrame:
    """The table of a run's evaluation, checked."""
    table = run.evaluation_table(step)
    check_problems(table, f"The evaluation of step {step} of the run {run.path}")
    return table


def check_problems(table: pd.DataFrame, what: str) -> None:
    """Refuse what is no table of an evaluation, one row a problem, with a RunError that calls it `what`."""
    parquet.check_columns(table, what, texts=("problem_id", "problem"), lists=("predictions", "predicted_lengths"),
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
