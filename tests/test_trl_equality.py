from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from small import small
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout, FixedCountBatcher

from masa_lib.config import Config
from masa_lib.engines import logprobs, make_engine
from masa_lib.method import beliefs, objective, rollouts
from masa_lib.method.streams import solutions_of
from masa_lib.models import loading
from masa_lib.scaleout import grpo, without_gpu, worker
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training.learner import samples_of
from masa_lib.training.trainer import Trainer

#: what TRL's defaults mean: advantages without the standard deviation, tokens of both streams in one mean
PLAIN = {"update.normalise_std": False, "update.denominator": "batch", "sampling.problems": 3, "update.dual_clip": 0.0}
RTOL = 1e-5
#: a loss that sums to 0, as a mean of sequences does before the clip acts: its terms are about 0.1 and float32
ZERO = 1e-7
#: fills micro-batches
BLANK = logprobs.Sample((0,), (0,), (0.0,), 0.0, 0.0)


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
    "contrast": {"update.normalise_meta": "contrast"}, "grpo": {"method": "grpo"}}


def test_the_reward_function_pays_what_makes_trls_loss_ours(tmp_path: Path, sampled: list[pd.DataFrame]) -> None:
    loss_types = {"token": "dapo", "sequence": "grpo"}
    for name, changes in (VARIANTS | {"dual clip": {"update.dual_clip": 10.0}}).items():
        config = small({"sampling.problems": 3} | changes)
        table = scored(sampled[1], config)
        paid = table.assign(reward=grpo.payments(table, config))
        trainer = trl_trainer(tmp_path / name, config, [paid], loss_type=loss_types[config.update.loss_mean])
        batch = trainer._generate_and_score_completions([{"prompt": ""} for _ in range(len(table))])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        expected, gradients = our_gradient(table, config)
        assert loss.item() == pytest.approx(expected, rel=RTOL, abs=ZERO), name
        assert_equal_gradients(gradient(trainer.model), gradients)


# AsyncGRPOTrainer: its own packing, attention over the tree (ours, without a GPU) and loss.


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory, model: tuple[Any, Any]) -> AsyncGRPOTrainer:
    """TRL's trainer with the pocket model, for micro-batches of 20 sequences."""
    folder = tmp_path_factory.mktemp("async")
    for part in model:
        part.save_pretrained(folder)
    args = worker.arguments(small(PLAIN), folder / "trl", 2, per_device_train_batch_size=20)
    rollouts_of = worker.MasaRolloutWorker(small(PLAIN), args)
    with without_gpu.trainer():
        made = AsyncGRPOTrainer(str(folder), args=args, train_dataset=Dataset.from_dict({"prompt": [""]}),
                                rollout_worker=rollouts_of, weight_transfer=rollouts_of)
    made.current_gradient_accumulation_steps = 2
    return made


def learned(learner: AsyncGRPOTrainer, rows: Sequence[logprobs.Sample], config: Config) -> tuple[float, Any]:
    """Loss and gradient that TRL finds of two micro-batches of sequences."""
    learner.epsilon_low, learner.epsilon_high = config.update.clip_low, config.update.clip_high
    source = (dataclasses.asdict(sample) for sample in worker.to_trl(rows, BLANK, 20, 2, 2, 1, 1))
    collate = DataCollatorForRollout(0, 1)
    learner.model.zero_grad()
    total = 0.0
    for packed in FixedCountBatcher(source, 1, 20):
        loss = learner.compute_loss(learner.model, collate([packed]))
        loss.backward()
        total += loss.item()
    return total, gradient(learner.model)


def with_own_logps(rows: Sequence[logprobs.Sample], config: Config, shift: float) -> list[logprobs.Sample]:
    """The sequences as a sampler would hand them over whose log-probs are the policy's, moved by up to `shift`."""
    policy, _ = loading.load(config.model)
    known = logprobs.reference_logps(policy, rows, config.update, 1.0)
    return [dataclasses.replace(row, sampler_logps=tuple(
        (known[id(row)] + shift * torch.linspace(-1, 1, len(row.completion))).tolist())) for row in rows]


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_workers_sequences_make_trls_asynchronous_loss_ours(learner: AsyncGRPOTrainer, sampled: list[pd.DataFrame],
                                                                shift: float) -> None:
    for name, changes in VARIANTS.items():
        config = small({"sampling.problems": 3} | changes)
        samples = with_own_logps(samples_of(scored(sampled[1], config), config.update, False), config, shift)
        policy, _ = loading.load(config.model)
        sums = objective.accumulate_gradients(policy, samples, config.update, 1.0, {
            id(sample): torch.tensor(sample.sampler_logps) for sample in samples})
        loss, gradients = learned(learner, samples, config)
        assert loss == pytest.approx(sums["loss_solution"] + sums["loss_meta"], rel=RTOL, abs=ZERO), name
        assert_equal_gradients(gradients, gradient(policy), 10 * RTOL)
        assert shift == 0.0 or sums["clipped"] > 0


@pytest.mark.parametrize("score", ["log", "brier"])
def test_a_belief_is_learned_as_nine_sequences_of_one_token(learner: AsyncGRPOTrainer, model: tuple[Any, Any],
                                                            score: str) -> None:
    config = small({"method": "masa-read", "prediction.score": score, "prediction.weight": 0.5})
    policy, tokenizer = loading.load(config.model)
    problems = ProblemPool(config.problems, 0).take(0, 4)
    read, _ = rollouts.believe(problems, engine=make_engine("transformers", policy, tokenizer, batch=8),
                               tokenizer=tokenizer, config=config, sample=None)
    choices, right, tried = beliefs.question(tokenizer, config.prompt).choices, [0, 3, 4, 1], [4, 4, 4, 4]
    found, loss = worker.belief_samples(read, right, tried, choices, config)
    expected, expected_loss = objective.belief_gradients(policy, [
        logprobs.BeliefSample(belief.prompt + belief.suffix, *row) for belief, row in zip(
            read, zip(right, tried, strict=True), strict=True)], choices, score, 4096)
    assert loss == pytest.approx(expected_loss, rel=RTOL) and len(found) == 36
    assert sum(row.advantage for row in found) == pytest.approx(0, abs=1e-6)
    _, gradients = learned(learner, found, config)
    names = [name for name, _ in policy.named_parameters()]
    assert_equal_gradients(gradients, {name: 0.5 * value for name, value in zip(names, expected, strict=True)}, 1e-4)


def test_the_plain_attention_of_a_tree_sees_what_a_window_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 4, generator=generator) for heads in (4, 2, 2))
    # a root of three tokens, and behind its second token's path two leaves of one token each
    found, _ = without_gpu.tree_attention(
        None, query, key, value, None, tree_kv_index=torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4]),
        tree_cu_seqlens_q=torch.tensor([0, 3, 4, 5]), tree_cu_seqlens_k=torch.tensor([0, 3, 7, 11]), sliding_window=2)
    for token, seen in {0: [0], 1: [0, 1], 2: [1, 2], 3: [2, 3], 4: [2, 4]}.items():
        for head in range(4):
            share = torch.softmax(key[0, head // 2, seen] @ query[0, head, token] / 2, dim=0)
            torch.testing.assert_close(found[0, token, head], share @ value[0, head // 2, seen])
