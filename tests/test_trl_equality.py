from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from small import small
from trl import GRPOConfig, GRPOTrainer

from masa_lib.config import Config
from masa_lib.engines import logprobs, make_engine
from masa_lib.method import objective, rollouts
from masa_lib.method.streams import solutions_of
from masa_lib.models import loading
from masa_lib.scaleout import groups
from masa_lib.scaleout import trainer as scaleout
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training.learner import samples_of
from masa_lib.training.trainer import Trainer

#: what TRL's defaults mean: advantages without the standard deviation, tokens of both streams in one mean
PLAIN = {"update.normalise_std": False, "update.denominator": "batch", "sampling.problems": 3, "update.dual_clip": 0.0}
RTOL = 1e-5
#: a loss that sums to 0, as a mean of sequences does before the clip acts: its terms are about 0.1 and float32
ZERO = 1e-7


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return loading.load(small().model)


@pytest.fixture(scope="module")
def sampled(model: tuple[Any, Any]) -> list[pd.DataFrame]:
    """Three steps of both streams, unscored."""
    config = small(PLAIN)
    engine = make_engine("transformers", *model, batch=64)
    pool = ProblemPool(config.problems, 0)
    return [rollouts.collect(pool.take(3 * step, 3), engine, model[1], config, solutions=4, predictions=4, seed=[step],
                             temperature=1.0) for step in range(3)]


def scored(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """A copy with rewards and advantages; the streams that the method has."""
    table = table.copy() if config.method == "masa" else solutions_of(table).reset_index(drop=True)
    rollouts.score(table, config)
    return table


def replay(tables: list[pd.DataFrame], prompts: list[Any], trainer: Any) -> dict[str, Any]:
    table = tables[trainer.state.global_step]
    return {"prompt_ids": [list(ids) for ids in table["prompt_ids"]],
            "completion_ids": [list(ids) for ids in table["tokens"]], "logprobs": None,
            "reward": table["reward"].tolist()}


def recorded_reward(prompts: list[Any], reward: list[float], **others: Any) -> list[float]:
    return reward


def trl_trainer(folder: Path, config: Config, tables: list[pd.DataFrame], **settings: Any) -> GRPOTrainer:
    """TRL's own trainer on recorded rollouts."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    policy, tokenizer = loading.load(config.model)
    rows, update = len(tables[0]), config.update
    args = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, shuffle_dataset=False, beta=0.0,
        per_device_train_batch_size=rows, num_generations=4, max_completion_length=64, max_steps=len(tables),
        scale_rewards="none", learning_rate=update.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=update.gradient_clip, epsilon=update.clip_low, epsilon_high=update.clip_high, report_to=[],
        delta=update.dual_clip or None, save_strategy="no", disable_tqdm=True, logging_steps=100, **settings)
    trainer = GRPOTrainer(policy, recorded_reward, args, Dataset.from_dict({"prompt": [""] * (rows * len(tables))}),
                          processing_class=tokenizer, rollout_func=partial(replay, tables))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def our_gradient(table: pd.DataFrame, config: Config,
                 old: Callable[[Any], torch.Tensor] | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    policy, _ = loading.load(config.model)
    samples = samples_of(table, config.update, signal_only=False)
    sums = objective.accumulate_gradients(policy, samples, config.update, 1.0,
                                     {id(sample): old(sample) for sample in samples} if old else None)
    return sums["loss_solution"] + sums["loss_meta"], gradient(policy)


def gradient(policy: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor],
                           rtol: float = RTOL) -> None:
    """Equal as a whole; of one tensor, where much cancels, sums in another order round a little more."""
    assert found.keys() == expected.keys()
    apart = {name: (found[name] - value).norm() for name, value in expected.items()}
    size = {name: value.norm() for name, value in expected.items()}
    assert torch.stack([*apart.values()]).norm() < rtol * torch.stack([*size.values()]).norm()
    for name, value in apart.items():
        assert value < 5 * rtol * size[name], name


@pytest.mark.parametrize("method", ["grpo", "masa"])
@pytest.mark.parametrize(("loss_type", "mean"), [("dapo", "token"), ("grpo", "sequence")])
def test_loss_and_gradient_are_those_of_trl(tmp_path: Path, sampled: list[pd.DataFrame], method: str, loss_type: str,
                                            mean: str) -> None:
    config = small(PLAIN | {"method": method, "update.loss_mean": mean})
    table = scored(sampled[0], config)
    trainer = trl_trainer(tmp_path, config, [table], loss_type=loss_type)
    batch = trainer._generate_and_score_completions([{"prompt": ""} for _ in range(len(table))])
    torch.testing.assert_close(batch["advantages"], torch.tensor(table["advantage"].to_numpy(), dtype=torch.float32),
                               rtol=RTOL, atol=1e-7)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected, gradients = our_gradient(table, config)
    assert loss.item() == pytest.approx(expected, rel=RTOL, abs=ZERO)
    assert_equal_gradients(gradient(trainer.model), gradients)


@pytest.mark.parametrize("dual_clip", [0.0, 1.5])
def test_loss_and_gradient_are_those_of_trl_where_the_clip_acts(tmp_path: Path, sampled: list[pd.DataFrame],
                                                                dual_clip: float) -> None:
    config = small(PLAIN | {"update.dual_clip": dual_clip})
    table = scored(sampled[0], config)
    trainer = trl_trainer(tmp_path, config, [table], loss_type="dapo")
    batch = trainer._generate_and_score_completions([{"prompt": ""} for _ in range(len(table))])
    shift = torch.linspace(-1, 1, batch["completion_ids"].shape[1])
    mask = batch["completion_mask"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], mask], dim=1)
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.shape[1])
    old_BT = now + shift
    loss = trainer.compute_loss(trainer.model, batch | {"old_per_token_logps": old_BT})
    loss.backward()
    place = {(tuple(prompt), tuple(tokens), advantage): row for row, (prompt, tokens, advantage) in enumerate(
        zip(table["prompt_ids"], table["tokens"], table["advantage"], strict=True))}

    def old(sample: logprobs.Sample) -> torch.Tensor:
        return old_BT[place[sample.prompt, sample.completion, sample.advantage], :len(sample.completion)]

    expected, gradients = our_gradient(table, config, old)
    assert loss.item() == pytest.approx(expected, rel=RTOL, abs=ZERO)
    assert_equal_gradients(gradient(trainer.model), gradients)
    ratio_share = float((shift.abs() > 0.3).float().mean())
    assert ratio_share > 0.5  # the clip acted on most tokens


@pytest.mark.parametrize("method", ["grpo", "masa"])
@pytest.mark.parametrize(("epsilon", "rate", "tolerance"), [(1e-8, 1e-4, 1e-3), (0.1, 0.03, 2 * RTOL)])
def test_weights_are_those_of_trl_after_three_steps(tmp_path: Path, sampled: list[pd.DataFrame], method: str,
                                                    epsilon: float, rate: float, tolerance: float) -> None:
    config = small(PLAIN | {"method": method, "update.learning_rate": rate})
    tables = [scored(table, config) for table in sampled]
    trainer = trl_trainer(tmp_path, config, tables, loss_type="dapo", optim="adamw_torch", adam_epsilon=epsilon)
    trainer.train()
    ours = Trainer(config)
    for group in ours.learner.optimizer.param_groups:
        group["eps"] = epsilon
    before = {name: value.clone() for name, value in ours.model.named_parameters()}
    for table in tables:
        ours.learner.update(table, [], config, ours.step + 1)
        ours.step += 1
    found = dict(trainer.model.named_parameters())
    moved = apart = 0.0
    for name, value in ours.model.named_parameters():
        moved += (value - before[name]).double().square().sum().item()
        apart += (value - found[name]).double().square().sum().item()
    # With the usual epsilon, AdamW's step of a parameter whose gradient is all rounding is as large as any other's;
    # with one above the gradients it is not.
    assert moved > 0 and (apart / moved) ** 0.5 < tolerance


def test_trl_divides_advantages_by_another_small_number(tmp_path: Path, sampled: list[pd.DataFrame]) -> None:
    config = small(PLAIN | {"update.normalise_std": True})
    table = scored(sampled[0], config)
    trainer = trl_trainer(tmp_path, config, [table], loss_type="dapo")
    trainer.scale_rewards = "group"
    found = trainer._generate_and_score_completions([{"prompt": ""} for _ in range(len(table))])["advantages"].double()
    std = torch.tensor(table.groupby(["stream", "group"])["reward"].transform("std").to_numpy())
    expected = torch.tensor(table["advantage"].to_numpy()) * (std + 1e-6) / (std + 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


VARIANTS = {
    "default": {}, "stream": {"update.meta_weight": 0.5}, "sequence": {"update.loss_mean": "sequence"},
    "parts": {"update.normalise_meta": "parts"}, "batch": {"update.denominator": "batch"},
    "dual clip": {"update.dual_clip": 10.0}, "grpo": {"method": "grpo"}, "entropy": {"update.meta_entropy": 0.1}}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_on_trl_every_setting_of_the_loss_means_what_it_means_here(tmp_path: Path, sampled: list[pd.DataFrame],
                                                                   changes: dict[str, Any]) -> None:
    config = small({"sampling.problems": 3} | changes)
    table = scored(sampled[1], config)
    loss, gradients = on_trl(tmp_path, config, table)
    expected, wanted = our_gradient(table, config)
    assert loss == pytest.approx(expected, rel=RTOL, abs=ZERO)
    # The entropy's gradient is 4e-5 off in TRL's fused head.
    assert_equal_gradients(gradients, wanted, rtol=1e-4 if config.update.meta_entropy >= 0.1 else RTOL)


def on_trl(folder: Path, config: Config, table: pd.DataFrame) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of our class on recorded rollouts, scored by the reward function."""
    policy, tokenizer = loading.load(config.model)
    plan = groups.Layout(len(table), 4, 1)
    places = scaleout.Rollouts(config, None, None, tokenizer)._places(table, len(table))
    trainer = scaleout.MasaGRPOTrainer(
        config, groups.GroupReward(config, tokenizer, loading.end_tokens(policy, tokenizer)), model=policy,
        args=scaleout.arguments(config, plan, 1, 1, folder, False), processing_class=tokenizer,
        train_dataset=Dataset.from_list([groups._blank_row()] * len(table)), rollout_func=lambda prompts, _: places)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([groups._blank_row() for _ in range(len(table))])
    assert len(batch["advantages"]) == max(int(table["advantage"].ne(0).sum()), 1)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradient(trainer.model)


def test_trl_has_what_is_overridden_and_relied_on() -> None:
    for name, names in scaleout.OVERRIDES.items():
        assert names in (tuple(inspect.signature(getattr(GRPOTrainer, name)).parameters), ()), name
    single = inspect.signature(GRPOTrainer._generate_single_turn).parameters
    assert [*single][1:5] == ["prompt_ids", "images", "multimodal_fields", "num_generations"]
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert {"steps_per_generation", "num_generations", "shuffle_dataset", "loss_type", "scale_rewards", "delta",
            "vllm_importance_sampling_correction", "use_transformers_continuous_batching"} <= fields
    own = {name for name in vars(scaleout.MasaGRPOTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    assert own - {"_name", "_tag_names", "_paper", "_template_file"} == scaleout.OVERRIDES.keys()
