"""Gates that choose by a belief: on problems whose pass rates are known, and in a training with the real model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small import assert_same_run, small

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.gates import priors, registry
from masa_lib.gates.baselines import Outcome
from masa_lib.lessons.widgets import training_records, training_view
from masa_lib.method import beliefs
from masa_lib.method.beliefs import Belief
from masa_lib.method.gating import Candidate
from masa_lib.runs.folder import Run
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training import drive
from masa_lib.training.trainer import Trainer

G, PLACES = 8, 10
#: by level: four are out of reach, two are sure, two can be learned from
RATES = dict(zip(range(1, 9), (1.0, 0.5, 0.3, 0.0, 0.0, 1.0, 0.0, 0.0), strict=True))


def settings(method: str, changes: dict[str, Any] | None = None) -> Config:
    return small({"method": method, "problems.pool": 160, "problems.levels": "1-8", "sampling.problems": PLACES,
                  "sampling.solutions": G, "belief.places": 1.0, "belief.candidates": 3.0, **(changes or {})})


class World:
    """A gate among simulated problems, of which a model believes what is nearly true; a step without a model."""

    def __init__(self, method: str, changes: dict[str, Any] | None = None, knows: bool = True) -> None:
        self.config, self.knows, self.solved, self.step = settings(method, changes), knows, 0, 0
        self.pool = ProblemPool(self.config.problems, 0)
        self.gate = registry.make_gate(self.config, self.pool, self.solve)
        if isinstance(self.gate, priors.Probe):
            self.gate.hidden = self.hidden

    def solve(self, problems: list[Problem], samples: int, counted: bool = False) -> list[int]:
        self.solved += samples * len(problems) if counted else 0
        return [round(samples * RATES[problem.level]) for problem in problems]

    def hidden(self, problems: list[Problem]) -> np.ndarray:
        rng = np.random.default_rng(self.step)
        return np.array([np.eye(9)[problem.level] + rng.normal(0, 0.1, 9) for problem in problems])

    def candidate(self, problem: Problem) -> Candidate:
        rate = RATES[problem.level] if self.knows else 1 - RATES[problem.level]
        return Candidate(problem, belief=Belief((1,), (), tuple(0.8 * np.eye(9)[round(8 * rate)] + 0.2 / 9)))

    def turn(self) -> tuple[float, list[bool]]:
        """One step; the share of rolled-out groups with a signal, and the decisions."""
        rng = random.Random(f"world/{self.step}")
        self.gate.rng = random.Random(f"0/{self.step}")
        self.gate.begin(self.step + 1)
        drawn = self.pool.take(self.step * self.gate.draw(PLACES), self.gate.draw(PLACES))
        candidates = [self.candidate(problem) for problem in drawn]
        admitted = self.gate.admit(candidates, PLACES)
        rows, signal = [], []
        for group, (candidate, kept) in enumerate(zip(candidates, admitted, strict=True)):
            lot = not kept and self.gate.rechecks and self.gate.rng.random() < self.config.belief.recheck
            if kept or lot:
                rewards = [float(rng.random() < RATES[candidate.problem.level]) for _ in range(G)]
                rows += [{"stream": "solution", "group": group, "reward": reward, "admitted": kept, "capped": False,
                          "weight": 1 / self.config.belief.recheck if lot else 1.0} for reward in rewards]
                signal += [0 < sum(rewards) < G] if kept else []
        self.gate.observe(pd.DataFrame(rows), candidates)
        self.step += 1
        return float(np.mean(signal)), admitted


@pytest.mark.parametrize(("method", "least"), [("masa-read", 0.6), ("history", 0.5), ("probe", 0.5), ("anchor", 0.6)])
def test_each_belief_finds_more_groups_with_a_signal_than_chance(method: str, least: float) -> None:
    world = World(method)
    late = np.mean([world.turn()[0] for _ in range(40)][20:])
    chance = World("random")
    by_lot = np.mean([chance.turn()[0] for _ in range(40)])
    assert by_lot < 0.35
    assert late > max(least, by_lot + 0.15)


def test_a_belief_that_is_always_wrong_is_not_trusted_and_does_not_decide() -> None:
    world = World("masa-read", {"belief.history": 0.0}, knows=False)
    shares = [world.turn()[0] for _ in range(40)]
    assert world.gate.measures()["belief_trust"] < 0.05
    assert np.mean(shares) > 0.15  # as good as by lot
    assert World("masa-read").gate.measures()["belief_trust"] < 0.01  # it has to be earned


def test_on_problems_never_met_only_a_belief_tells_them_apart() -> None:
    fresh = {"problems.pool": 0, "problems.levels": "1-8"}
    read, history = World("masa-read", fresh), World("history", fresh)
    late = [np.mean([world.turn()[0] for _ in range(30)][10:]) for world in (read, history)]
    assert late[0] > late[1] + 0.2


def test_precision_and_recall_are_weighted_by_the_lots() -> None:
    gate = registry.make_gate(settings("history"), None, None)
    groups = [(0, [1, 0], True, 1.0), (1, [0, 0], True, 1.0), (2, [0, 0], False, 20.0), (3, [1, 0], False, 20.0)]
    table = pd.DataFrame([{"stream": "solution", "group": group, "reward": float(reward), "admitted": kept,
                           "weight": weight} for group, rewards, kept, weight in groups for reward in rewards])
    gate.observe(table, [Candidate(Problem(str(n), "", "", 1, "")) for n in range(4)])
    found = gate.measures()
    assert found["gate_precision"] == pytest.approx(20 / 40)
    assert found["gate_recall"] == pytest.approx(20 / 21)
    assert found["signal_lost"] == pytest.approx(20 / 21)


def test_history_fades_at_each_visit_and_counts_for_less_than_it_is() -> None:
    gate = registry.make_gate(settings("history"), None, None)
    problem = Problem("a", "", "", 1, "")
    for right in (8, 0):
        gate.learn([Outcome(problem, right, 8)])
    assert gate.memory["counts"]["a"] == [0.25 * 8 * 0.5, 0.25 * 8]


def test_the_anchor_solves_the_pool_once_and_says_what_that_cost() -> None:
    world = World("anchor")
    for _ in range(3):
        world.turn()
    assert world.solved == 160 * priors.ANCHORED


def test_the_probe_finds_a_linear_direction_and_knows_its_error() -> None:
    rng = np.random.default_rng(0)
    states, direction = rng.normal(size=(300, 20)), rng.normal(size=20) / 12
    rates = (0.5 + states @ direction + rng.normal(0, 0.05, 300)).clip(0, 1)
    wanted = rng.normal(size=(50, 20))
    mean_P, error = priors.ridge(states, rates, wanted)
    assert np.corrcoef(mean_P, wanted @ direction)[0, 1] > 0.95
    assert 0.03 < error < 0.12


@pytest.mark.parametrize("method", configs.CHOOSING)
def test_what_a_gate_remembers_survives_json(method: str) -> None:
    world, other = World(method), World(method)
    for _ in range(12):
        world.turn()
    other.gate.restore(json.loads(json.dumps(world.gate.state())))
    other.step = world.step
    assert other.turn() == world.turn()


READ = {"method": "masa-read", "belief.recheck": 0.3, "problems.levels": "1-6"}


@pytest.mark.parametrize("changes", [READ | {"prediction.think": True}, *(
    pytest.param(changes, marks=pytest.mark.slow) for changes in (
        READ, {"method": "masa", "prediction.mode": "read"}, READ | {"prediction.score": "brier"},
        {"method": "history"}, {"method": "probe"}, {"method": "anchor"}, {"method": "random"}))], ids=str)
def test_a_run_that_was_interrupted_ends_with_the_same_numbers(tmp_path, changes: dict[str, Any]) -> None:
    config = small({"steps": 4} | changes)
    whole = drive.train(config, tmp_path / "whole", "masa train")
    run = Run.create(tmp_path / "parts", config, "masa train")
    for _ in zip(range(3), Trainer(config, run), strict=False):
        pass
    parts = drive.resume(tmp_path / "parts")
    assert_same_run(parts, whole)
    pd.testing.assert_frame_equal(parts.beliefs(), whole.beliefs())
    if configs.reads(config):
        metrics = whole.metrics()
        assert metrics["tokens_read"].gt(0).all() and metrics["tokens_belief"].gt(0).all()
        assert metrics["loss_belief"].notna().all()
        assert metrics["tokens_meta"].gt(0).all() == config.prediction.think
        assert whole.evaluations()["belief_score"].notna().all()


def test_what_was_believed_is_recorded_and_packed_without_loss(tmp_path) -> None:
    run = drive.train(small(READ), tmp_path / "run", "masa train")
    before = run.beliefs()
    config = run.config
    assert len(before) == config.steps * round(config.belief.candidates * round(config.belief.places
                                                                               * config.sampling.problems))
    assert all(abs(sum(row) - 1000) <= 5 for row in before["beliefs"])
    rolled = before[before["solutions"] > 0]
    assert set(rolled["weight"].round(4)) <= {1.0, round(1 / 0.3, 4)}
    run.pack_beliefs()
    after = run.beliefs()
    assert not (run.path / "beliefs.jsonl").exists()
    for column in ("step", "problems", "solutions"):
        assert after[column].tolist() == before[column].tolist()
    assert [list(row) for row in after["beliefs"]] == before["beliefs"].tolist()


def test_the_gradient_of_untrained_beliefs_is_held_to_that_of_the_solutions() -> None:
    trained = Trainer(small({"steps": 2} | READ))
    for result in trained:
        assert result.metrics["belief_gradient"] > 5 * result.metrics["gradient_norm"]
        assert result.metrics["gradient_norm"] <= 3 * trained.learner.solution_norm + 1e-6


def test_twenty_steps_are_enough_for_the_pocket_model_to_know_what_it_can() -> None:
    config = configs.replace(small(READ), {
        "steps": 20, "problems.levels": "1-12", "problems.pool": 240, "sampling.problems": 14, "sampling.solutions": 6,
        "belief.places": 1.0, "belief.candidates": 1.0, "update.learning_rate": 2e-4, "update.warmup_steps": 5,
        "evaluation.final_problems": 48, "evaluation.final_samples": 4, "sampling.solution_tokens": 96})
    trained = Trainer(config)
    before = trained.evaluate()
    for _ in trained:
        pass
    after = trained.evaluate()
    assert before["pass_rate_r"] < 0
    assert after["pass_rate_r"] > 0.5
    assert after["belief_score"] > before["belief_score"] + 0.3


def test_beliefs_are_those_of_a_plain_forward_pass_and_the_solutions_prompt_is_shared() -> None:
    trained = Trainer(small(READ))
    table, metrics = trained.train_step()
    assert metrics["tokens_prefill"] == 0  # the reading computed the prompts of the solutions
    assert beliefs.UNIFORM_V.sum() == pytest.approx(1)
    assert set(table["stream"]) == {"solution"}


def test_a_runs_beliefs_are_drawn_alike_from_its_lines_and_from_its_packed_table(tmp_path: Path) -> None:
    run = drive.train(small(READ), tmp_path / "run", "masa train")
    rows, drawn = run.beliefs(), training_view.figure(training_records.read(run.path))
    run.pack_beliefs()
    pd.testing.assert_frame_equal(run.beliefs(), rows, check_dtype=False)
    assert training_view.figure(training_records.read(run.path)).to_json() == drawn.to_json()
