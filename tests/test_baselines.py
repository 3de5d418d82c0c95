"""The other gates on problems whose pass rates are known: what they admit, learn, remember, and gain over no gate."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small

from masa_lib.config import Config
from masa_lib.gates import baselines
from masa_lib.gates.baselines import GATES, TARGET, Baseline, Outcome
from masa_lib.method.gating import Candidate
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.problems import ProblemPool

G, PLACES = 8, 16
#: by level: two are out of reach, two are easy, four can be learned from; within a level all are alike
RATES = dict(zip(range(1, 9), (1.0, 1.0, 0.8, 0.5, 0.3, 0.15, 0.0, 0.0), strict=True))


def settings(method: str, changes: dict[str, Any] | None = None) -> Config:
    return small({"method": method, "problems.pool": 160, "problems.levels": "1-8", "sampling.problems": PLACES,
                  "sampling.solutions": G, "gate.candidates": 3.0, **(changes or {})})


class World:
    """A gate among simulated problems; one step of it is what the trainer's is, without a model."""

    def __init__(self, config: Config, rates: dict[int, float] | None = None) -> None:
        self.config, self.rates = config, dict(rates or RATES)
        self.pool = ProblemPool(config.problems, 0)
        self.solved: list[list[Problem]] = []
        self.gate = make(config, self.pool, self.solve)
        self.cursor = self.step = 0

    def solve(self, problems: Sequence[Problem], samples: int) -> list[int]:
        self.solved.append(list(problems))
        rng = random.Random(f"oracle/{self.step}")
        return [sum(rng.random() < self.rates[problem.level] for _ in range(samples)) for problem in problems]

    def turn(self) -> tuple[list[bool], list[Outcome]]:
        """Draw and roll out until the places are filled or the candidates are spent; the decisions, the groups."""
        gate, rng = self.gate, random.Random(f"world/{self.step}")
        gate.rng, decisions, groups = random.Random(f"0/{self.step}"), [], []
        budget = round(self.config.gate.candidates * PLACES)
        while (missing := PLACES - sum(map(signal, groups) if gate.refills else (1 for _ in groups))) > 0 and budget:
            problems = self.pool.take(self.cursor, min(gate.draw(missing), budget))
            self.cursor, budget = self.cursor + len(problems), budget - len(problems)
            admitted = gate.admit([Candidate(problem) for problem in problems], missing)
            assert len(admitted) == len(problems) and sum(admitted) <= missing
            decisions += admitted
            groups += [Outcome(problem, sum(rng.random() < self.rates[problem.level] for _ in range(G)), G)
                       for problem, kept in zip(problems, admitted, strict=True) if kept]
        gate.learn(groups)
        self.step += 1
        return decisions, groups


def make(config: Config, pool: ProblemPool, solve: Callable[[Sequence[Problem], int], list[int]]) -> Baseline:
    return GATES[config.method](config, pool, solve)


def signal(group: Outcome) -> bool:
    return 0 < group.right < group.solutions


def share(groups: Sequence[Outcome]) -> float:
    return sum(map(signal, groups)) / len(groups)


def ungated() -> float:
    """The share of groups with a signal where every problem is rolled out."""
    return sum(1 - rate**G - (1 - rate)**G for rate in RATES.values()) / len(RATES)


@pytest.mark.parametrize(("method", "gain"), [("mopps", 1.5), ("greso", 1.5), ("level-table", 1.5), ("oracle", 1.8)])
def test_a_gate_raises_the_share_of_groups_with_a_signal(method: str, gain: float) -> None:
    world = World(settings(method))
    turns = [world.turn()[1] for _ in range(80)]
    late = [group for groups in turns[30:] for group in groups]
    assert share(late) > gain * ungated()
    if method in ("level-table", "oracle"):  # what is dropped is drawn again, within the budget
        assert len(late) > 0.9 * 50 * PLACES


def test_dapo_fills_the_batch_with_groups_that_have_a_signal_and_pays_for_it() -> None:
    world = World(settings("dapo"))
    turns = [world.turn() for _ in range(30)]
    full = [sum(map(signal, groups)) for _, groups in turns]
    assert sum(full) / len(full) > 0.95 * PLACES and max(full) == PLACES
    assert all(all(decisions) and len(decisions) == len(groups) for decisions, groups in turns)
    rolled_out = sum(len(groups) for _, groups in turns) / len(turns)
    assert rolled_out == pytest.approx(PLACES / ungated(), rel=0.1)
    assert max(len(groups) for _, groups in turns) <= 3 * PLACES


@pytest.mark.parametrize("method", GATES)
@pytest.mark.parametrize("pool", [160, 0])
def test_a_gate_goes_on_from_its_state_as_if_nothing_had_happened(
        method: str, pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "REFRESH", 4)
    config = settings(method, {"problems.pool": pool})
    world = World(config)
    for _ in range(14):
        world.turn()
    state = world.gate.state()
    stored = json.dumps(state)
    again = World(config)
    again.gate.restore(json.loads(stored))
    again.cursor, again.step = world.cursor, world.step
    assert [world.turn() for _ in range(14)] == [again.turn() for _ in range(14)]
    assert json.dumps(state) == stored  # what was learned since is not in it
    assert world.gate.state() == again.gate.state() and (world.gate.state() != state or method == "dapo")


@pytest.mark.parametrize("method", GATES)
def test_nothing_to_decide_is_decided_and_one_problem_is_enough(method: str) -> None:
    world = World(settings(method, {"problems.pool": 1, "problems.levels": "4"}))
    gate, (problem,) = world.gate, world.pool.take(0, 1)
    assert gate.admit([], 5) == [] and gate.draw(1) >= 1
    gate.learn([])
    assert gate.admit([Candidate(problem)], 0) == [False]
    assert gate.admit([Candidate(problem)] * 3, 2).count(True) == 2
    gate.learn([Outcome(problem, 4, G)] * 2)
    assert not gate.asks(problem) and not gate.rechecks and gate.refills == (method in ("dapo", "greso"))


@pytest.mark.parametrize("method", ["dapo", "mopps", "greso", "level-table"])
def test_what_was_never_rolled_out_is_admitted(method: str) -> None:
    world = World(settings(method, {"problems.pool": 0, "problems.levels": "5-8", "gate.candidates": 1.0}))
    if method == "level-table":  # it knows levels: a new one is as good as a new problem
        world.rates = dict.fromkeys(RATES, 0.5)
    assert all(all(world.turn()[0]) for _ in range(20))


def test_mopps_counts_fade_towards_the_prior() -> None:
    world = World(settings("mopps"))
    (problem,) = world.pool.take(0, 1)
    world.gate.learn([Outcome(problem, 3, 8)])
    assert world.gate.memory == {problem.id: [4.0, 6.0]}
    world.gate.learn([Outcome(problem, 8, 8)])
    assert world.gate.memory == {problem.id: [10.5, 3.5]}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(0, 25))
def test_mopps_admits_the_nearest_to_the_target(right: list[int], wanted: int) -> None:
    gate = make(settings("mopps"), POOL, lambda problems, samples: [])
    problems = POOL.take(0, len(right))
    gate.learn([Outcome(problem, 10**12 * count, 10**15) for problem, count in zip(problems, right, strict=True)])
    admitted = gate.admit([Candidate(problem) for problem in problems], wanted)
    distances = [abs(count / 1000 - TARGET) for count in right]
    inside, outside = ([distance for distance, kept in zip(distances, admitted, strict=True) if kept is side]
                       for side in (True, False))
    assert len(inside) == min(wanted, len(right))
    assert max(inside, default=0.0) <= min(outside, default=1.0) + 1e-4
    assert gate.draw(wanted) == 3 * wanted


POOL = ProblemPool(settings("mopps").problems, 0)


def test_greso_skips_with_a_chance_that_grows_with_the_groups_in_a_row() -> None:
    gate = World(settings("greso")).gate
    new, easy, hard, mixed = (Candidate(problem) for problem in POOL.take(0, 4))
    for right in (0, 0, G):  # all wrong twice, then all right: three groups in a row without a signal, an easy one last
        gate.learn([Outcome(easy.problem, right, G), Outcome(mixed.problem, right, G)])
    gate.learn([Outcome(hard.problem, 0, G), Outcome(mixed.problem, 1, G)])
    assert gate.memory["rows"] == {easy.problem.id: 3, mixed.problem.id: 0, hard.problem.id: -1}
    gate.memory |= {"easy": 0.6, "hard": 0.3}
    kept = [sum(gate.admit([candidate], 1)[0] for _ in range(5000)) / 5000 for candidate in (new, mixed, easy, hard)]
    assert kept[:2] == [1.0, 1.0]
    assert kept[2:] == [pytest.approx(0.6**3, abs=0.03), pytest.approx(0.3, abs=0.03)]


def test_greso_explores_less_where_groups_without_a_signal_are_too_many_and_only_once_problems_come_back(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "SKIPPED", 0.3)  # a tenth easy, two tenths hard
    gate = World(settings("greso")).gate
    problems = POOL.take(0, 10)
    groups = [Outcome(problem, right, G) for problem, right in zip(problems, [G, 0] + [4] * 8, strict=True)]
    gate.learn(groups)
    assert (gate.memory["easy"], gate.memory["hard"]) == (0.5, 0.5)
    gate.learn(groups)
    assert (gate.memory["easy"], gate.memory["hard"]) == (0.49, 0.51)
    for _ in range(100):
        gate.learn(groups)
    assert (gate.memory["easy"], gate.memory["hard"]) == (0.05, 0.95)


def test_greso_refills_as_published_unless_told_otherwise() -> None:
    assert World(settings("greso")).gate.refills
    assert not World(settings("greso", {"rivals.refill": False})).gate.refills


def test_a_level_that_was_dropped_comes_back_when_it_can_be_learned_from() -> None:
    world = World(settings("level-table"))
    for _ in range(40):
        world.turn()
    table = world.gate.memory
    assert set(table) == {f"pocket/{level}" for level in RATES}
    assert table["pocket/8"] < 0.4 <= table["pocket/4"]
    dropped = [problem for problem in world.pool.problems if problem.level == 8]
    kept = sum(sum(world.gate.admit([Candidate(problem) for problem in dropped], len(dropped))) for _ in range(200))
    assert kept / (200 * len(dropped)) == pytest.approx(world.config.gate.recheck, abs=0.02)
    world.rates[8] = 0.5
    for _ in range(40):
        world.turn()
    assert table["pocket/8"] > 0.8


def test_the_oracle_measures_a_pool_now_and_then_and_a_stream_candidate_by_candidate(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "REFRESH", 5)
    world = World(settings("oracle"))
    turns = [world.turn() for _ in range(11)]
    assert world.solved == [world.pool.problems] * 3
    assert {group.problem.level for _, groups in turns for group in groups} <= {3, 4, 5, 6}
    fresh = World(settings("oracle", {"problems.pool": 0}))
    decisions = [kept for _ in range(5) for kept in fresh.turn()[0]]
    assert sum(map(len, fresh.solved)) == fresh.cursor == len(decisions)
    assert sum(decisions) == 5 * PLACES and not fresh.gate.memory["rates"]
