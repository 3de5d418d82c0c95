"""Which problems are rolled out and how far: the one interface of all gates, and where a cap stops a solution.

A gate chooses among candidates, by what the model predicts or believes of them, by what is remembered, or by chance;
the gates themselves stand in `masa_lib.gates`. How a step's problems are gathered stands in `gather`; nothing here
samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from masa_lib import config as configs
from masa_lib.config import BeliefConfig, Config, GateConfig
from masa_lib.method.beliefs import Belief
from masa_lib.tasks.problem_rows import Problem

#: hidden states of prompts, one row a problem
Hidden = Callable[[Sequence[Problem]], np.ndarray]
#: what is measured of gate and cap; NaN where nothing was
MEASURES = ("gate_precision", "gate_recall", "gate_f1", "signal_lost", "right_cut", "predictions_collapsed",
            "belief_trust")
#: share of a step's solutions that a cap spares, by chance, so that what it cuts can be measured
UNCAPPED = 0.1


@dataclass(frozen=True)
class Candidate:
    """A problem that may be rolled out, and what was predicted of it by those of the M predictions that parsed.

    `predictions`: pass rates, 0 to 1. `lengths`: tokens. `notions`: those that at least half of the predictions name.
    `belief`: read instead of these, where the method reads.
    """

    problem: Problem
    predictions: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    notions: tuple[str, ...] = ()
    belief: Belief | None = None


class Gate(Protocol):
    """Decides which candidates are rolled out.

    `rechecks`: what it drops is rolled out by chance. `refills`: groups without a signal do not fill the batch.
    `gate_on`, `cap_on`, `hint_on`: what acts in the step that has begun. `rng`: the step's lots, set before each step.
    `hidden`: gives the policy's hidden states.
    """

    rechecks: bool
    refills: bool
    gate_on: bool
    cap_on: bool
    hint_on: bool
    rng: random.Random
    hidden: Hidden | None

    def begin(self, step: int) -> None:
        """Decide what acts in a step, counted from 1."""
        ...

    def draw(self, wanted: int) -> int:
        """How many candidates to draw for so many places."""
        ...

    def asks(self, problem: Problem) -> bool:
        """Whether it wants a candidate's predictions before it decides."""
        ...

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool | None]:
        """Which candidates are rolled out, at most `wanted`, and which are dropped; None: left to the next pass."""
        ...

    def observe(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> None:
        """Take note of a step: its scored rollouts, whose `group` is the problem's place among the candidates."""
        ...

    def measures(self) -> dict[str, float]:
        """Of MEASURES, those that this gate takes."""
        ...

    def state(self) -> dict[str, Any]:
        """All that it remembers, ready for JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...


def limits(config: Config) -> GateConfig | BeliefConfig:
    """The section whose `places`, `candidates` and `recheck` hold for the method."""
    return config.belief if config.method in configs.CHOOSING else config.gate


def cap(lengths: Sequence[int], config: Config) -> int:
    """Tokens that a solution is allowed, from predicted lengths; the full cap without any or with multiplier 0."""
    full = config.sampling.solution_tokens
    if not lengths or not config.cap.multiplier:
        return full
    return int(caps(aggregate_lengths(np.array(lengths), config.cap.aggregate), config.cap.multiplier, full))


def caps(predicted: np.ndarray, multiplier: float, full: int) -> np.ndarray:
    """Tokens allowed at a multiple of predicted lengths, element by element: 1 at least, the full cap at most."""
    return np.clip(np.ceil(multiplier * predicted), 1, full)


def aggregate_lengths(lengths: np.ndarray, aggregate: str) -> np.ndarray:
    """The predicted length of a problem, tokens: max, mean or median of the last axis; infinite where none parsed."""
    count = np.isfinite(lengths).sum(axis=-1)
    if aggregate == "max":
        found = np.fmax.reduce(lengths, axis=-1)
    elif aggregate == "mean":
        found = np.nansum(lengths, axis=-1) / np.maximum(count, 1)
    else:
        middle = np.maximum(np.stack([(count - 1) // 2, count // 2], axis=-1), 0)
        ordered = np.sort(lengths, axis=-1)  # NaN comes last
        found = np.take_along_axis(ordered, np.minimum(middle, lengths.shape[-1] - 1), axis=-1).mean(axis=-1)
    return np.where(count > 0, found, np.inf)
