"""MASA's own gate: predictions choose problems, and stop solutions, while what that costs is measured to be small.

MASA asks the model before it solves: a problem whose predicted pass rates promise a group without a signal is dropped,
and a solution is stopped at a multiple of its predicted length (`gating.cap`). Both act only while they cost little:
dropped problems are re-checked and solutions are left uncapped by chance, and each counts as often as its chance was
small. A prediction can also be the prior of a belief that a problem's groups sharpen (rule `posterior`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from masa_lib.config import Config
from masa_lib.gates.baselines import DECAY, RATE, nearest
from masa_lib.method.beliefs import signal_chance
from masa_lib.method.gating import MEASURES, UNCAPPED, Candidate, Hidden, cap
from masa_lib.method.streams import rewarded
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problem_rows import Problem

#: predictions whose mean differs less than this from problem to problem (standard deviation) say the same of all; in
#: recorded runs it is 0.03 while they are collapsed, 0.09 when they are blind and 0.2 when they know
COLLAPSED = 0.05
#: least precision, measured on the steps before, at which a gate without a step to start at begins
PRECISION = 0.9
#: of the rule `posterior`: how many solutions a prediction counts for
PRIOR = 4.0
#: of the rules v1 and v2: least standard deviation of the M predicted pass rates
SPREAD = 0.1
#: in place of a prediction, where none could be read
NOTHING = -1
#: steps by which the next share of dropped candidates is guessed; it moves faster than the window
RECENT = 4


def beta_signal_chance(right: float, wrong: float, solutions: int) -> float:
    """The mean of `signal_chance` where the pass rate has the distribution Beta(right, wrong)."""
    whole = special.betaln(right, wrong)
    return float(1 - np.exp(special.betaln(right + solutions, wrong) - whole)
                 - np.exp(special.betaln(right, wrong + solutions) - whole))


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


def admits(predictions: Sequence[float], config: Config, chance: float = 1.0) -> bool:
    """Whether MASA's gate admits a problem of which these pass rates are predicted; without any it does.

    Args:
        predictions: 0 to 1.
        config: its rule.
        chance: all that the rule `posterior` looks at: the chance of a signal under what is known of the problem.
    """
    rule = config.gate.rule
    if rule == "posterior":
        return chance >= config.gate.threshold
    threshold = config.gate.threshold if rule == "signal" else SPREAD
    return bool(rule_scores(predictions, rule, config.sampling.solutions) >= threshold)


def said(predictions: Sequence[float]) -> int:
    """The mean of predicted pass rates (0 to 1), in eighths."""
    return round(PASS_RATE_STEPS * float(np.mean(predictions)))


def measure(table: pd.DataFrame, candidates: Sequence[Candidate], config: Config, capping: bool,
            chance_of: Callable[[Candidate], float] = lambda candidate: 1.0) -> dict[str, Any]:
    """What a step shows of gate and cap, whether they acted or not, as sums that add up over steps.

    Args:
        table: the step's scored rollouts; `group` is the problem's place among the candidates.
        candidates: with their predictions.
        config: in force.
        capping: whether the cap acted.
        chance_of: what the rule `posterior` thought of a candidate; see `admits`.

    Returns:
        `asked` and `rejected` candidates; of the groups rolled out, by weight: `signal`, `flat` (no signal), `drops`
        (rejected) and `hits` (rejected and flat); of their right solutions left uncapped, by weight: `right` and
        `truncated` (longer than their cap is or would be); `spread`, the standard deviation of the mean predictions.
    """
    rejected = np.array([not admits(candidate.predictions, config, chance_of(candidate)) for candidate in candidates])
    limits = np.array([cap(candidate.lengths, config) for candidate in candidates])
    means = [np.mean(candidate.predictions) for candidate in candidates if candidate.predictions]
    solved = rewarded(table)
    groups = solved.groupby("group").agg(share=("reward", "mean"), weight=("weight", "first"))
    flat, dropped = groups["share"].isin([0, 1]), rejected[groups.index]
    whole = solved[(solved["reward"] > 0) & ~solved["capped"]]
    limits = limits[whole["group"]]
    by_lot = np.asarray(whole.get("admitted", True), dtype=bool)  # a re-checked group has no cap
    chance = np.where(capping & by_lot & (limits < config.sampling.solution_tokens), UNCAPPED, 1.0)
    return {"asked": len(candidates), "rejected": int(rejected.sum()),
            "signal": float(groups["weight"][~flat].sum()), "flat": float(groups["weight"][flat].sum()),
            "drops": float(groups["weight"][dropped].sum()), "hits": float(groups["weight"][flat & dropped].sum()),
            "right": float((1 / chance).sum()), "truncated": float((1 / chance)[whole["length"] > limits].sum()),
            "spread": float(np.std(means)) if len(means) > 1 else None}


class MasaGate:
    """MASA's gate and cap with their guards; `begin` decides what acts in a step, `observe` measures it.

    `gate_on`, `cap_on` and `hint_on` say what acts in the step that has begun. A guard imagines one failure more than
    was seen, so that little evidence switches nothing on, and nothing measured switches it off.
    """

    rechecks = True
    refills = False
    hidden: Hidden | None = None

    def __init__(self, config: Config) -> None:
        self.config, self.rng = config, random.Random(config.seed)
        self.gate_on = self.cap_on = self.hint_on = False
        self._started, self._window = False, []  # ready by measured precision; sums of the last steps
        self._calibration: dict[str, tuple[int, float]] = {}  # by what was predicted, eighths; see `_calibrated`
        # by problem: what was predicted of its last group; right and wrong solutions, faded
        self._history: dict[str, tuple[int, float, float]] = {}

    def begin(self, step: int) -> None:
        """Decide what acts in a step (counted from 1)."""
        gate, limits, seen = self.config.gate, self.config.cap, self._sums()
        self._started |= seen["hits"] / (seen["drops"] + 1) >= PRECISION
        started = step > gate.start if gate.start else self._started
        lost = (seen["drops"] - seen["hits"] + 1) / (seen["signal"] + 1)
        self.gate_on = started and (gate.lost == 1 or lost <= gate.lost)  # whatever rounding makes of it
        truncated = (seen["truncated"] + 1) / (seen["right"] + 1)
        self.cap_on = started and limits.multiplier > 0 and (limits.cut == 1 or truncated <= limits.cut)
        self.hint_on = started and limits.hint in ("training", "both")

    def draw(self, wanted: int) -> int:
        """As many as fill the places if as large a share is dropped as in the last few steps; or all that compete."""
        if self._competes:
            return math.ceil(self.config.gate.candidates * wanted)
        seen = self._sums(RECENT)
        share = (seen["asked"] - seen["rejected"] + 1) / (seen["asked"] + 1) if self.gate_on else 1.0
        return math.ceil(wanted / share)

    def asks(self, problem: Problem) -> bool:
        """All but those that the rule `posterior` knows, unless a cap or a hint needs the predictions."""
        return self.cap_on or self.hint_on or not (self._competes and problem.id in self._history)

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool | None]:
        """The first that promise a signal, or the nearest to the target of those; all, while the gate is off."""
        promising = [number for number, candidate in enumerate(candidates)
                     if not self.gate_on or admits(candidate.predictions, self.config, self._chance(candidate))]
        chosen = promising[:wanted]
        if self._competes:
            chosen = nearest({number: self._posterior(candidates[number]) for number in promising}, wanted, self.rng)
        last = chosen[-1] if len(chosen) == wanted and not self._competes else len(candidates)
        return [True if number in chosen else None if number in promising or number > last else False
                for number in range(len(candidates))]

    def observe(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> None:
        """Measure a step, see `measure`, by what was known before it; then learn from it."""
        self._window.append(measure(table, candidates, self.config, self.cap_on, self._chance))
        self._window = self._window[-self.config.gate.window:]
        solved = rewarded(table)
        for group, right, size in solved.groupby("group")["reward"].agg(["sum", "size"]).itertuples():
            self._learn(candidates[group], int(right), int(size))

    def _learn(self, candidate: Candidate, right: int, size: int) -> None:
        """How a group went, for what was predicted of it and for its problem."""
        predicted = NOTHING
        if candidate.predictions:
            predicted = said(candidate.predictions)
            seen, rate = self._calibrated(predicted)
            self._calibration[str(predicted)] = seen + 1, rate + max(RATE, 1 / (seen + 1)) * (right / size - rate)
        _, *before = self._history.get(candidate.problem.id, (NOTHING, 0.0, 0.0))
        self._history[candidate.problem.id] = predicted, DECAY * before[0] + right, DECAY * before[1] + size - right

    def _calibrated(self, eighths: int) -> tuple[int, float]:
        """Of the groups of which this was predicted: how many, and their mean pass rate; a running one from the tenth.

        At first as if there had been one, and the prediction had come true.
        """
        return self._calibration.get(str(eighths), (1, eighths / PASS_RATE_STEPS))

    @property
    def _competes(self) -> bool:
        return self.gate_on and self.config.gate.rule == "posterior"

    def _chance(self, candidate: Candidate) -> float:
        """The chance of a signal under the posterior."""
        return beta_signal_chance(*self._posterior(candidate), self.config.sampling.solutions)

    def _posterior(self, candidate: Candidate) -> tuple[float, float]:
        """Of a problem's pass rate, as a Beta distribution: what its last group was predicted, how its groups went.

        The prior is Jeffreys's, and PRIOR solutions with the pass rate that came of such predictions.
        """
        eighths, right, wrong = self._history.get(candidate.problem.id, (NOTHING, 0.0, 0.0))
        if candidate.problem.id not in self._history and candidate.predictions:
            eighths = said(candidate.predictions)
        rate, weight = (0.5, 0.0) if eighths == NOTHING else (self._calibrated(eighths)[1], PRIOR)
        return 0.5 + weight * rate + right, 0.5 + weight * (1 - rate) + wrong

    def measures(self) -> dict[str, float]:
        """MEASURES over the last `gate.window` steps: "dropped" is right where a group has no signal."""
        seen = self._sums()
        spread = pd.Series([row["spread"] for row in self._window], dtype=float).mean()
        found = (_ratio(seen["hits"], seen["drops"]), _ratio(seen["hits"], seen["flat"]),
                 _ratio(2 * seen["hits"], seen["drops"] + seen["flat"]),
                 _ratio(seen["drops"] - seen["hits"], seen["signal"]), _ratio(seen["truncated"], seen["right"]),
                 math.nan if math.isnan(spread) else float(spread < COLLAPSED))
        return dict(zip(MEASURES[:len(found)], found, strict=True))

    def state(self) -> dict[str, Any]:
        """See `Gate`."""
        return {"started": self._started, "window": list(self._window),
                **{name: {key: list(entry) for key, entry in known.items()}
                   for name, known in (("calibration", self._calibration), ("history", self._history))}}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Gate`."""
        self._started, self._window = state["started"], list(state["window"])
        self._calibration, self._history = ({key: tuple(entry) for key, entry in state[name].items()}
                                            for name in ("calibration", "history"))

    def _sums(self, steps: int = 0) -> dict[str, float]:
        """Over so many of the last steps; 0: over the whole window."""
        names = ("asked", "rejected", "signal", "flat", "drops", "hits", "right", "truncated")
        return {name: sum(row[name] for row in self._window[-steps:]) for name in names}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
