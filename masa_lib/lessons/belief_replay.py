"""What a gate that reads would have chosen in a recorded run, and what is known of how its choice would have gone.

A run of masa-read keeps what was believed of every candidate of every step, and how the groups went that were rolled
out. Here the gate of `masa_lib.gates.priors` stands before the same candidates again, with other settings or without a
part of what it knows. How a chosen group would have gone is known where the run rolled it out as well: its own choice,
and a few by lot, each of which speaks for as many as its chance was small. What the gate remembers of a problem is what
the run saw. What a model would have become, no replay can say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.gates import priors
from masa_lib.gates.baselines import Outcome
from masa_lib.lessons.replay import PHASES, ReplayError
from masa_lib.method.beliefs import Belief
from masa_lib.method.gating import Candidate
from masa_lib.runs import parquet
from masa_lib.runs.folder import Run
from masa_lib.tasks.problem_rows import Problem

#: what a choice may go by
KNOWS = ("belief and history", "belief", "history", "nothing")
#: the settings that a replayed gate obeys
KEYS = ("belief.places", "belief.candidates", "belief.decay", "belief.history")
#: edges of the bins in which the expected chance is compared with what happened
EDGES = np.linspace(0, 1, 7)


@dataclass(frozen=True)
class Step:
    """A step's candidates with their beliefs, and how those went that were rolled out (numbers, right, solutions)."""

    candidates: list[Candidate]
    known: list[int]
    right: list[int]
    solutions: list[int]


@dataclass(frozen=True)
class Recorded:
    """A run of masa-read: a row a candidate in `table`, as `Run.beliefs` has it, and the same by step."""

    config: Config
    table: pd.DataFrame
    steps: list[Step]


def read_beliefs(path: str | Path) -> Recorded:
    """The beliefs that a run recorded.

    Raises:
        RunError: the run cannot be read.
        ReplayError: it recorded none.
    """
    run = Run.open(path)
    table = run.beliefs()
    if table.empty:
        raise ReplayError(f"The run {path} recorded no beliefs. Replay a run of the method masa-read.")
    parquet.check_columns(table, f"The beliefs of the run {path}", texts=("problems",), lists=("beliefs",),
                          numbers=("step", "right", "solutions", "weight"))
    return Recorded(run.config, table.reset_index(drop=True), [_step(part) for _, part in table.groupby("step")])


def _step(part: pd.DataFrame) -> Step:
    said_PV = np.stack(part["beliefs"].to_list()).astype(float)
    candidates = [Candidate(Problem(name, "", "", 0, ""), belief=Belief((), (), tuple(row)))
                  for name, row in zip(part["problems"], said_PV / said_PV.sum(axis=1, keepdims=True), strict=True)]
    known = np.flatnonzero(part["solutions"] > 0)
    return Step(candidates, known.tolist(), *(part[name].iloc[known].astype(int).tolist()
                                              for name in ("right", "solutions")))


def choose(recorded: Recorded, settings: Mapping[str, Any] | None = None, knows: str = KNOWS[0],
           trusted: bool = True) -> pd.DataFrame:
    """What a gate would have chosen, step by step.

    Args:
        recorded: the run; its candidates are all that can be chosen from.
        settings: of KEYS, by dotted key; the run's own by default.
        knows: one of KNOWS; with `nothing` every candidate counts as chosen, as a choice by lot takes them all alike.
        trusted: False lets the belief decide from the first step on, however it has fared.

    Returns:
        The run's table with `chance` (expected, of a group with right and wrong solutions), `judged` (whether it was
        drawn), `chosen`, and `signal` (whether its group had both; known where `weight` is above 0).
    """
    config = configs.replace(recorded.config, dict(settings or {}))
    gate, judge = _gate(config, knows, trusted), config.belief
    places = max(round(judge.places * config.sampling.problems), 1)
    found = []
    for number, step in enumerate(recorded.steps, 1):
        gate.rng = random.Random(f"{config.seed}/{number}")
        drawn, left = step.candidates[:math.ceil(judge.candidates * places)], len(step.candidates)
        chosen = [True] * len(drawn) if knows == "nothing" else gate.admit(drawn, places)
        chances = gate.chances(drawn)
        left -= len(drawn)
        found.append(np.stack([[*chances, *[np.nan] * left], [*chosen, *[False] * left],
                               [*[True] * len(drawn), *[False] * left]], axis=1))
        _learn(gate, step, trusted)
    table, rows = recorded.table, np.concatenate(found)
    right = table["right"].astype(float)
    return table.assign(chance=rows[:, 0], chosen=rows[:, 1] > 0, judged=rows[:, 2] > 0,
                        signal=(right > 0) & (right < table["solutions"]))


def _gate(config: Config, knows: str, trusted: bool) -> priors.BeliefGate:
    """The library's gate with what it may know; one that knows nothing ranks as history does before any."""
    if knows == "belief":
        config = configs.replace(config, {"belief.history": 0.0})
    gate = (priors.Read if knows.startswith("belief") else priors.History)(config, None, None)
    if isinstance(gate, priors.Read) and not trusted:
        gate.memory["trust"] = math.inf
    return gate


def _learn(gate: priors.BeliefGate, step: Step, trusted: bool) -> None:
    """Tell the gate how the groups of a step went that the run rolled out."""
    asked = [step.candidates[place] for place in step.known]
    gate.learn([Outcome(candidate.problem, right, solutions) for candidate, right, solutions in
                zip(asked, step.right, step.solutions, strict=True)])
    if isinstance(gate, priors.Read) and trusted:
        gate.weigh(np.array([candidate.belief.probabilities for candidate in asked]), step.right, step.solutions)


def shares(chosen: pd.DataFrame) -> pd.DataFrame:
    """How a choice went by what is known of it: by third of the training, and in all.

    Args:
        chosen: `choose` of one run, or of several, one below the other.

    Returns:
        Index phase; `signal`, the share of the chosen groups with right and wrong solutions; `precision`, the share of
        those left out that have only one kind; `dropped`, the share left out; `own`, the share of the run's own choice
        that is chosen; `known` and `lots`, on how many groups the first rests, and how many of them the run rolled out
        by lot. The shares weigh each group by one over its chance to be rolled out.
    """
    phase = pd.cut(chosen["step"], 3, labels=list(PHASES[:3]))
    parts = {name: chosen[phase == name] for name in PHASES[:3]} | {PHASES[3]: chosen}
    return pd.DataFrame({name: _share(part[part["judged"]]) for name, part in parts.items()}).T.rename_axis("phase")


def _share(part: pd.DataFrame) -> dict[str, float]:
    taken, own = part["chosen"], part["weight"] == 1
    known, left = part[taken & (part["weight"] > 0)], part[~taken & (part["weight"] > 0)]
    return {"signal": _mean(known["signal"], known["weight"]), "precision": _mean(~left["signal"], left["weight"]),
            "dropped": float((~taken).mean()), "own": _mean(taken[own], own[own]), "known": len(known),
            "lots": int((known["weight"] > 1).sum())}


def expected(chosen: pd.DataFrame) -> pd.DataFrame:
    """What was expected against what happened, over bins of the expected chance.

    Args:
        chosen: `choose` of one run or of several.

    Returns:
        A row a bin with known groups: `chance` (mean expected), `signal` (share that had right and wrong solutions,
        both weighted) and `known` (groups).
    """
    known = chosen[(chosen["weight"] > 0) & chosen["judged"]]
    bins = pd.cut(known["chance"], EDGES, include_lowest=True)
    return pd.DataFrame([{"chance": _mean(part["chance"], part["weight"]), "known": len(part),
                          "signal": _mean(part["signal"], part["weight"])}
                         for _, part in known.groupby(bins, observed=True)])


def _mean(values: Any, weights: Any) -> float:
    """The weighted mean; NaN of nothing."""
    return float(np.average(values, weights=weights)) if len(values) else math.nan


def choices(runs: Sequence[Recorded], settings: Mapping[str, Any] | None = None, knows: str = KNOWS[0],
            trusted: bool = True) -> pd.DataFrame:
    """`choose` of several runs, one below the other, with the number of the `run`."""
    return pd.concat([choose(run, settings, knows, trusted).assign(run=number) for number, run in enumerate(runs)],
                     ignore_index=True)
