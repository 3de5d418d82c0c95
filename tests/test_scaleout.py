from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from small import small, timeless
from trl import GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOTrainer

from masa_lib import config as configs
from masa_lib.config import Config, ConfigError
from masa_lib.engines import make_engine
from masa_lib.method import rewards, rollouts
from masa_lib.method.gating import Candidate
from masa_lib.models import loading
from masa_lib.runs.folder import Run
from masa_lib.scaleout import grpo, without_gpu, worker
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training import drive
from masa_lib.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = {
    "sampling.problems": 5, "sampling.solution_tokens": 40, "sampling.meta_tokens": 48,
    "evaluation.final_problems": 4, "evaluation.final_samples": 2, "evaluation.predictions": 2}
#: a gate that acts from the second step on, whatever it measures, with caps and hints
GATE: dict[str, Any] = {"gate.start": 1, "gate.lost": 1.0, "cap.cut": 1.0, "cap.multiplier": 0.6,
                        "cap.aggregate": "mean", "cap.hint": "training", "gate.threshold": 0.6, "sampling.problems": 3,
                        "gate.recheck": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"update.loss_mean": "sequence"}, "masa": {"sampling.solutions": 6, "update.normalise_meta": "contrast"},
    "masa-efficient": GATE}
#: what TRL does not tell the worker, or the worker counts in its own way
THEIRS = ("logp_gap", "entropy", "tokens_update", "gradient_norm", "clip_share")


def settings(method: str, **changes: Any) -> Config:
    return small(SETTINGS | METHODS.get(method, {}) | {"method": method} | changes)


def start(config: Config, folder: Path) -> Path:
    """The model that a config begins with, as a folder."""
    for part in loading.load(config.model):
        part.save_pretrained(folder / "start")
    return folder / "start"


def on_trl(config: Config, folder: Path, pieces: int = 1, out: Path | None = None, ahead: int = 0) -> AsyncGRPOTrainer:
    """TRL's own asynchronous trainer with MASA's worker."""
    args = worker.arguments(config, folder / "trl", pieces, disable_tqdm=True)
    source = worker.MasaRolloutWorker(config, args, out, ahead)
    with without_gpu.trainer():
        return AsyncGRPOTrainer(
            str(start(config, folder)), args=args, train_dataset=Dataset.from_dict({"prompt": [""]}),
            rollout_worker=source, weight_transfer=source)


def assert_same_training(found: Run, weights: dict[str, Any], expected: Run, tolerance: float = 1e-3) -> None:
    """The same rollouts, rewards, metrics and evaluations, and weights that moved the same way."""
    order = ["step", "group", "stream", "member"]
    one, other = (run.rollouts().sort_values(order, ignore_index=True) for run in (found, expected))
    exact = ["text", "reward", "admitted", "cap", "finish"]
    pd.testing.assert_frame_equal(one[exact], other[exact])
    for read in (Run.metrics, Run.evaluations):
        rows = [read(run).to_dict("records") for run in (found, expected)]
        for mine, theirs in zip(*rows, strict=True):
            assert mine.get("method") == theirs.get("method")
            for key in timeless(theirs).keys() - {*THEIRS, "method"}:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6, nan_ok=True), (mine["step"], key)
    before = dict(loading.load(expected.config.model)[0].named_parameters())
    ours = loading.load(expected.config.model, expected.latest_checkpoint()[1])[0].state_dict()
    moved = sum((ours[name] - before[name]).square().sum().item() for name in before)
    apart = sum((ours[name] - weights[name]).square().sum().item() for name in before)
    assert moved > 0 and (apart / moved) ** 0.5 < tolerance


# AsyncGRPOTrainer.


@pytest.mark.parametrize("method", METHODS)
def test_trl_trains_what_masa_train_trains(tmp_path: Path, method: str) -> None:
    config = settings(method)
    trainer = on_trl(config, tmp_path, pieces=2, out=tmp_path / "run")
    trainer.train()
    found = Run.open(tmp_path / "run")
    assert found.status == {"state": "finished", "step": 3, "message": ""}
    assert_same_training(found, trainer.model.state_dict(), drive.train(config, tmp_path / "own", "masa train"))
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(found.metrics()["loss"].tolist(), rel=1e-3, abs=1e-6)
    assert all(row["sample/staleness_max"] == 0 for row in logged)
    assert (found.path / "model" / "config.json").exists()
    if method == "masa-efficient":
        acted = found.metrics().iloc[1:]
        assert acted["gate_on"].all() and acted["cap_on"].all() and (acted["dropped"] > 0).any()
        assert found.rollouts([2, 3])["capped"].any()


def test_trl_trains_masa_read_whose_beliefs_and_gate_follow_the_run(tmp_path: Path) -> None:
    config = settings("masa-read", **{"steps": 2, "sampling.problems": 3})
    trainer = on_trl(config, tmp_path, out=tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    found = Run.open(tmp_path / "run").metrics()
    assert found["tokens_belief"].gt(0).all() and found["loss_belief"].gt(0).all() and found["tokens_meta"].eq(0).all()
    assert any(not value.equal(before[name]) for name, value in trainer.model.state_dict().items())


def test_ahead_samples_a_step_with_weights_that_are_one_update_old(tmp_path: Path) -> None:
    config = settings("grpo", **{"evaluation.final_problems": 1})
    trainer = on_trl(config, tmp_path, ahead=1)
    trainer.train()
    stale = [row["sample/staleness_max"] for row in trainer.state.log_history if "loss" in row]
    assert len(stale) == 3 and max(stale) == 1
    assert trainer.rollout_worker.trainer.step == 3


def test_an_error_in_the_worker_ends_trls_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = on_trl(settings("grpo"), tmp_path, out=tmp_path / "run")

    def spoiled(self: Trainer, attempt: Any) -> None:
        raise ArithmeticError("a spoiled step")

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(worker.WorkerError, match="spoiled step"):
        trainer.train()
    assert Run.open(tmp_path / "run").status["state"] == "failed"


def test_a_training_that_trl_ends_early_is_a_stopped_run(tmp_path: Path) -> None:
    trainer = on_trl(settings("grpo"), tmp_path, out=tmp_path / "run")
    trainer.args.max_steps = 1
    trainer.train()
    assert Run.open(tmp_path / "run").status["state"] == "stopped"


def test_a_worker_that_gives_no_sign_of_life_is_told(tmp_path: Path) -> None:
    trainer = on_trl(settings("grpo", steps=1), tmp_path)
    source = trainer.rollout_worker
    source.send_weights(trainer._streaming_iter())
    source.update_model_version(1)
    source.start()
    source.check_health(1000.0)
    with pytest.raises(worker.WorkerError, match="No step was finished"):
        source.check_health(0.0)
    source.stop()
    with pytest.raises(worker.WorkerError, match="The rollouts ended"):
        source.check_health(1000.0)


@pytest.mark.parametrize(("key", "value"), [("update.updates_per_step", 2), ("model.lora_rank", 4),
                                            ("update.dual_clip", 10.0), ("update.sampler_weight", "on"),
                                            ("update.meta_entropy", 0.1)])
def test_what_trl_has_no_place_for_is_refused_in_a_sentence(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        worker.check(small({key: value}))
    worker.check(small())
    worker.check(small({"method": "masa-read", "update.meta_entropy": 0.1}))


def test_a_belief_is_learned_at_temperature_one_only() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.temperature is 0\.7"):
        worker.check(small({"method": "masa-read", "sampling.temperature": 0.7}))
    worker.check(small({"sampling.temperature": 0.7}))


@pytest.mark.parametrize("changed", [{"per_device_train_batch_size": 1}, {"token_budget": 100},
                                     {"weight_sync_steps": 2}, {"max_staleness": 0}])
def test_settings_of_trl_that_would_tear_a_step_apart_are_refused(tmp_path: Path, changed: dict[str, int]) -> None:
    config = settings("masa")
    with pytest.raises(ConfigError, match=next(iter(changed))):
        worker.MasaRolloutWorker(config, worker.arguments(config, tmp_path, **changed), ahead=1)


# GRPOTrainer.


def groups(config: Config, **others: Any) -> tuple[Any, grpo.MasaGroups]:
    """The pocket model, and the groups that train it."""
    model, tokenizer = loading.load(config.model)
    return model, grpo.MasaGroups(config, tokenizer, loading.end_tokens(model, tokenizer), **others)


def test_grpo_trainer_samples_and_learns_both_streams(tmp_path: Path) -> None:
    config = settings("masa", **{"sampling.solutions": 4, "sampling.problems": 3, "steps": 2})
    model, source = groups(config)
    trainer = GRPOTrainer(model, source, grpo.arguments(config, tmp_path, 2, disable_tqdm=True, logging_steps=1),
                          source.data_set(), processing_class=source.tokenizer)
    trainer.train()
    table = source.table
    assert table.groupby(["group", "stream"]).size().unstack().eq(4).all(axis=None)
    assert table["problem_id"].unique().tolist() == [row.id for row in source.pool.take(3, 3)]
    again = table.drop(columns=["reward", *rewards.PARTS, "advantage"])
    rollouts.score(again, config)
    pd.testing.assert_frame_equal(again[table.columns], table)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2 and all("masa/accuracy" in row and "masa/reward_meta" in row for row in logged)
    lengths = table["tokens"].map(len)
    expected = -(pd.Series(grpo.payments(table, config)) * lengths).sum() / lengths.sum()
    assert logged[-1]["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


class Half:
    """A gate that leaves out every second problem it is shown, and remembers what it is told."""

    gate_on, cap_on, hint_on, refills, rechecks, hidden = True, False, False, False, True, None

    def __init__(self) -> None:
        self.rng, self.told = None, []

    def begin(self, step: int) -> None:
        self.step = step

    def draw(self, wanted: int) -> int:
        return 2 * wanted

    def asks(self, problem: Any) -> bool:
        return False

    def admit(self, candidates: list[Candidate], wanted: int) -> list[bool | None]:
        return [number % 2 == 0 for number in range(len(candidates))]

    def observe(self, table: pd.DataFrame, candidates: list[Candidate]) -> None:
        self.told.append((self.step, table, candidates))

    def measures(self) -> dict[str, float]:
        return {}


def test_the_data_set_yields_what_the_gate_admits_and_the_reward_function_tells_it(tmp_path: Path) -> None:
    config = settings("mopps", **{"sampling.problems": 4, "gate.recheck": 0.0})
    model, source = groups(config)
    source.gate = gate = Half()
    trainer = GRPOTrainer(model, source, grpo.arguments(config, tmp_path, disable_tqdm=True), source.data_set(),
                          processing_class=source.tokenizer)
    trainer.train()
    assert len(gate.told) == 3
    for number, (step, table, candidates) in enumerate(gate.told, 1):
        assert step >= number  # TRL draws the next step's rows before it samples
        expected = source.pool.take(8 * (number - 1), 8)
        assert [candidate.problem for candidate in candidates] == expected
        assert table.groupby("group").size().to_dict() == dict.fromkeys([0, 2, 4, 6], 4)
        assert table["problem_id"].unique().tolist() == [problem.id for problem in expected[::2]]


def test_places_that_the_gate_leaves_free_go_by_lot_to_what_it_left_out() -> None:
    config = settings("mopps", **{"sampling.problems": 4, "gate.candidates": 1.0})
    _, source = groups(config)
    source.gate = Half()
    found = source._choose()
    assert found.table["admitted"].tolist() == [True, True, False, False] and found.admitted == 2
    assert found.table["weight"].tolist() == [1.0, 1.0, 1.0, 1.0] and len(found.candidates) == 4


def test_a_gate_that_wants_predictions_has_them_sampled_before_it_chooses() -> None:
    config = settings("masa-efficient", **{"cap.multiplier": 0.0, "cap.hint": "none", "gate.start": 0})
    model, source = groups(config)
    source.gate.gate_on, source.gate.begin = True, lambda step: None
    with pytest.raises(ConfigError, match="predicts before it chooses"):
        source._choose()
    source.sample = partial(rollouts.sample, engine=make_engine("transformers", model, source.tokenizer, batch=64),
                            tokenizer=source.tokenizer, config=config, seed=[0], temperature=1.0)
    found = source._choose()
    assert len(found.table) == 3 and any(candidate.predictions for candidate in found.candidates)
    left = len(found.candidates) - found.admitted
    assert found.table["weight"].sum() == pytest.approx(found.admitted + left)


@pytest.mark.parametrize(("changes", "said"), [
    ({"method": "masa-read"}, "a belief that is read"), ({"sampling.solutions": 6}, r"sampling\.predictions 4"),
    ({"method": "dapo"}, "before it chooses"), ({"method": "masa-efficient"}, r"cap\.multiplier is 2\.0"),
    ({"update.meta_entropy": 0.1}, r"update\.meta_entropy is 0\.1")])
def test_what_grpo_trainer_has_no_place_for_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        grpo.MasaGroups(small(changes), None, frozenset(), ProblemPool(small().problems, 0))


# Two processes.


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
#: with --cpu it would start one process
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no")


def launch(folder: Path, config: Config, *arguments: str, launcher: tuple[str, ...] = TORCHRUN) -> str:
    """What the example prints on two processes of this CPU."""
    configs.save(config, folder / "config.toml")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(ROOT / "examples" / "trl_masa.py"),
         "--config", str(folder / "config.toml"), "--out", str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    args = torch.load(folder / "model" / "training_args.bin", weights_only=False)
    assert args.distributed_state.num_processes == 2 and args.distributed_state.backend == "gloo"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("method", "launcher"), [("masa", ACCELERATE), ("masa-efficient", TORCHRUN)],
                         ids=["accelerate", "torchrun"])
def test_two_processes_train_what_one_trains(tmp_path: Path, method: str, launcher: tuple[str, ...]) -> None:
    config = settings(method)
    launch(tmp_path, config, launcher=launcher)
    weights = loading.load(config.model, tmp_path / "model")[0].state_dict()
    assert_same_training(Run.open(tmp_path / "masa"), weights, drive.train(config, tmp_path / "own", "masa train"))


@pytest.mark.slow
def test_two_processes_of_grpo_trainer_share_groups_and_gate(tmp_path: Path) -> None:
    said = launch(tmp_path, settings("mopps", **{"steps": 2, "sampling.problems": 4}), "--trainer", "grpo")
    assert said.count("masa/accuracy") == 2 and (tmp_path / "model" / "config.json").exists()
