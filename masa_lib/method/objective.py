"""The objective as pure functions on tensors: the clipped loss and the belief's loss. Advantages stand in `advantages`.

The loss is a weighted sum over completion tokens; whatever a mean is taken over (tokens or sequences, one stream or the
batch) is in the weights, so one line serves all. There is no reference model and no KL term. Suffixes: `_P` problem,
`_N` completion token of a whole micro-batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from masa_lib.config import Config, UpdateConfig
from masa_lib.engines.logprobs import (
    BeliefSample,
    Sample,
    completion_logps,
    computed_tokens,
    micro_batches,
    next_logits,
    put,
)
from masa_lib.method import beliefs

#: nats a token; `meta_entropy` acts in steps whose meta tokens have less
ENTROPY_FLOOR = 0.5
#: a token's largest weight where those of the sampler are corrected
SAMPLER_CAP = 3.0


def entropy_bonus(meta: pd.DataFrame, config: UpdateConfig) -> float:
    """`meta_entropy` in a step whose predictions have less entropy than ENTROPY_FLOOR, by their log-probs; else 0."""
    entropy, tokens = -meta["logps"].map(sum).sum(), meta["tokens"].map(len).sum()
    return 0.0 if entropy >= ENTROPY_FLOOR * tokens else config.meta_entropy


def token_weights(lengths: Sequence[int], streams: Sequence[str], config: UpdateConfig) -> list[float]:
    """What one token of each sequence counts in the loss of an update.

    Args:
        lengths: completion lengths of *all* sequences of the update, those without a gradient too, tokens.
        streams: `solution` or `meta`, for each sequence.
        config: `denominator`, `loss_mean` and `meta_weight`.
    """
    total = {stream: 0 for stream in streams}
    for length, stream in zip(lengths, streams, strict=True):
        total[stream] += length if config.loss_mean == "token" else 1
    if config.denominator == "batch":
        total = dict.fromkeys(total, sum(total.values()))
    factor = {"solution": 1.0, "meta": config.meta_weight}
    return [factor[stream] / total[stream] / (1 if config.loss_mean == "token" else length)
            for length, stream in zip(lengths, streams, strict=True)]


def clipped_loss(logps_N: torch.Tensor, old_logps_N: torch.Tensor, advantages_N: torch.Tensor,
                 config: UpdateConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of each token, and whether the clip acted on it.

    Args:
        logps_N: under the policy, with gradient.
        old_logps_N: under the policy before the step's first update, without gradient.
        advantages_N: of the sequences the tokens belong to.
        config: clip range and dual clip.

    Source: PPO (1707.06347), equation 7, with separate bounds (DAPO, 2503.14476); dual clip 1912.09729.
    """
    ratio = torch.exp(logps_N - old_logps_N)
    plain = -advantages_N * ratio
    clipped = -advantages_N * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(plain, clipped)
    if config.dual_clip:
        loss = torch.where(advantages_N < 0, torch.minimum(loss, -advantages_N * config.dual_clip), loss)
    return loss, (clipped > plain).detach()


def weighs_sampler(config: Config) -> bool:
    """Whether a run's update weighs tokens by the sampler's probabilities of them, see `sampler_weights`.

    vLLM in bfloat16 keeps all states in it; the learner's autocast holds norms and residuals in float32.
    """
    setting = config.update.sampler_weight
    other = config.sampling.engine == "vllm" and config.model.precision == "bfloat16"
    return setting == "on" or (setting == "auto" and other)


def sampler_weights(old_logps_N: torch.Tensor, sampler_logps_N: torch.Tensor) -> torch.Tensor:
    """What each token weighs: its probability under the learner over that under the sampler, at most SAMPLER_CAP.

    Args:
        old_logps_N: under the policy before the step's first update, without gradient.
        sampler_logps_N: as the engine reported them; where it did not (NaN), the weight is 1.

    Source: truncated importance sampling (Ionides 2008); between sampler and learner as in TRL's `token_truncate`.
    """
    return torch.exp(old_logps_N - sampler_logps_N).nan_to_num(nan=1.0).clamp(max=SAMPLER_CAP)


def accumulate_gradients(model: Any, samples: Sequence[Sample], config: UpdateConfig, temperature: float,
                         old_logps: dict[int, torch.Tensor] | None = None) -> dict[str, float]:
    """Add the gradient of the loss over all samples to the parameters.

    Args:
        model: the policy.
        samples: those with an advantage other than 0; their weights were made with all sequences.
        config: the loss and the token budget; tokens are weighed by the sampler where `sampler_weight` is `on`.
        temperature: of the sampling.
        old_logps: for each sample (by its `id`), log-probs before the step's first update; None: this is it.

    Returns:
        Sums over tokens: `computed` (those through the model: shared prompts once), `tokens` (of completions),
        `loss_solution`, `loss_meta`, `clipped`, `entropy`, `gap` (of the log-probs to the sampler's).
    """
    sums = dict.fromkeys(("computed", "tokens"), 0)
    totals = torch.zeros(5, dtype=torch.float64, device=model.device)  # read once: reading waits for the device
    for batch in micro_batches(samples, config.token_budget):
        logps_N, entropy_N = completion_logps(model, batch, temperature, config.logprob_chunk, config.meta_entropy > 0)
        old_N = torch.cat([old_logps[id(sample)] for sample in batch]) if old_logps else logps_N.detach()
        counts = torch.tensor([len(sample.completion) for sample in batch])
        facts_B3 = torch.tensor([[s.advantage, s.weight, float(s.stream == "meta")] for s in batch])
        facts_N3 = put(facts_B3.repeat_interleave(counts, dim=0), model.device)
        advantage_N, weight_N, meta_N = facts_N3.unbind(dim=1)
        sampler_N = put(torch.tensor([logp for sample in batch for logp in sample.sampler_logps]), model.device)
        loss_N, clipped_N = clipped_loss(logps_N, old_N, advantage_N, config)
        if config.sampler_weight == "on":
            loss_N = loss_N * sampler_weights(old_N, sampler_N)
        if config.meta_entropy:
            loss_N = loss_N - config.meta_entropy * meta_N * entropy_N
        (weight_N * loss_N).sum().backward()
        with torch.no_grad():
            weighted_N = weight_N * loss_N
            totals += torch.stack([(weighted_N * (1 - meta_N)).sum(), (weighted_N * meta_N).sum(), clipped_N.sum(),
                                 entropy_N.sum(), (logps_N - sampler_N).abs().sum()])
        sums["tokens"] += int(counts.sum())
        sums["computed"] += computed_tokens(model, batch)
    return sums | dict(zip(("loss_solution", "loss_meta", "clipped", "entropy", "gap"), totals.tolist(), strict=True))


def belief_scores(logits_PV: torch.Tensor, right: Sequence[int], solutions: Sequence[int], mode: str) -> torch.Tensor:
    """What each belief earns by what came of its problem's solutions, with its exact gradient, P.

    Args:
        logits_PV: of the nine answers.
        right: solutions of each problem that were right.
        solutions: of each problem.
        mode: `prediction.score`.
    """
    likelihoods_PV = torch.from_numpy(beliefs.log_binomials(right, solutions)).to(logits_PV.dtype)
    rates_P = torch.tensor(right, dtype=logits_PV.dtype) / torch.tensor(solutions)
    return beliefs.score(logits_PV, put(likelihoods_PV, logits_PV.device), put(rates_P, logits_PV.device), mode)


def belief_gradients(model: Any, samples: Sequence[BeliefSample], choices: Sequence[int], mode: str,
                     token_budget: int) -> tuple[list[torch.Tensor], float]:
    """The gradient of the beliefs' loss, minus the mean score, for each trainable parameter; exact, nothing is sampled.

    Args:
        model: the policy.
        samples: at least one; the problems that were rolled out.
        choices: ids of the nine answers.
        mode: `prediction.score`.
        token_budget: tokens (with padding) of one micro-batch.

    Returns:
        Gradients in the order of the model's trainable parameters, and the loss, nats (brier: 0 to 1).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, loss = [torch.zeros_like(parameter) for parameter in parameters], 0.0
    for batch in micro_batches(samples, token_budget):
        logits_PV = next_logits(model, [sample.prompt for sample in batch], choices)
        scores_P = belief_scores(logits_PV, [sample.right for sample in batch], [sample.solutions for sample in batch],
                                 mode)
        part = -scores_P.sum() / len(samples)
        for kept, found in zip(total, torch.autograd.grad(part, parameters, allow_unused=True), strict=True):
            if found is not None:
                kept += found
        loss += part.item()
    return total, loss
