"""Gates that choose by a belief about the pass rate: masa-read, and what it is compared with.

All of them rank candidates by the chance that a group has right and wrong solutions, under a prior over the nine pass
rates times what is remembered of the problem's earlier groups, and roll out the best. They differ in the prior alone:
the model's own belief as far as it is trusted (`masa-read`), none (`history`), a ridge regression on the model's hidden
states (`probe`), the base model's own recorded pass rates (`anchor`). `random` chooses nothing: it shows what as few
problems a step do by themselves. A few of those left out are rolled out by lot, and weigh as much as their chance was
small: they measure what the choice misses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from masa_lib.config import Config
from masa_lib.gates.baselines import Baseline, Outcome, Solve
from masa_lib.method import beliefs, rollouts
from masa_lib.method.gating import Candidate
from masa_lib.method.streams import rewarded
from masa_lib.tasks.predictions import PASS_RATE_STEPS
from masa_lib.tasks.problems import ProblemPool

#: solutions by which the anchor knows the base model's pass rate of a problem
ANCHORED = 8
#: groups that the probe is fitted to, and the costs of a squared weight among which it takes the best
FITTED, PENALTIES = 320, (1.0, 10.0, 100.0, 1000.0)


class BeliefGate(Baseline):
    """What they have in common; `memory` keeps `counts` (by problem, faded right and wrong solutions) and `window`.

    `beliefs`: of the step's candidates, the posterior that it went by and the chance of a mixed group, for the record.
    """

    rechecks = True

    def __init__(self, config: Config, pool: ProblemPool, solve: Solve) -> None:
        super().__init__(config, pool, solve)
        self.memory = {"counts": {}, "window": []}

    def prior(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """The nine probabilities of each candidate before its history counts, PV."""
        return np.tile(beliefs.UNIFORM_V, (len(candidates), 1))

    def draw(self, wanted: int) -> int:
        """All candidates at once, as they compete."""
        return math.ceil(self.config.belief.candidates * wanted)

    def chances(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """The chance that the group of each candidate has right and wrong solutions, by prior and history, P."""
        counts = [self.memory["counts"].get(candidate.problem.id, (0.0, 0.0)) for candidate in candidates]
        posterior_PV = beliefs.posterior(self.prior(candidates), np.array(counts))
        return beliefs.mixed_chance(posterior_PV, self.config.sampling.solutions)

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """Those with the highest chance of right and wrong solutions; the lot decides between equals."""
        chances_P = self.chances(candidates)
        order = sorted(range(len(candidates)), key=lambda number: (-round(chances_P[number], 9), self.rng.random()))
        chosen = set(order[:wanted])
        return [number in chosen for number in range(len(candidates))]

    def observe(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> None:
        """Measure what was chosen and left out, then learn from the groups that were rolled out."""
        solved = rewarded(table)
        groups = solved.groupby("group").agg(flat=("reward", lambda rewards: rewards.nunique() < 2),
                                             admitted=("admitted", "first"), weight=("weight", "first"))
        flat, lots = groups["weight"][groups["flat"]], groups["weight"][~groups["admitted"]]
        missed = groups["weight"][~groups["flat"] & ~groups["admitted"]]
        row = [float(part.sum()) for part in (lots, missed, flat, groups["weight"])]
        self.memory["window"] = [*self.memory["window"], row][-self.config.gate.window:]
        super().observe(table, candidates)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Fade what is remembered of each problem that was met, and add how its group went."""
        decay, share = self.config.belief.decay, self.config.belief.history
        for outcome in outcomes:
            before = self.memory["counts"].get(outcome.problem.id, (0.0, 0.0))
            new = (outcome.right, outcome.solutions - outcome.right)
            self.memory["counts"][outcome.problem.id] = [decay * old + share * count
                                                         for old, count in zip(before, new, strict=True)]

    def measures(self) -> dict[str, float]:
        """Of `gating.MEASURES`, over the last `gate.window` steps: to leave out is right where a group is flat."""
        lots, missed, flat, everything = np.reshape(self.memory["window"], (-1, 4)).sum(axis=0).tolist()
        hits = lots - missed

        def ratio(part: float, whole: float) -> float:
            return part / whole if whole else math.nan

        return {"gate_precision": ratio(hits, lots), "gate_recall": ratio(hits, flat),
                "gate_f1": ratio(2 * hits, lots + flat), "signal_lost": ratio(missed, everything - flat)}


class Read(BeliefGate):
    """masa-read: the prior is the model's own belief, read a moment ago, as far as it is trusted."""

    def __init__(self, config: Config, pool: ProblemPool, solve: Solve) -> None:
        super().__init__(config, pool, solve)
        fresh = beliefs.Trust()
        self.memory |= {"trust": fresh.total, "constant": fresh.constant_V.tolist()}

    @property
    def trust(self) -> beliefs.Trust:
        """As it stands in the memory."""
        return beliefs.Trust(self.memory["trust"], self.memory["constant"])

    def prior(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """The belief mixed with a constant."""
        return self.trust.mix(np.array([candidate.belief.probabilities for candidate in candidates]))

    def observe(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> None:
        """See whether the belief beat the constant, too."""
        super().observe(table, candidates)
        groups = rollouts.outcomes(table)
        self.weigh(np.array([candidates[group].belief.probabilities for group in groups.index]),
                   groups["right"].tolist(), groups["solutions"].tolist())

    def weigh(self, beliefs_PV: np.ndarray, right: Sequence[int], solutions: Sequence[int]) -> None:
        """Trust a step's beliefs more or less, by what happened to their problems."""
        trust = self.trust
        trust.learn(beliefs_PV, right, solutions)
        self.memory |= {"trust": trust.total, "constant": trust.constant_V.tolist()}

    def measures(self) -> dict[str, float]:
        """The trust, too."""
        return super().measures() | {"belief_trust": self.trust.share}


class History(BeliefGate):
    """No belief: a uniform prior, so that only what is remembered of a problem tells it from others.

    Source: the selection of MaPP; with Thompson sampling instead of an expectation it would be MoPPS (2507.04632).
    """


class Probe(BeliefGate):
    """The prior of a ridge regression of the pass rate on the policy's hidden state at the end of the prompt.

    It is fitted anew each step, to the last FITTED groups with the states that they had then. Its error on them, one
    standard deviation, spreads the prior over the nine rates. `memory`: those states and pass rates, too.
    """

    def __init__(self, config: Config, pool: ProblemPool, solve: Solve) -> None:
        super().__init__(config, pool, solve)
        self.memory |= {"states": [], "rates": []}
        self._states: dict[str, list[float]] = {}  # of the step's candidates

    def prior(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """A bell around the predicted pass rate; uniform while there is too little to fit."""
        problems = [candidate.problem for candidate in candidates]
        states_PD = np.asarray(self.hidden(problems), dtype=np.float64).round(3)
        self._states = {problem.id: row.tolist() for problem, row in zip(problems, states_PD, strict=True)}
        if len(self.memory["rates"]) < 2 * self.config.sampling.problems:
            return super().prior(candidates)
        mean_P, error = ridge(np.array(self.memory["states"]), np.array(self.memory["rates"]), states_PD)
        distance_PV = (beliefs.RATES_V - mean_P[:, None]) / max(error, 1 / PASS_RATE_STEPS)
        return beliefs.normalised(-distance_PV**2 / 2)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the states with how their groups went."""
        super().learn(outcomes)
        states = [self._states[outcome.problem.id] for outcome in outcomes]
        rates = [outcome.right / outcome.solutions for outcome in outcomes]
        self.memory["states"] = [*self.memory["states"], *states][-FITTED:]
        self.memory["rates"] = [*self.memory["rates"], *rates][-FITTED:]


class Anchor(BeliefGate):
    """The prior of the base model: ANCHORED solutions of each problem before the first step, counted as cost.

    `memory`: by problem, how many of them were right. A fresh stream has no pool that could be solved beforehand.
    """

    def prior(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """The likelihood of the recorded solutions; uniform for a problem outside the pool."""
        if "recorded" not in self.memory:
            problems = self.pool.problems or []
            right = self.solve(problems, ANCHORED, counted=True) if problems else []
            self.memory["recorded"] = {problem.id: count for problem, count in zip(problems, right, strict=True)}
        known = [self.memory["recorded"].get(candidate.problem.id) for candidate in candidates]
        return beliefs.normalised(np.stack([np.zeros(len(beliefs.RATES_V)) if right is None
                                            else beliefs.log_binomial(right, ANCHORED) for right in known]))


class Random(Baseline):
    """The control: rolls out as few problems a step as the others, those that come next."""


GATES: dict[str, type[Baseline]] = {"masa-read": Read, "history": History, "probe": Probe, "anchor": Anchor,
                                 "random": Random}


def ridge(states_ND: np.ndarray, rates_N: np.ndarray, wanted_PD: np.ndarray) -> tuple[np.ndarray, float]:
    """Ridge regression in its dual form: predictions for the wanted states, and the leave-one-out error.

    Of PENALTIES it takes the one with the smallest leave-one-out error.

    Args:
        states_ND: what it is fitted to.
        rates_N: their pass rates, 0 to 1.
        wanted_PD: where to predict.
    """
    centre, spread, mean = states_ND.mean(axis=0), states_ND.std(axis=0) + 1e-6, rates_N.mean()
    known_ND, wanted_PD = (states_ND - centre) / spread, (wanted_PD - centre) / spread
    kernel_NN = known_ND @ known_ND.T
    fits = []
    for penalty in PENALTIES:
        inverse_NN = np.linalg.inv(kernel_NN + penalty * np.eye(len(rates_N)))
        dual_N = inverse_NN @ (rates_N - mean)
        fits.append((float(np.sqrt(((dual_N / np.diag(inverse_NN))**2).mean())), dual_N))
    error, dual_N = min(fits, key=lambda fit: fit[0])
    return (mean + wanted_PD @ known_ND.T @ dual_N).clip(0, 1), error
