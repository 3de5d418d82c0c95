"""Which problems are rolled out and how far: the one interface of all gates, and MASA's own gate and cap.

MASA asks the model before it solves: a problem whose predicted pass rates promise a group without a signal is dropped,
and a solution is stopped at a multiple of its predicted length. Both act only while what they cost is small, and that
is measured: dropped problems are re-checked and solutions are left uncapped by chance, and each counts as often as its
chance was small. Rivals stand in `rivals`, and how a step's problems are gathered in `selection`; nothing here samples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from masa_lib.config import Config
from masa_lib.predictions import PASS_RATE_STEPS
from masa_lib.problems import Problem, ProblemPool

#: what is measured of gate and cap; NaN where nothing was
MEASURES = ("gate_precision", "gate_recall", "gate_f1", "signal_lost", "right_cut", "predictions_collapsed")
#: predictions whose mean differs less than this from problem to problem (standard deviation) say the same of all; in
#: recorded runs it is 0.03 while they are collapsed, 0.09 when they are blind and 0.2 when they know
COLLAPSED = 0.05
#: what the rule `measured` knows at first: that every prediction may mean a signal
UNKNOWN = (1.0,) * (PASS_RATE_STEPS + 1)
#: share of a running share that one more group renews
RATE = 0.1
#: steps by which the next share of dropped candidates is guessed; it moves faster than the window
RECENT = 4


@dataclass(frozen=True)
class Candidate:
    """A problem that may be rolled out, and what was predicted of it by those of the M predictions that parsed.

    `predictions`: pass rates, 0 to 1. `lengths`: tokens. `notions`: those that at least half of the predictions name.
    """

    problem: Problem
    predictions: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    notions: tuple[str, ...] = ()


class Gate(Protocol):
    """Decides which candidates are rolled out.

    `predicts`: wants predictions before it decides. `rechecks`: what it drops is rolled out by chance. `refills`:
    groups without a signal do not fill the batch. `gate_on`, `cap_on`, `hint_on`: what acts in the step that has begun.
    `rng`: the step's lots, set before each step.
    """

    predicts: bool
    rechecks: bool
    refills: bool
    gate_on: bool
    cap_on: bool
    hint_on: bool
    rng: random.Random

    def begin(self, step: int) -> None:
        """Decide what acts in a step, counted from 1."""
        ...

    def draw(self, wanted: int) -> int:
        """How many candidates to draw for so many places."""
        ...

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """Which candidates are rolled out, at most `wanted`."""
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


def make_gate(config: Config, pool: ProblemPool, solve: Callable[[Sequence[Problem], int], list[int]],
              memory: Mapping[str, Any] | None = None) -> Gate | None:
    """The gate of a method; None for the methods that roll out every problem they draw.

    Args:
        config: of the step; a changed one takes effect through a new gate that is given the old one's state.
        pool: the training problems.
        solve: how many of so many solutions are right, for each problem; the oracle's, and no cost.
        memory: by method, the state that its gate goes on from; one without is as new.
    """
    from masa_lib import rivals

    gate: Gate | None = None
    if config.method == "masa-efficient":
        gate = MasaGate(config)
    elif config.method in rivals.GATES:
        gate = rivals.GATES[config.method](config, pool, solve)
    if gate and memory and config.method in memory:
        gate.restore(memory[config.method])
    return gate


def signal_chance(pass_rate: Any, solutions: int) -> Any:
    """Chance that a group of so many solutions has right and wrong ones: 1 - p^G - (1 - p)^G, element by element."""
    rate = np.asarray(pass_rate, dtype=float)
    return 1 - rate**solutions - (1 - rate)**solutions


def rule_scores(rates: Any, rule: str, solutions: int) -> np.ndarray:
    """What a rule compares with its threshold: a problem is dropped where this is below it.

    `signal` takes the mean of the chances, not the chance of the mean: M predictions are draws from one belief about
    the pass rate, and the chance under a belief is the mean over it. `v1` and `v2` are the paper's two versions.

    Args:
        rates: predicted pass rates, the last axis over a problem's predictions, NaN where one did not parse.
        rule: `gate.rule`.
        solutions: G.

    Returns:
        One axis less: the chance of a signal, or the (population) standard deviation; infinite where nothing parsed,
        and for v2 where the mean is not 0 or 1 to the nearest eighth.
    """
    rates = np.asarray(rates, dtype=float)
    known = np.isfinite(rates)
    count = np.maximum(known.sum(axis=-1), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.where(known, values, 0.0).sum(axis=-1) / count

    if rule == "signal":
        scores = mean(signal_chance(rates, solutions))
    else:
        centre = mean(rates)
        scores = np.sqrt(mean((rates - centre[..., None]) ** 2))
        if rule == "v2":
            scores = np.where(np.isin(np.round(PASS_RATE_STEPS * centre), (0, PASS_RATE_STEPS)), scores, np.inf)
    return np.where(known.any(axis=-1), scores, np.inf)


def admits(predictions: Sequence[float], config: Config, shares: Sequence[float] = UNKNOWN) -> bool:
    """Whether MASA's gate admits a problem of which these pass rates are predicted; without any it does.

    Args:
        predictions: 0 to 1.
        config: its rule.
        shares: for the rule `measured`, by the mean prediction in eighths: what share of such groups had a signal.
    """
    rule = config.gate.rule
    if rule == "measured":
        return not predictions or shares[said(predictions)] >= config.gate.threshold
    threshold = config.gate.threshold if rule == "signal" else config.gate.std
    return bool(rule_scores(predictions, rule, config.sampling.solutions) >= threshold)


def said(predictions: Sequence[float]) -> int:
    """The mean of predicted pass rates (0 to 1), in eighths."""
    return round(PASS_RATE_STEPS * float(np.mean(predictions)))


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


def measure(table: pd.DataFrame, candidates: Sequence[Candidate], config: Config, capping: bool,
            shares: Sequence[float] = UNKNOWN) -> dict[str, Any]:
    """What a step shows of gate and cap, whether they acted or not, as sums that add up over steps.

    Args:
        table: the step's scored rollouts; `group` is the problem's place among the candidates.
        candidates: with their predictions.
        config: in force.
        capping: whether the cap acted.
        shares: what the rule `measured` knew; see `admits`.

    Returns:
        `asked` and `rejected` candidates; of the groups rolled out, by weight: `signal`, `flat` (no signal), `drops`
        (rejected) and `hits` (rejected and flat); of their right solutions left uncapped, by weight: `right` and `cut`
        (longer than their cap is or would be); `spread`, the standard deviation of the mean predictions.
    """
    rejected = np.array([not admits(candidate.predictions, config, shares) for candidate in candidates])
    limits = np.array([cap(candidate.lengths, config) for candidate in candidates])
    means = [np.mean(candidate.predictions) for candidate in candidates if candidate.predictions]
    solved = table[(table["stream"] == "solution") & table["reward"].notna()]
    groups = solved.groupby("group").agg(share=("reward", "mean"), weight=("weight", "first"))
    flat, dropped = groups["share"].isin([0, 1]), rejected[groups.index]
    whole = solved[(solved["reward"] > 0) & ~solved["capped"]]
    limits = limits[whole["group"]]
    chance = np.where(capping & (limits < config.sampling.solution_tokens), config.cap.uncapped, 1.0)
    return {"asked": len(candidates), "rejected": int(rejected.sum()),
            "signal": float(groups["weight"][~flat].sum()), "flat": float(groups["weight"][flat].sum()),
            "drops": float(groups["weight"][dropped].sum()), "hits": float(groups["weight"][flat & dropped].sum()),
            "right": float((1 / chance).sum()), "cut": float((1 / chance)[whole["length"] > limits].sum()),
            "spread": float(np.std(means)) if len(means) > 1 else None}


class MasaGate:
    """MASA's gate and cap with their guards; `begin` decides what acts in a step, `observe` measures it.

    `gate_on`, `cap_on` and `hint_on` say what acts in the step that has begun. A guard imagines one failure more than
    was seen, so that little evidence switches nothing on, and nothing measured switches it off.
    """

    predicts = rechecks = True
    refills = False

    def __init__(self, config: Config) -> None:
        self.config, self.rng = config, random.Random(config.seed)
        self.gate_on = self.cap_on = self.hint_on = False
        self._started, self._window = False, []  # ready by measured precision; sums of the last steps
        self._shares = list(UNKNOWN)

    def begin(self, step: int) -> None:
        """Decide what acts in a step (counted from 1)."""
        gate, limits, seen = self.config.gate, self.config.cap, self._sums()
        self._started |= seen["hits"] / (seen["drops"] + 1) >= gate.precision
        started = step > gate.start if gate.start else self._started
        lost = (seen["drops"] - seen["hits"] + 1) / (seen["signal"] + 1)
        self.gate_on = started and not (gate.guard and lost > gate.lost)
        cut = (seen["cut"] + 1) / (seen["right"] + 1)
        self.cap_on = started and limits.multiplier > 0 and not (limits.guard and cut > limits.cut)
        self.hint_on = started and limits.hint in ("training", "both")

    def draw(self, wanted: int) -> int:
        """As many as fill the places if as large a share is dropped as in the last few steps."""
        seen = self._sums(RECENT)
        share = (seen["asked"] - seen["rejected"] + 1) / (seen["asked"] + 1) if self.gate_on else 1.0
        return math.ceil(wanted / share)

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """The first whose predictions promise a signal; all, while the gate is off."""
        promising = [not self.gate_on or admits(candidate.predictions, self.config, self._shares)
                     for candidate in candidates]
        return [wish and sum(promising[:number]) < wanted for number, wish in enumerate(promising)]

    def observe(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> None:
        """Measure a step, see `measure`, by what was known before it; then learn from it."""
        self._window.append(measure(table, candidates, self.config, self.cap_on, self._shares))
        self._window = self._window[-self.config.gate.window:]
        solved = table[(table["stream"] == "solution") & table["reward"].notna()]
        for group, share in solved.groupby("group")["reward"].mean().items():
            if predictions := candidates[group].predictions:
                self._shares[said(predictions)] += RATE * (float(0 < share < 1) - self._shares[said(predictions)])

    def measures(self) -> dict[str, float]:
        """MEASURES over the last `gate.window` steps: "dropped" is right where a group has no signal."""
        seen = self._sums()
        spread = pd.Series([row["spread"] for row in self._window], dtype=float).mean()
        found = (_ratio(seen["hits"], seen["drops"]), _ratio(seen["hits"], seen["flat"]),
                 _ratio(2 * seen["hits"], seen["drops"] + seen["flat"]),
                 _ratio(seen["drops"] - seen["hits"], seen["signal"]), _ratio(seen["cut"], seen["right"]),
                 math.nan if math.isnan(spread) else float(spread < COLLAPSED))
        return dict(zip(MEASURES, found, strict=True))

    def state(self) -> dict[str, Any]:
        """See `Gate`."""
        return {"started": self._started, "window": list(self._window), "shares": list(self._shares)}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Gate`."""
        self._started, self._window = state["started"], list(state["window"])
        self._shares = list(state["shares"])

    def _sums(self, steps: int = 0) -> dict[str, float]:
        """Over so many of the last steps; 0: over the whole window."""
        names = ("asked", "rejected", "signal", "flat", "drops", "hits", "right", "cut")
        return {name: sum(row[name] for row in self._window[-steps:]) for name in names}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
