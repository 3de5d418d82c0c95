"""The training loop against its plain definition, on the bundled model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small import MODEL, small, timeless

from masa_lib import config as configs
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.engines import in_process
from masa_lib.gates import masa
from masa_lib.method import objective
from masa_lib.method.streams import predictions_of, solutions_of
from masa_lib.models import loading, tiers
from masa_lib.runs.folder import Run
from masa_lib.training.drive import resume, train
from masa_lib.training.learner import learning_rate
from masa_lib.training.trackers import Trackers
from masa_lib.training.trainer import StepResult, Trainer


def steps(changes=None) -> list[StepResult]:
    """All steps of a small training that records nothing."""
    return list(Trainer(small(changes)))


def metrics(changes=None) -> list[dict]:
    return [timeless(result.metrics) for result in steps(changes)]


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_close(found: dict, expected: dict, rel: float = 1e-4) -> None:
    """Metrics agree up to float noise."""
    for key, value in found.items():
        wanted = expected[key]
        assert value == (pytest.approx(wanted, rel=rel, abs=1e-5) if isinstance(value, float) else wanted), key


# The iterator.

def test_a_trainer_yields_after_each_step_with_what_the_step_recorded(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    trainer = Trainer(run.config, run)
    before = weights(trainer)
    for number, result in enumerate(trainer, 1):
        assert result.step == trainer.step == result.metrics["step"] == number
        assert set(result.rollouts["step"]) == {number}
        assert run.metrics()["step"].tolist() == list(range(1, number + 1))
        assert not torch.equal(weights(trainer), before)
        before = weights(trainer)
    assert number == 3
    assert next(trainer, None) is None and trainer.step == 3


def test_train_leaves_a_finished_run_with_its_last_checkpoint(tmp_path: Path) -> None:
    run = train(small({"record.rollouts_every": 2}), tmp_path / "run", "masa train --steps 3")
    assert run.status == {"state": "finished", "step": 3, "message": ""}
    assert run.rollout_steps() == [1, 2, 3]  # the first, every second, the last
    assert run.evaluations()["step"].tolist() == [0, 3]
    assert json.loads((run.path / "environment.json").read_text(encoding="utf8"))["command"] == "masa train --steps 3"
    step, folder = run.latest_checkpoint()
    assert step == 3 and {"model.safetensors", "tokenizer.json", "optimizer.pt"} <= {p.name for p in folder.iterdir()}
    model, _ = loading.load(dataclasses.replace(run.config.model, name=str(folder)))  # a checkpoint is a model
    assert model.num_parameters() > 1000


@pytest.mark.parametrize(("changes", "updates"), [
    ({"method": "grpo"}, 1), ({"method": "masa"}, 1), ({"method": "grpo", "update.updates_per_step": 3}, 3),
    ({"method": "masa", "update.updates_per_step": 3}, 3)])
def test_both_methods_take_the_same_number_of_updates(changes: dict, updates: int) -> None:
    trainer = Trainer(small({"steps": 2, **changes}))
    assert [result.metrics["updates"] for result in trainer] == [updates, updates]
    taken = {int(state["step"]) for state in trainer.learner.optimizer.state.values()}
    assert taken == {2 * updates}


def test_grpo_samples_no_predictions_and_masa_solves_the_same_problems() -> None:
    grpo, masa = (next(Trainer(small({"method": method}))) for method in ("grpo", "masa"))
    assert set(grpo.rollouts["stream"]) == {"solution"} and grpo.metrics["tokens_meta"] == 0
    assert math.isnan(grpo.metrics["reward_meta"]) and math.isnan(grpo.metrics["zero_variance_meta"])
    solved = solutions_of(masa.rollouts)
    assert solved["tokens"].tolist() == grpo.rollouts["tokens"].tolist()
    assert masa.metrics["tokens_solution"] == grpo.metrics["tokens_solution"]


def test_problems_come_in_the_order_of_the_pool_and_come_back() -> None:
    found = steps({"steps": 8, "problems.pool": 12, "sampling.problems": 4, "method": "grpo"})
    ids = [name for result in found for name in result.rollouts["problem_id"].unique()]
    assert len(set(ids[:12])) == 12 and set(ids[12:24]) == set(ids[:12]) and ids[12:24] != ids[:12]


# Live changes.

LIVE = {"update.learning_rate": 5e-5, "sampling.solutions": 6}


def test_a_config_swapped_between_steps_applies_from_the_next_one_and_is_recorded(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    trainer = Trainer(run.config, run)
    first = next(trainer)
    trainer.config = configs.replace(trainer.config, LIVE)
    second = next(trainer)
    assert [result.metrics["learning_rate"] for result in (first, second)] == [3e-4, 5e-5]
    assert [len(result.rollouts.query("stream == 'solution'")) for result in (first, second)] == [24, 36]
    assert run.changes() == [{"step": 2, "changes": LIVE}]
    trainer.config = trainer.config
    assert len(run.changes()) == 1 and run.config == small()


def test_a_change_that_another_process_records_applies_at_its_step(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", small(), "masa train")
    trainer = Trainer(run.config, run)
    next(trainer)
    Run.open(run.path).append_change(3, LIVE)
    assert [next(trainer).metrics["learning_rate"] for _ in range(2)] == [3e-4, 5e-5]


def test_the_method_and_the_number_of_steps_can_change_live() -> None:
    trainer = Trainer(small({"method": "grpo", "steps": 5}))
    next(trainer)
    trainer.config = configs.replace(trainer.config, {"method": "masa", "steps": 2})
    rest = list(trainer)
    assert [result.metrics["method"] for result in rest] == ["masa"] and rest[0].metrics["tokens_meta"] > 0


def test_what_was_loaded_before_the_first_step_cannot_change_live(tmp_path: Path) -> None:
    for run in (None, Run.create(tmp_path / "run", small(), "masa train")):
        trainer = Trainer(small(), run)
        with pytest.raises(ConfigError, match=r"^problems\.levels cannot change within a run"):
            trainer.config = configs.replace(trainer.config, {"problems.levels": "2-3"})
        assert trainer.config == small()
        assert run is None or run.changes() == []


# What else a run keeps.

def test_the_step_of_the_highest_held_out_accuracy_is_checkpointed_when_it_is_evaluated(tmp_path: Path) -> None:
    run = train(small({"steps": 6, "evaluation.every": 1, "record.checkpoint_every": 50, "record.checkpoints_kept": 1}),
                tmp_path / "run", "masa train")
    accuracy = run.evaluations().set_index("step")["accuracy"].drop(0)
    best = int(accuracy.idxmax())
    kept = {int(folder.name.removeprefix("step-")) for folder in (run.path / "checkpoints").iterdir()}
    assert run.weights("best")[0] == run.best_step() == best and kept == {best, 6}


def events(run: Run) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: step and value by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.path / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_also_after_a_resume(tmp_path: Path) -> None:
    config = small({"steps": 4, "evaluation.every": 2, "record.trackers": "tensorboard"})
    run = train(configs.replace(config, {"steps": 3}), tmp_path / "run", "masa train")
    Trackers(run).add("train", {"step": 4, "loss": 99.0})  # of a step that a kill dropped
    run.append_change(4, {"steps": 4})
    shown = events(resume(run.path))
    for kind, rows in (("train", run.metrics()), ("evaluation", run.evaluations())):
        for name, value in rows.iloc[-1].items():
            if isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
                expected = rows.loc[np.isfinite(rows[name].astype(float)), ["step", name]].to_numpy()
                assert np.allclose(shown[f"{kind}/{name}"], expected, rtol=1e-5), name
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in shown["evaluation/accuracy"]] == [0, 2, 3, 4]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_is_told_what_was_recorded_in_order_and_then_what_comes(
        name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    there = SimpleNamespace(init=lambda **told: calls.append(("init", told)),
                            log=lambda numbers, step: calls.append((step, numbers)),
                            finish=lambda: calls.append(("finish", 0)))
    monkeypatch.setitem(sys.modules, name, there)
    run = Run.create(tmp_path / "mine", small({"record.trackers": name}), "masa train")
    for step in (1, 2):
        run.append_metrics({"step": step, "loss": float(step)})
    run.write_evaluation(0, {"accuracy": 0.5}, pd.DataFrame({"right": [1]}))
    trackers = Trackers(run)
    trackers.add("train", {"step": 3, "loss": math.nan, "accuracy": 0.25})
    trackers.close()
    (_, told), *rest = calls
    assert told["name"] == "mine" and told["config"]["record"]["trackers"] == name
    assert rest == [(0, {"evaluation/accuracy": 0.5}), (1, {"train/loss": 1.0}), (2, {"train/loss": 2.0}),
                    (3, {"train/accuracy": 0.25}), ("finish", 0)]


def test_there_is_no_tracker_by_default_and_one_that_is_not_installed_is_missed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Trackers(Run.create(tmp_path / "plain", small(), "masa train"))._opened
    for name in configs.TRACKERS:
        run = Run.create(tmp_path / name, small({"record.trackers": name}), "masa train")
        for module in (name, "torch.utils.tensorboard"):
            monkeypatch.setitem(sys.modules, module, None)  # as where the package is not installed
        with pytest.raises(RunError, match=f"`pip install {name}` brings it, and record\\.trackers= does"):
            Trackers(run)
    with pytest.raises(configs.ConfigError, match=r"record\.trackers names 'paper'; it takes names of tensorboard"):
        small({"record.trackers": "paper wandb"})


def test_looking_for_finished_sequences_now_and_then_changes_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(Trainer(small()))
    monkeypatch.setitem(in_process._LOOK, "cpu", 7)
    found = next(Trainer(small()))
    assert found.rollouts["tokens"].tolist() == whole.rollouts["tokens"].tolist()
    assert found.rollouts["finish"].tolist() == whole.rollouts["finish"].tolist()
    np.testing.assert_allclose(sum(found.rollouts["logps"], ()), sum(whole.rollouts["logps"], ()), atol=1e-4)


# The update.

def naive_step(model, table: pd.DataFrame, config: Config) -> None:
    """The step's updates over *all* sequences, one at a time, with full logits and the formula as it stands."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(config, 1), weight_decay=0.0)

    def logps(row) -> torch.Tensor:
        ids = torch.tensor([row.prompt_ids + row.tokens])
        logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1:-1]
        found = (logits / config.sampling.temperature).log_softmax(-1)
        return found.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]

    with torch.no_grad():
        old = {row.Index: logps(row) for row in table.itertuples()}
    for _, part in table.groupby(table["group"] % config.update.updates_per_step):
        tokens = part["tokens"].map(len).groupby(part["stream"]).sum()
        optimizer.zero_grad()
        for row in part.itertuples():
            ratio = torch.exp(logps(row) - old[row.Index])
            bounded = ratio.clamp(1 - config.update.clip_low, 1 + config.update.clip_high)
            objective = torch.minimum(ratio * row.advantage, bounded * row.advantage)
            (-objective.sum() / tokens[row.stream]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.update.gradient_clip)
        optimizer.step()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("changes", [
    {"method": "grpo"}, {"method": "masa"}, {"method": "masa", "update.updates_per_step": 2},
    {"method": "masa", "sampling.shared_beginning": True},
    {"method": "masa", "update.gradient_clip": 0.1, "sampling.temperature": 0.8},
    {"method": "dapo"}, {"method": "masa-efficient", "gate.lost": 1.0, "cap.cut": 1.0, "gate.threshold": 0.4,
                         "cap.multiplier": 0.3}])
def test_groups_without_variance_stay_out_and_the_update_is_the_naive_one_with_them(
        changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masa, "PRECISION", 0.0)  # the gate acts from the first step on
    config = small({"update.gradient_clip": 1e9, **changes})
    trainer = Trainer(config)
    naive, before = copy.deepcopy(trainer.model), weights(trainer)
    table, found = trainer.train_step()
    assert table["reward"].notna().all() == (config.method != "masa-efficient")
    table = table[table["reward"].notna()]
    flat = table.groupby(["stream", "group"])["reward"].transform("nunique") == 1
    kept = table[~flat]
    prompts = kept["prompt_ids"].map(len)  # at least each distinct one, at most each
    assert 0 < flat.sum() < len(table)
    completions = kept["tokens"].map(len).sum()
    assert completions < found["tokens_update"] <= completions + prompts.sum()
    naive_step(naive, kept if config.method == "dapo" else table, config)
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (trainer.model, naive)]
    assert distance(*gradients) < 2e-3
    moved = torch.cat([parameter.detach().flatten() for parameter in naive.parameters()]) - before
    assert distance(weights(trainer) - before, moved) < 0.02  # Adam's first step magnifies what is almost 0


def test_the_tokens_of_the_update_are_those_of_sequences_with_an_advantage_and_of_their_prompts_once() -> None:
    result = next(Trainer(small({"update.token_budget": 10**6})))
    table = result.rollouts
    kept = table[table["advantage"] != 0]
    assert 0 < len(kept) < len(table)
    prompts = kept["prompt_ids"].drop_duplicates().map(len).sum()
    assert result.metrics["tokens_update"] == kept["length"].sum() + prompts
    assert result.metrics["tokens_prefill"] == table["prompt_ids"].drop_duplicates().map(len).sum()


@pytest.fixture
def hopeless(tmp_path: Path) -> str:
    """Problems that no answer solves: every group lacks variance."""
    file = tmp_path / "hopeless.jsonl"
    file.write_text("".join(json.dumps({"problem": f"Left to right: {n} + 1", "answer": "x^7 + y"}) + "\n"
                            for n in range(60)), encoding="utf8")
    return str(file)


def test_a_step_without_any_variance_is_an_update_all_the_same(hopeless: str) -> None:
    trainer = Trainer(small({"method": "grpo", "problems.source": hopeless, "problems.levels": "", "steps": 2}))
    before = weights(trainer)
    found = [result.metrics for result in trainer]
    for row in found:
        assert (row["updates"], row["tokens_update"], row["accuracy"], row["zero_variance_solution"]) == (1, 0, 0, 1)
        assert row["loss"] == row["gradient_norm"] == 0 and math.isnan(row["entropy"])
    assert {int(state["step"]) for state in trainer.learner.optimizer.state.values()} == {2}
    assert torch.equal(weights(trainer), before)


def test_weight_decay_acts_in_a_step_without_any_variance(hopeless: str) -> None:
    trainer = Trainer(small({"method": "grpo", "problems.source": hopeless, "problems.levels": "", "steps": 1,
                             "update.weight_decay": 0.5, "update.learning_rate": 0.1}))
    before = weights(trainer)
    next(trainer)
    assert torch.allclose(weights(trainer), 0.95 * before)


def test_the_samplers_log_probs_are_the_trainers_and_one_update_clips_nothing() -> None:
    for row in metrics():
        assert 0 <= row["logp_gap"] < 1e-4
        assert row["clip_share"] == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_second_update_of_a_step_sees_the_weights_of_the_first_and_is_clipped(precision: str) -> None:
    (row,) = metrics({"steps": 1, "update.updates_per_step": 2, "update.learning_rate": 3e-3,
                      "model.precision": precision})
    assert row["clip_share"] > 0.05  # with the old weights it is 0.003


def test_the_entropy_bonus_acts_only_where_the_predictions_have_less_entropy_than_the_floor(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient_norm(bonus: float, floor: float) -> float:
        monkeypatch.setattr(objective, "ENTROPY_FLOOR", floor)
        return metrics({"steps": 1, "method": "masa", "update.meta_entropy": bonus})[0]["gradient_norm"]

    assert gradient_norm(0.5, floor=0.0) == gradient_norm(0.0, floor=9.0) != gradient_norm(0.5, floor=9.0)


def test_the_token_budget_and_the_chunk_change_nothing_but_float_noise() -> None:
    def first(budget: int, chunk: int) -> tuple[dict, torch.Tensor]:
        trainer = Trainer(small({"update.token_budget": budget, "update.logprob_chunk": chunk}))
        before = weights(trainer)
        return timeless(next(trainer).metrics), weights(trainer) - before

    whole, moved = first(10**6, 10**6)
    for budget, chunk in ((1, 10**6), (600, 50)):
        row, other = first(budget, chunk)
        assert (row.pop("token_budget"), whole["token_budget"]) == (budget, 10**6)
        assert row.pop("tokens_update") > whole["tokens_update"]  # prompts are shared within a micro-batch only
        assert_close(row, whole)
        assert distance(other, moved) < 0.02


def test_bfloat16_trains_with_weights_in_float32() -> None:
    trainer = Trainer(small({"model.precision": "bfloat16"}))
    before = weights(trainer)
    for result in trainer:
        assert 0 < result.metrics["logp_gap"] < 0.05
        assert result.metrics["gradient_norm"] > 0.01
    assert weights(trainer).dtype == torch.float32 and not torch.equal(weights(trainer), before)


def test_gradient_checkpointing_computes_layers_twice_and_changes_nothing() -> None:
    plain = metrics()
    trainer = Trainer(small({"model.gradient_checkpointing": True, "update.token_budget": 10**6}))
    calls = []
    trainer.model.base_model.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: calls.append(1) if torch.is_grad_enabled() else None)
    found = [timeless(result.metrics) for result in trainer]
    assert len(calls) == 2 * len(found)  # one micro-batch a step, forward and once more in the backward pass
    assert not trainer.model.training
    for row, expected in zip(found, plain, strict=True):
        del row["tokens_update"], row["token_budget"]
        assert_close(row, expected, rel=1e-3)


@pytest.mark.parametrize(("schedule", "after"), [
    ("constant", [1, 1, 1, 1, 1, 1]), ("linear", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("cosine", [(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)])])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: str, after: list[float]) -> None:
    config = configs.replace(Config(), {"steps": 10, "update.schedule": schedule, "update.warmup_steps": 4,
                                        "update.learning_rate": 0.01})
    expected = [0.0025, 0.005, 0.0075, 0.01, *(0.01 * factor for factor in after)]
    assert [learning_rate(config, step) for step in range(1, 11)] == pytest.approx(expected)


def test_a_warm_up_as_long_as_the_run_and_none_at_all_are_fine() -> None:
    config = configs.replace(Config(), {"steps": 3, "update.warmup_steps": 3, "update.learning_rate": 0.3,
                                        "update.schedule": "cosine"})
    assert [learning_rate(config, step) for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])
    assert learning_rate(configs.replace(config, {"update.warmup_steps": 0}), 1) == 0.3


def test_the_optimiser_takes_the_settings_of_the_update() -> None:
    trainer = Trainer(small({"update.weight_decay": 0.25, "update.warmup_steps": 3}))
    next(trainer)
    (group,) = trainer.learner.optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.999), 0.25, pytest.approx(1e-4))


# Repetition.

def test_a_seed_repeats_a_run_exactly_and_another_seed_gives_another() -> None:
    first = metrics()
    assert metrics() == first
    other = metrics({"seed": 1})
    assert all(a["tokens_solution"] != b["tokens_solution"] or a["loss"] != b["loss"]
               for a, b in zip(first, other, strict=True))


def test_no_number_depends_on_the_name_of_the_model(tmp_path: Path) -> None:
    shutil.copytree(tiers.resolve(MODEL), tmp_path / "another-name")
    changes = {"steps": 1, "model.name": str(tmp_path / "another-name")}
    assert metrics(changes) == metrics({"steps": 1})


# What a step logs.

KEYS = {
    "step", "method", "accuracy", "reward_solution", "reward_meta", "reward_difficulty", "reward_length",
    "reward_notion", "parse_rate", "pass_rate_r", "pass_rate_mae", "length_r", "length_mae", "predicted_pass_rate",
    "predicted_pass_rate_std", "predicted_length", "solution_length", "truncated", "zero_variance_solution",
    "zero_variance_meta", "logp_gap", "clip_share", "entropy", "gradient_norm", "learning_rate", "loss",
    "loss_solution", "loss_meta", "updates", "candidates", "dropped", "rechecked", "gate_on", "cap_on",
    "gate_precision", "gate_recall", "gate_f1", "signal_lost", "right_cut", "stopped", "predictions_collapsed",
    "tokens_solution", "tokens_recheck", "tokens_meta", "tokens_oracle", "tokens_prefill",
    "tokens_decode", "tokens_update", "token_budget", "tokens_read", "tokens_anchor", "tokens_belief",
    "loss_belief", "belief_gradient", "belief_trust", "seconds_read",
    "seconds_generate", "seconds_grade", "seconds_update", "seconds_total", "memory_mb", "cores_others"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = small({"sampling.problems": 12, "sampling.solution_tokens": 40, "problems.levels": "1-8"})
    return train(config, tmp_path_factory.mktemp("recorded") / "run", "masa train")


def recomputed(table: pd.DataFrame) -> dict[str, float]:
    """The metrics of a step from its recorded rollouts, group by group, in plain numpy."""
    solved, meta = solutions_of(table), predictions_of(table)
    rates, lengths, said_rates, said_lengths = [], [], [], []
    for group in sorted(set(table["group"])):
        mine, said = solved[solved["group"] == group], meta[meta["group"] == group].dropna(subset="predicted_pass_rate")
        right = mine[mine["correct"].astype(bool)]
        rates.append(len(right) / len(mine))
        lengths.append(right["length"].mean() if len(right) else np.nan)
        said_rates.append(said["predicted_pass_rate"].astype(float).mean() / 8)
        said_lengths.append(said["predicted_length"].astype(float).mean())
    rates, lengths, said_rates, said_lengths = map(np.array, (rates, lengths, said_rates, said_lengths))
    known = np.isfinite(lengths) & np.isfinite(said_lengths)
    asked = np.isfinite(said_rates)
    flat = {stream: np.mean([len(set(group["reward"])) == 1 for _, group in rows.groupby("group")])
            for stream, rows in (("solution", solved), ("meta", meta))}
    return {
        "accuracy": solved["correct"].astype(float).mean(), "reward_solution": solved["reward"].mean(),
        "reward_meta": meta["reward"].mean(), "reward_difficulty": meta["reward_difficulty"].mean(),
        "reward_length": meta["reward_length"].mean(), "reward_notion": meta["reward_notion"].mean(),
        "parse_rate": (meta["parse_error"] == "").mean(),
        "pass_rate_r": np.corrcoef(said_rates[asked], rates[asked])[0, 1],
        "pass_rate_mae": np.abs(said_rates - rates)[asked].mean(),
        "length_r": np.corrcoef(said_lengths[known], lengths[known])[0, 1],
        "length_mae": np.abs(said_lengths - lengths)[known].mean(),
        "predicted_pass_rate": said_rates[asked].mean(), "predicted_pass_rate_std": said_rates[asked].std(ddof=1),
        "predicted_length": said_lengths[asked].mean(), "solution_length": solved["length"].mean(),
        "truncated": (solved["length"] == 40).mean() - ((solved["length"] == 40) & (solved["finish"] == "stop")).mean(),
        "zero_variance_solution": flat["solution"], "zero_variance_meta": flat["meta"],
        "tokens_solution": solved["length"].sum(), "tokens_meta": meta["length"].sum()}


def test_the_metrics_of_a_step_agree_with_its_recorded_rollouts(recorded: Run) -> None:
    for row in recorded.metrics().to_dict("records"):
        expected = recomputed(recorded.rollouts([row["step"]]))
        assert {key: row[key] for key in expected} == pytest.approx(expected, nan_ok=True)
        assert 0 < row["zero_variance_solution"] < 1 and 0 < row["accuracy"] < 1
        assert row["truncated"] > 0 and -1 <= row["pass_rate_r"] <= 1


def test_a_step_logs_every_metric_and_its_seconds_add_up(recorded: Run) -> None:
    rows = recorded.metrics()
    assert set(rows.columns) == KEYS
    parts = rows[["seconds_generate", "seconds_grade", "seconds_update"]]
    assert (parts > 0).all(axis=None)
    np.testing.assert_allclose(parts.sum(axis=1), rows["seconds_total"], rtol=1e-6)
    assert (rows["memory_mb"] > 50).all() and (rows["entropy"] > 0).all()
    assert rows["cores_others"].between(0, os.cpu_count()).all()
    np.testing.assert_allclose(rows["loss"], rows["loss_solution"] + rows["loss_meta"], rtol=1e-6)


def test_recorded_rollouts_hold_both_streams_without_token_ids(recorded: Run) -> None:
    table = recorded.rollouts([2])
    assert len(table) == 12 * 8 and set(table["stream"]) == {"solution", "meta"}
    columns = set(table.columns)
    assert {"text", "length", "finish", "reward", "advantage", "correct", "notions", "parse_error",
            "admitted", "weight", "cap", "capped"} <= columns
    assert not {"prompt_ids", "tokens", "logps"} & columns
