"""The rollouts of a training step: which problems are drawn, predicted, admitted and solved, and what that cost.

Without a gate, and while MASA's gate, cap and hint are off, one call of the engine serves both streams of all problems.
Otherwise candidates are drawn, predicted where the gate wants it, and admitted until the batch is full or the budget is
spent; then one call solves what was admitted or is to be re-checked. Decides nothing itself (that is `gating`) and
scores nothing.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.method import gating, rollouts
from masa_lib.method.beliefs import Belief
from masa_lib.method.gating import Candidate, Gate
from masa_lib.method.rollouts import Ask
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.problems import ProblemPool

Sample = Callable[[Sequence[Ask]], pd.DataFrame]
#: beliefs about problems whose groups are numbered from the second argument, and the rows of what was thought before
Believe = Callable[[Sequence[Problem], int], tuple[list[Belief], list[pd.DataFrame]]]


@dataclass(frozen=True)
class Selection:
    """A step's rollouts and how they came about.

    `candidates`: all problems drawn; a rollout's `group` is the problem's place here. `admitted`: how many of them
    were. `judged`: how many the gate decided about; those drawn too many for the batch are left to the next pass.
    """

    table: pd.DataFrame
    candidates: list[Candidate]
    admitted: int
    judged: int


def collect(gate: Gate | None, pool: ProblemPool, cursor: int, sample: Sample, config: Config, step: int,
            believe: Believe | None = None) -> Selection:
    """The rollouts of a step.

    Args:
        gate: None admits everything.
        pool: where candidates come from.
        cursor: number of the first candidate in the pool's order.
        sample: `rollouts.sample` with all but the groups to ask for.
        config: in force at the step.
        step: its number, counted from 1; with the run's seed it decides the lots.
        believe: reads the beliefs about candidates; wanted where the method reads.
    """
    if gate is None:
        return _at_once(pool, cursor, sample, config, believe)
    gate.rng = random.Random(f"{config.seed}/{step}")
    gate.begin(step)
    if not (gate.gate_on or gate.cap_on or gate.hint_on):
        return _at_once(pool, cursor, sample, config, believe)
    return _Gathering(gate, pool, cursor, sample, config, believe).run()


def _at_once(pool: ProblemPool, cursor: int, sample: Sample, config: Config, believe: Believe | None) -> Selection:
    sampling = config.sampling
    problems = pool.take(cursor, sampling.problems)
    found, thoughts = believe(problems, 0) if believe and configs.reads(config) else ([], [])
    table = sample(rollouts.whole_groups(
        problems, config, solutions=sampling.solutions,
        predictions=sampling.predictions if configs.samples_predictions(config) else 0))
    candidates = ([Candidate(problem, belief=belief) for problem, belief in zip(problems, found, strict=True)]
                  if found else read_candidates(problems, table))
    return Selection(pd.concat([table, *thoughts], ignore_index=True) if thoughts else table, candidates,
                     len(problems), len(problems))


class _Gathering:
    """One step with a gate that acts."""

    def __init__(self, gate: Gate, pool: ProblemPool, cursor: int, sample: Sample, config: Config,
                 believe: Believe | None) -> None:
        self.gate, self.pool, self.cursor, self.sample, self.config = gate, pool, cursor, sample, config
        self.believe, self.limits = believe, gating.limits(config)
        self.budget = int(self.limits.candidates * config.sampling.problems)
        self.candidates: list[Candidate] = []
        self.judged = 0
        self.weights: dict[int, float] = {}  # of the groups that are rolled out
        self.rechecked: set[int] = set()
        self.asked: set[int] = set()  # groups whose predictions there were before the gate decided
        self.meta: list[pd.DataFrame] = []
        self.solved: list[pd.DataFrame] = []

    def run(self) -> Selection:
        """Fill the batch; where the gate admits nobody, the first candidate is rolled out, as a step needs a group."""
        places = self.config.sampling.problems
        if self.gate.gate_on:
            places = max(round(self.limits.places * places), 1)
        while places > 0 and len(self.candidates) < self.budget:
            before = len(self.weights)
            filled = self._choose(places)
            if not self.weights:
                self.weights[0] = 1.0
            if new := list(self.weights)[before:]:
                self.solved.append(self._solve(new))
                if self.gate.refills:
                    share = self.solved[-1].groupby("group")["correct"].mean()
                    filled = int(((share > 0) & (share < 1)).sum())
            places -= filled
        table = pd.concat([*self.solved, *self.meta], ignore_index=True)
        admitted = self.weights.keys() - self.rechecked
        table["admitted"] = table["group"].isin(admitted)
        table["weight"] = table["group"].map(self.weights).fillna(0.0)
        return Selection(table, self.candidates, len(admitted), self.judged)

    def _choose(self, places: int) -> int:
        """Draw and judge candidates until so many are admitted or the budget is spent; how many were admitted."""
        gate, chosen = self.gate, 0
        while chosen < places and len(self.candidates) < self.budget:
            first, wanted = len(self.candidates), places - chosen
            drawn = self.pool.take(self.cursor + first, min(gate.draw(wanted), self.budget - first))
            new = self._predict(drawn, first)
            self.candidates += new
            verdicts = gate.admit(new, wanted)
            chosen += verdicts.count(True)
            self.judged += len(verdicts) - verdicts.count(None)
            for group, admitted in enumerate(verdicts, first):
                if admitted:
                    self.weights[group] = 1.0
                elif admitted is False and gate.rechecks and gate.rng.random() < self.limits.recheck:
                    self.weights[group] = 1 / self.limits.recheck
                    self.rechecked.add(group)
        return chosen

    def _predict(self, drawn: Sequence[Problem], first: int) -> list[Candidate]:
        """The candidates, with predictions or beliefs where the gate wants them."""
        if configs.reads(self.config):
            found, thoughts = self.believe(drawn, first)
            self.meta += thoughts
            return [Candidate(problem, belief=belief) for problem, belief in zip(drawn, found, strict=True)]
        asks = [self._predictions(group, problem) for group, problem in enumerate(drawn, first)
                if self.gate.asks(problem)]
        if not asks:
            return [Candidate(problem) for problem in drawn]
        self.asked |= {ask.group for ask in asks}
        self.meta.append(self.sample(asks))
        return read_candidates(drawn, self.meta[-1], first)

    def _solve(self, groups: Sequence[int]) -> pd.DataFrame:
        """The solutions of candidates, and predictions that the gate did not want but the update does."""
        late = [group for group in groups if group not in self.asked and configs.samples_predictions(self.config)]
        table = self.sample([self._solutions(group) for group in groups]
                            + [self._predictions(group, self.candidates[group].problem) for group in late])
        for group in late:
            self.candidates[group], = read_candidates([self.candidates[group].problem], table, group)
        return table

    def _predictions(self, group: int, problem: Problem) -> Ask:
        """The predictions of a candidate."""
        count = self.config.gate.predictions or self.config.sampling.predictions
        return Ask("meta", group, problem, (self.config.sampling.meta_tokens,) * count)

    def _solutions(self, group: int) -> Ask:
        """The solutions of a candidate, each with its cap, and the hint.

        A re-checked group has no cap: it is to show whether the gate was right, and a cap would take its signal away.
        """
        config, candidate, gate = self.config, self.candidates[group], self.gate
        full = config.sampling.solution_tokens
        limit = gating.cap(candidate.lengths, config) if gate.cap_on and group not in self.rechecked else full
        hint = candidate.notions if gate.hint_on else ()
        caps = [full if limit < full and gate.rng.random() < gating.UNCAPPED else limit
                for _ in range(config.sampling.solutions)]
        return Ask("solution", group, candidate.problem, tuple(caps), hint)


def read_candidates(problems: Sequence[Problem], table: pd.DataFrame, first: int = 0) -> list[Candidate]:
    """What the meta rollouts of a table say of its problems, whose groups are numbered from `first`."""
    meta = table[(table["stream"] == "meta") & table["predicted_pass_rate"].notna()]
    said = dict(iter(meta.groupby("group")))
    return [_candidate(problem, said[group]) if group in said else Candidate(problem)
            for group, problem in enumerate(problems, first)]


def _candidate(problem: Problem, meta: pd.DataFrame) -> Candidate:
    named = Counter(notion for notions in meta["notions"] for notion in dict.fromkeys(notions))
    rates = (meta["predicted_pass_rate"].astype(float) / PASS_RATE_STEPS).clip(0, 1)  # released mode takes any number
    return Candidate(problem, tuple(rates), tuple(meta["predicted_length"].dropna().astype(int)),
                     tuple(notion for notion, count in named.items() if 2 * count >= len(meta)))


def learn(gate: Gate | None, found: Selection) -> dict[str, float]:
    """Tell the gate what came of a step's scored rollouts; the step's metrics about gate and cap."""
    table, measures = found.table, dict.fromkeys(gating.MEASURES, math.nan)
    if gate is not None:
        gate.observe(table, found.candidates)
        measures |= gate.measures()
    rechecked = table.loc[(table["stream"] == "solution") & ~table["admitted"], "group"].nunique()
    return {"candidates": len(found.candidates), "dropped": 1 - found.admitted / found.judged, "rechecked": rechecked,
            "gate_on": int(gate is not None and gate.gate_on), "cap_on": int(gate is not None and gate.cap_on),
            **measures}
