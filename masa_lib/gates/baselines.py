"""The other gates, with which masa-efficient is compared: DAPO, MoPPS, GRESO, a table of levels, an oracle.

None of them asks for predictions, and each explores in its own way. The first three know a problem by how its groups
went when it was drawn before, so on a stream where no problem comes back they admit everything (DAPO always does).
The last two are privileged: `level-table` is told how hard a problem was made, and `oracle` solves every problem beside
the training, uncounted; they show what is possible and are no competitors. Of the two things that GRESO does beside
skipping, its refilling is a setting, and its adaptive batch is left out, because rollouts are drawn as wanted here.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from masa_lib.config import Config
from masa_lib.method import rollouts
from masa_lib.method.beliefs import signal_chance
from masa_lib.method.gating import Candidate, Hidden
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.problems import ProblemPool

Solve = Callable[..., list[int]]

#: of MoPPS: the pass rate sought, and the share of a problem's counts that survives a visit
TARGET, DECAY = 0.5, 0.5
#: share of a running share that one more group renews
RATE = 0.1
#: of GRESO's chances to explore: the first, what an update changes them by, and where they stay (as released)
EXPLORE, EXPLORE_STEP, EXPLORE_LIMITS = 0.5, 0.01, (0.05, 0.95)
#: GRESO's share of groups without a signal that both chances are moved towards
SKIPPED = 0.25
#: the solutions by which the oracle knows a problem's pass rate, and the steps between two measurements of a whole pool
SAMPLES, REFRESH = 16, 20
#: MoPPS's counts of right and wrong solutions of a problem that was never rolled out: a uniform distribution
PRIOR = (1.0, 1.0)


@dataclass(frozen=True)
class Outcome:
    """How the group of a problem went: `right` of `solutions`."""

    problem: Problem
    right: int
    solutions: int


class Baseline:
    """What the baselines have in common: all that they remember is `memory`, which JSON can hold; see `gating.Gate`.

    Args:
        config: of the run.
        pool: of the run.
        solve: how many of so many solutions are right, for each problem (`registry.make_gate`).
    """

    rechecks = refills = cap_on = hint_on = False
    gate_on = True
    hidden: Hidden | None = None

    def __init__(self, config: Config, pool: ProblemPool, solve: Solve) -> None:
        self.config, self.pool, self.solve = config, pool, solve
        self.rng = random.Random(config.seed)
        self.memory: dict[str, Any] = {}

    def draw(self, wanted: int) -> int:
        """As many candidates as places; the collector draws again for those that are dropped."""
        return wanted

    def asks(self, problem: Problem) -> bool:
        """No: a baseline has no predictions."""
        return False

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """The first ones; all gates but DAPO's override it."""
        return _first((True for _ in candidates), wanted)

    def begin(self, step: int) -> None:
        """Nothing: a baseline always acts."""

    def observe(self, table: pd.DataFrame, candidates: Sequence[Candidate]) -> None:
        """Learn from the groups that were rolled out."""
        self.learn([Outcome(candidates[group].problem, *went)
                    for group, *went in rollouts.outcomes(table).itertuples()])

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing; history gates override it."""

    def measures(self) -> dict[str, float]:
        """None: what a baseline drops, nobody looks at."""
        return {}

    def state(self) -> dict[str, Any]:
        """A copy of the memory."""
        return copy.deepcopy(self.memory)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.memory = copy.deepcopy(state)


class Dapo(Baseline):
    """Dynamic sampling: admits everything, and groups without a signal do not fill the batch.

    Source: 2503.14476, section 3.2. Exactly the missing problems are drawn, so no surplus is rolled out.
    """

    refills = True


class Mopps(Baseline):
    """Of `gate.candidates` times as many problems as wanted, those whose pass rate is guessed nearest to the target.

    The guess is drawn from a Beta distribution over each problem's pass rate (Thompson sampling), whose counts fade
    towards the prior from visit to visit. Source: 2507.04632, equations for the posterior with temporal discounting.
    `memory`: by problem, the faded counts of right and wrong solutions.
    """

    def draw(self, wanted: int) -> int:
        """All candidates at once, as they compete."""
        return math.ceil(self.config.gate.candidates * wanted)

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """The nearest to TARGET."""
        beliefs = {number: self.memory.get(candidate.problem.id, PRIOR) for number, candidate in enumerate(candidates)}
        chosen = nearest(beliefs, wanted, self.rng)
        return [number in chosen for number in range(len(candidates))]

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Fade the old counts by DECAY, add the new ones."""
        for outcome in outcomes:
            counts = (outcome.right, outcome.solutions - outcome.right)
            before = self.memory.get(outcome.problem.id, PRIOR)
            self.memory[outcome.problem.id] = [DECAY * old + (1 - DECAY) * prior + new
                                               for old, prior, new in zip(before, PRIOR, counts, strict=True)]


class Greso(Baseline):
    """Skips problems whose last z groups had no signal with chance 1 - p^z; new ones are admitted.

    There are two p, for problems whose last group was all right (easy) or all wrong (hard). After a step each moves
    down where its kind has at least its share of the groups of problems that came back, else up; a third of
    SKIPPED is the easy ones' share. Source: 2506.02177, algorithm 1. `memory`: both p, and by problem z, below
    0 for hard.
    """

    def __init__(self, config: Config, pool: ProblemPool, solve: Solve) -> None:
        super().__init__(config, pool, solve)
        self.refills = config.rivals.refill
        self.memory = {"easy": EXPLORE, "hard": EXPLORE, "rows": {}}

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """By lot."""
        rows = [self.memory["rows"].get(candidate.problem.id, 0) for candidate in candidates]
        return _first((self.rng.random() < self.memory["easy" if row > 0 else "hard"] ** abs(row) for row in rows),
                      wanted)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Count on each problem's groups in a row, and move both p."""
        rows = self.memory["rows"]
        signs = [(outcome.right == outcome.solutions) - (outcome.right == 0) for outcome in outcomes]
        back = [sign for outcome, sign in zip(outcomes, signs, strict=True) if outcome.problem.id in rows]
        for kind, sign, target in (("easy", 1, SKIPPED / 3), ("hard", -1, SKIPPED * 2 / 3)) if back else ():
            step = -EXPLORE_STEP if back.count(sign) / len(back) >= target else EXPLORE_STEP
            low, high = EXPLORE_LIMITS
            self.memory[kind] = min(max(self.memory[kind] + step, low), high)
        for outcome, sign in zip(outcomes, signs, strict=True):
            rows[outcome.problem.id] = sign * (abs(rows.get(outcome.problem.id, 0)) + 1)


class LevelTable(Baseline):
    """Drops problems of levels whose groups rarely have a signal; privileged: it is told the task and the level.

    A dropped level's problems are admitted with chance `gate.recheck`, so that no level is forgotten. `memory`: by task
    and level, the running share of groups with a signal, 1 at first.
    """

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """Where the share is at least `rivals.threshold`, else by lot."""
        rivals, recheck = self.config.rivals, self.config.gate.recheck
        return _first((self.memory.get(_level(candidate.problem), 1.0) >= rivals.threshold
                       or self.rng.random() < recheck for candidate in candidates), wanted)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Move each level's share towards what its groups were."""
        for outcome in outcomes:
            level = _level(outcome.problem)
            share, signal = self.memory.get(level, 1.0), 0 < outcome.right < outcome.solutions
            self.memory[level] = share + RATE * (signal - share)


class Oracle(Baseline):
    """Drops problems by their true pass rate; privileged: measured with SAMPLES solutions that cost nothing.

    A pool is measured as a whole every REFRESH steps, a fresh stream candidate by candidate. `memory`: by
    problem the pass rate, and the steps since it was measured.
    """

    def __init__(self, config: Config, pool: ProblemPool, solve: Solve) -> None:
        super().__init__(config, pool, solve)
        self.memory = {"rates": {}, "age": 0}

    def admit(self, candidates: Sequence[Candidate], wanted: int) -> list[bool]:
        """Where the chance of a signal is at least `rivals.threshold`."""
        solutions, least = self.config.sampling.solutions, self.config.rivals.threshold
        if not self.pool.problems:
            rates = self._measure([candidate.problem for candidate in candidates])
        else:
            if not self.memory["rates"] or self.memory["age"] >= REFRESH:
                self.memory = {"rates": self._measure(self.pool.problems), "age": 0}
            rates = self.memory["rates"]
        chances = (signal_chance(rates[candidate.problem.id], solutions) for candidate in candidates)
        return _first((chance >= least for chance in chances), wanted)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """One more step since the last measurement."""
        self.memory["age"] += 1

    def _measure(self, problems: Sequence[Problem]) -> dict[str, float]:
        return {problem.id: right / SAMPLES
                for problem, right in zip(problems, self.solve(problems, SAMPLES), strict=True)}


GATES: dict[str, type[Baseline]] = {"dapo": Dapo, "mopps": Mopps, "greso": Greso, "level-table": LevelTable,
                                 "oracle": Oracle}


def nearest(beliefs: Mapping[int, tuple[float, float]], wanted: int, rng: random.Random) -> list[int]:
    """Thompson sampling: those whose pass rate, drawn from what is believed of it, is nearest to TARGET.

    Args:
        beliefs: by candidate, the two parameters of a Beta distribution.
        wanted: how many at most.
        rng: of the draws.
    """
    distances = {number: abs(rng.betavariate(*belief) - TARGET) for number, belief in beliefs.items()}
    return sorted(distances, key=distances.__getitem__)[:wanted]


def _first(wished: Iterable[bool], wanted: int) -> list[bool]:
    """As wished, while there are places."""
    admitted: list[bool] = []
    for wish in wished:
        admitted.append(bool(wish) and sum(admitted) < wanted)
    return admitted


def _level(problem: Problem) -> str:
    """Task and level; generated problems carry their task in front of the id's last part."""
    return f"{problem.id.rpartition('-')[0]}/{problem.level}"
