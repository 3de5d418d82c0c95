"""The learner: a step's rollouts become one GRPO update over both streams, with the beliefs' gradient beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from masa_lib import config as configs
from masa_lib.config import Config, UpdateConfig
from masa_lib.engines import logprobs
from masa_lib.engines.logprobs import BeliefSample, Sample
from masa_lib.method import beliefs, objective, rollouts
from masa_lib.method.gating import Candidate
from masa_lib.method.streams import predictions_of
from masa_lib.models import tensors
from masa_lib.training import safeguards

#: what a step renews of the running mean of the solutions' gradient norm
NORM_RENEWED = 0.1


class Learner:
    """Moves a policy's weights.

    `optimizer`: AdamW over the weights that are trained. `budget`: tokens of a micro-batch, less where memory ran out.
    `solution_norm`: the running mean of the norm of the solutions' gradient; 0 before the first.
    """

    def __init__(self, model: Any, tokenizer: Any, config: UpdateConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.optimizer = torch.optim.AdamW(tensors.trainable(model), lr=config.learning_rate,
                                           fused=model.device.type == "cuda")
        self.budget, self.solution_norm = safeguards.TokenBudget(), 0.0

    def update(self, table: pd.DataFrame, candidates: Sequence[Candidate], whole: Config, step: int,
               signal_only: bool = False) -> dict[str, float]:
        """A step's optimiser updates, each over its share of the problems.

        Args:
            table: the step's scored rollouts; `group` is the problem's place among the candidates.
            candidates: with their beliefs, where the method reads.
            whole: the settings in force.
            step: its number, counted from 1.
            signal_only: see `samples_of`.

        Returns:
            Metrics: means over the updates, sums of tokens.
        """
        config = whole.update
        bonus = objective.entropy_bonus(predictions_of(table), config)
        weighs = "on" if objective.weighs_sampler(whole) else "off"
        config = dataclasses.replace(config, meta_entropy=bonus, sampler_weight=weighs)
        shares = [part for _, part in table.groupby(table["group"] % config.updates_per_step)]
        parts = [samples_of(part, config, signal_only) for part in shares]
        old = None
        if len(parts) > 1:
            everything = [sample for part in parts for sample in part]
            old = self.budget.spend(lambda budget: logprobs.reference_logps(
                self.model, everything, dataclasses.replace(config, token_budget=budget),
                whole.sampling.temperature), everything, config.token_budget)
        rate = learning_rate(whole, step)
        for group in self.optimizer.param_groups:
            group |= {"lr": rate, "weight_decay": config.weight_decay}
        sums, norms, told = [], [], []
        for share, samples in zip(shares, parts, strict=True):
            sums.append(self._gradients(samples, config, whole.sampling.temperature, old))
            # Parameters no sample reached get a gradient of 0: an update without a signal is an update all the same.
            for parameter in tensors.trainable(self.model):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            told.append(self._learn_beliefs(share, candidates, whole))
            norms.append(safeguards.clip_gradients(tensors.trainable(self.model), config.gradient_clip, sum(
                (sums[-1]["loss_solution"], sums[-1]["loss_meta"], told[-1]["loss_belief"] or 0.0))))
            safeguards.move(self.optimizer)
            torch.clear_autocast_cache()  # it holds the old weights in bfloat16 until the step's context ends
        total = pd.DataFrame(sums).sum()
        tokens = total["tokens"] or math.nan
        norm, read = torch.stack(norms).mean().item(), sum(row["tokens_belief"] for row in told)
        return {"loss": (total["loss_solution"] + total["loss_meta"]) / len(parts),
                "loss_solution": total["loss_solution"] / len(parts), "loss_meta": total["loss_meta"] / len(parts),
                "clip_share": total["clipped"] / tokens, "entropy": total["entropy"] / tokens,
                "logp_gap": total["gap"] / tokens, "gradient_norm": norm, "learning_rate": rate,
                "updates": len(parts), "tokens_update": int(total["computed"]) + read, "tokens_belief": read,
                "token_budget": self.budget.within(config.token_budget),
                **pd.DataFrame(told)[["loss_belief", "belief_gradient"]].astype(float).mean()}

    def _gradients(self, samples: list[Sample], config: UpdateConfig, temperature: float,
                   old: dict[int, torch.Tensor] | None) -> dict[str, float]:
        """The gradient of an update in the parameters, and the sums of `objective.accumulate_gradients`."""
        def passes(budget: int) -> dict[str, float]:
            self.optimizer.zero_grad(set_to_none=False)
            return objective.accumulate_gradients(self.model, samples, dataclasses.replace(config, token_budget=budget),
                                             temperature, old)

        return self.budget.spend(passes, samples, config.token_budget)

    def _learn_beliefs(self, table: pd.DataFrame, candidates: Sequence[Candidate],
                       config: Config) -> dict[str, float]:
        """Add the gradient of the beliefs about the rolled-out problems to that of their solutions.

        Untrained beliefs would drown the solutions (their gradient is a hundred times as long), so it is shortened to
        the running mean of the solutions' norm, and then weighted.
        """
        settings, went = config.prediction, rollouts.outcomes(table)
        if not configs.reads(config) or went.empty or not settings.weight:
            return {"loss_belief": None, "belief_gradient": None, "tokens_belief": 0}
        read = [candidates[group].belief for group in went.index]
        samples = [BeliefSample(belief.prompt + belief.suffix, *row)
                   for belief, row in zip(read, went.itertuples(index=False), strict=True)]
        choices = beliefs.question(self.tokenizer, config.prompt).choices
        gradients, loss = self.budget.spend(
            lambda budget: objective.belief_gradients(self.model, samples, choices, settings.score, budget), samples,
            config.update.token_budget)
        solutions = [parameter.grad for parameter in tensors.trainable(self.model)]
        if norm := torch.nn.utils.get_total_norm(solutions).item():
            self.solution_norm += (norm - self.solution_norm) * (NORM_RENEWED if self.solution_norm else 1.0)
        length = torch.nn.utils.get_total_norm(gradients).item()
        scale = settings.weight * min(1.0, self.solution_norm / length if length else 1.0)
        torch._foreach_add_(solutions, gradients, alpha=scale)
        return {"loss_belief": loss, "belief_gradient": length,
                "tokens_belief": sum(sample.length for sample in samples)}


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step (counted from 1): linear warm-up, then constant, linear or cosine to 0."""
    update = config.update
    if step <= update.warmup_steps:
        return update.learning_rate * step / update.warmup_steps
    left = 1 - (step - update.warmup_steps - 1) / max(config.steps - update.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[update.schedule]
    return update.learning_rate * factor


def samples_of(table: pd.DataFrame, config: UpdateConfig, signal_only: bool) -> list[Sample]:
    """The sequences of an update that carry a gradient; their weights count all that were scored.

    Args:
        table: the update's rollouts.
        config: how tokens are weighted.
        signal_only: groups without a signal do not count (dynamic sampling has drawn others for them).
    """
    counted = table[table["advantage"].ne(0) if signal_only else table["reward"].notna()]
    weights = objective.token_weights(counted["tokens"].map(len).tolist(), counted["stream"].tolist(), config)
    columns = zip(counted["prompt_ids"], counted["tokens"], counted["logps"], counted["advantage"], weights,
                  counted["stream"], strict=True)
    return [Sample(*column) for column in columns if column[3] != 0.0]
