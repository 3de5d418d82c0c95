"""TRL's GRPOTrainer with what it lacks for MASA, all of it in one class: `MasaGRPOTrainer`.

TRL turns rewards into advantages and weighs tokens in its own way. Its clipped loss is linear in a positive factor on
the advantage, so `advantage x weight x tokens` under `loss_type="dapo"` (a sum over the step's tokens divided by their
number) gives our loss exactly: own groups for each stream, any denominator, 1e-6 beside the standard deviation. TRL's
entropy bonus acts on all tokens; ours, on those of the meta stream, is added to the loss. The rest is the optimiser and
the learning rate of `masa_lib.training.trainer`, and the sampling of a step as a rollout function.
Every override is named in `OVERRIDES`, with what it relies on; a test fails where TRL changes under one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer

from masa_lib.config import Config
from masa_lib.gates import registry
from masa_lib.method import gather, gating, objective, rollouts
from masa_lib.method.streams import predictions_of
from masa_lib.models import loading, tensors
from masa_lib.scaleout.groups import BLANK, COLUMNS, GroupReward, Layout
from masa_lib.tasks.problem_rows import Problem
from masa_lib.tasks.problems import ProblemPool
from masa_lib.training.clock import Clock
from masa_lib.training.learner import learning_rate
from masa_lib.training.trainer import ORACLE_TAG, SEED_TAG

#: what `MasaGRPOTrainer` overrides of TRL and transformers, and the arguments that it relies on (none: passed through)
OVERRIDES = {"_generate_and_score_completions": ("self", "inputs"),
             "_get_per_token_logps_and_entropies": (),
             "_compute_loss": ("self", "model", "inputs"),
             "create_optimizer": ("self", "model"),
             "create_scheduler": ("self", "num_training_steps", "optimizer")}
#: tensors of a batch with one row a rollout; the first two are padded on the left, the next two on the right
LEFT, RIGHT = ("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")


def arguments(config: Config, plan: Layout, processes: int, steps: int, out: Path,
              sharded: bool) -> GRPOConfig:
    """TRL's settings for a config: a step is one generation and one update, in `memory.pieces` micro-batches.

    Args:
        config: of the run.
        plan: how the places of a step lie.
        processes: that share them.
        steps: still to train.
        out: the run's folder; TRL itself writes nothing there.
        sharded: TRL samples, with the engine of the config.
    """
    update, sampling = config.update, config.sampling
    return GRPOConfig(
        output_dir=str(out), seed=config.seed, max_steps=steps, use_cpu=config.model.device == "cpu",
        bf16=config.model.precision == "bfloat16", gradient_checkpointing=config.model.gradient_checkpointing,
        per_device_train_batch_size=plan.places // processes // plan.pieces,
        gradient_accumulation_steps=plan.pieces, steps_per_generation=plan.pieces, num_iterations=1,
        num_generations=plan.generations, shuffle_dataset=False, temperature=sampling.temperature, top_k=0, top_p=1.0,
        max_completion_length=max(sampling.solution_tokens, sampling.meta_tokens),
        use_vllm=sharded and sampling.engine == "vllm", vllm_mode="colocate",
        vllm_gpu_memory_utilization=sampling.gpu_memory, vllm_importance_sampling_correction=False,
        use_transformers_continuous_batching=sharded and sampling.engine == "paged",
        beta=0.0, loss_type="dapo", scale_rewards="none",
        epsilon=update.clip_low, epsilon_high=update.clip_high, delta=update.dual_clip or None,
        max_grad_norm=update.gradient_clip, learning_rate=update.learning_rate,
        logging_steps=1, save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, ddp_find_unused_parameters=False, log_completions=False, disable_dropout=True)


class MasaGRPOTrainer(GRPOTrainer):
    """GRPO with MASA's groups, advantages, token weights, optimiser and learning rate.

    Args:
        config: of the run.
        reward: the reward function.
        done: steps trained before.
        others: arguments of `GRPOTrainer`.

    Attributes:
        signal: of the last step, the rows with a gradient on this process: how many, and their tokens.
        refills: groups without a signal do not count in the means of the running step.
        bonus: on the entropy of the meta stream's tokens in the running step.
    """

    def __init__(self, config: Config, reward: GroupReward, *, done: int = 0, **others: Any) -> None:
        self.config, self.reward, self.done, self.signal = config, reward, done, (0, 0)
        self.refills, self.bonus, self._entropies = False, config.update.meta_entropy, None
        super().__init__(reward_funcs=reward, **others)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with our advantages, without the rows that have no gradient."""
        batch = super()._generate_and_score_completions(inputs)
        if isinstance(self.rollout_func, Rollouts):
            self.rollout_func.clock.lap("grade")
        table, tokens = self.reward.table, batch["num_items_in_batch"]
        weights = loss_weights(table, self.config, self.refills)
        facts = np.stack([weights * table["advantage"], weights * (table["stream"] == "meta")], axis=1)
        facts = np.concatenate([facts, np.zeros((1, 2))])  # of blank places, whose row is -1
        factors_B2 = torch.tensor(facts[self.reward.place], dtype=torch.float32, device=tokens.device)
        batch |= {"advantages": factors_B2[:, 0] * tokens, "entropy_weights": factors_B2[:, 1]}
        return self._with_signal(batch)

    def _with_signal(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The rows with a gradient, and as many more as make equal micro-batches; padding that all share is cut.

        TRL gathers metrics by row, so every process keeps as many rows as the one with the most.
        """
        pieces = self.args.steps_per_generation
        order_B = batch["advantages"].eq(0).long().argsort(stable=True)
        count = int(batch["advantages"].ne(0).sum())
        most = max(*gather_object([count]), 1)
        kept_B = order_B[:-(-most // pieces) * pieces].sort().values
        rows = len(order_B)
        small = {name: value[kept_B] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
                 for name, value in batch.items()}
        left = small["prompt_ids"].shape[1] - int(small["prompt_mask"].sum(dim=1).max())
        right = int(small["completion_mask"].sum(dim=1).max())
        small |= {name: small[name][:, left:] for name in LEFT} | {name: small[name][:, :right] for name in RIGHT}
        masks = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
        self.signal = (count, int(masks[batch["advantages"] != 0].sum()))
        return small

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any, Any]:
        """TRL's; the entropies are kept for the bonus."""
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._entropies = found[1]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss and the bonus, which the mean over the processes must not divide."""
        loss = super()._compute_loss(model, inputs)
        if self.bonus:
            weights_B = inputs["entropy_weights"] * inputs["advantages"].ne(0)
            sums_B = (self._entropies * inputs["completion_mask"]).sum(dim=1)
            loss = loss - self.bonus * self.accelerator.num_processes * (weights_B * sums_B).sum()
        self._entropies = None
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over all that is trained, in one group, as `masa_lib.training.trainer` has it."""
        if self.optimizer is None:
            update, wrapped = self.config.update, self.model if model is None else model
            self.optimizer = torch.optim.AdamW(
                tensors.trainable(wrapped), lr=update.learning_rate, weight_decay=update.weight_decay,
                fused=self.args.device.type == "cuda")
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate of `masa_lib.training.learner`, counted from the run's first step."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self._rate)
        return self.lr_scheduler

    def _rate(self, finished: int) -> float:
        return learning_rate(self.config, self.done + finished + 1) / self.config.update.learning_rate


def loss_weights(table: pd.DataFrame, config: Config, signal_only: bool) -> Any:
    """What a token of each rollout counts in the loss; 0 for those that take no part."""
    counted = table[table["advantage"].ne(0) if signal_only else table["reward"].notna()]
    weights = objective.token_weights(counted["length"].tolist(), counted["stream"].tolist(), config.update)
    return pd.Series(weights, counted.index, dtype=float).reindex(table.index, fill_value=0.0).to_numpy()


class Rollouts:
    """The rollout function: the step's problems are drawn, gated and sampled by our rooms, then dealt to places.

    TRL hands it prompts without their columns, and each process its own. It needs neither: what a step asks for follows
    from config, cursor and gate, and every process finds the same. Caps and hints are those of each request.

    Args:
        config: of the run.
        pool: the training problems.
        engine: of all processes.
        tokenizer: of the model.

    Attributes:
        step: finished steps.
        cursor: problems drawn.
        memory: of the gates, by method.
        gate: of the running step.
        found: the running step's selection.
        counting: the running step's count of tokens.
        clock: the running step's, begun with it.
        oracle_tokens: of the running step; they are no cost.
    """

    def __init__(self, config: Config, pool: ProblemPool, engine: Any, tokenizer: Any) -> None:
        self.config, self.pool, self.engine, self.tokenizer = config, pool, engine, tokenizer
        self.step = self.cursor = self.oracle_tokens = 0
        self.memory: dict[str, Any] = {}
        self.gate: gating.Gate | None = None
        self.found: gather.Selection | None = None
        self.counting, self.clock = gather.CountingEngine(engine), Clock()

    def __call__(self, prompts: Sequence[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """This process's share of the step: token ids, and the columns that the reward function reads."""
        config, state = self.config, trainer.accelerator
        self.counting, self.clock, self.oracle_tokens = gather.CountingEngine(self.engine), Clock(), 0
        self.gate = registry.make_gate(config, self.pool, self._solve, self.memory)
        trainer.refills = self.gate is not None and self.gate.refills
        sample = partial(rollouts.sample, engine=self.counting, tokenizer=self.tokenizer, config=config,
                         seed=[config.seed, SEED_TAG, self.step], temperature=config.sampling.temperature)
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.eval()
        with loading.precision(config.model, state.device):
            self.engine.sync()
            self.found = gather.collect(self.gate, self.pool, self.cursor, sample, config, self.step + 1)
        model.train()
        self.clock.lap("generate")
        table = self.found.table
        # Where TRL samples, it reports no log-probs, and the bonus always acts.
        trainer.bonus = objective.entropy_bonus(predictions_of(table), config.update)
        order = table.assign(late=table["stream"] == "meta").sort_values(["group", "late", "member"]).index
        first = state.process_index * len(prompts)
        return self._places(table.loc[order[first:first + len(prompts)]], len(prompts))

    def _places(self, table: pd.DataFrame, count: int) -> dict[str, Any]:
        """The rows of a table as places, and blank ones behind them."""
        spare, end = count - len(table), self.tokenizer.eos_token_id
        columns = {name: [*table[name].tolist(), *[BLANK[name]] * spare] for name in COLUMNS}
        return {"prompt_ids": [*map(list, table["prompt_ids"]), *[[end]] * spare],
                "completion_ids": [*map(list, table["tokens"]), *[[end]] * spare],
                "logprobs": None, **columns}  # wanted by TRL's corrections alone, which ours does without

    def _solve(self, problems: Sequence[Problem], samples: int) -> list[int]:
        """The oracle's knowledge, neither tokens nor seconds of the training; see `masa_lib.training.trainer`."""
        start = time.perf_counter()
        right, tokens = rollouts.count_right(problems, samples, self.engine, self.tokenizer, self.config,
                                             [self.config.seed, ORACLE_TAG, self.step])
        self.oracle_tokens += tokens
        self.clock.leave_out(time.perf_counter() - start)
        return right

    def learn(self, scored: pd.DataFrame) -> dict[str, float]:
        """End a step: tell the gate what came of it; the step's metrics about gate and cap."""
        gated = gather.learn(self.gate, dataclasses.replace(self.found, table=scored))
        self.step += 1
        self.cursor += len(self.found.candidates)
        if self.gate:
            self.memory[self.config.method] = self.gate.state()
        return gated


