"""Group-relative policy optimisation as pure functions on tensors: advantages, token log-probs, the clipped loss.

The loss is a weighted sum over completion tokens; whatever a mean is taken over (tokens or sequences, one stream or the
batch) is in the weights, so one line serves all. Logits exist for one chunk of tokens at a time. There is no reference
model and no KL term. Suffixes: `_P` problem, `_G` member of a group, `_B` sequence, `_T` token of a padded sequence,
`_N` completion token of a whole micro-batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache

from masa_lib import beliefs
from masa_lib.config import Config, UpdateConfig
from masa_lib.models import architecture


@dataclass(frozen=True)
class Sample:
    """One sequence of an update.

    `prompt`, `completion`: token ids. `sampler_logps`: of the completion, as the engine reported them. `advantage`: of
    the sequence. `weight`: what one of its tokens counts in the loss. `stream`: `solution` or `meta`.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    sampler_logps: tuple[float, ...]
    advantage: float
    weight: float
    stream: str = "solution"

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class BeliefSample:
    """A problem that was rolled out: the `prompt` up to where its pass rate is read, and `right` of `solutions`."""

    prompt: tuple[int, ...]
    right: int
    solutions: int
    completion: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)


AnySample = TypeVar("AnySample", Sample, BeliefSample)


def advantages(rewards_PG: torch.Tensor, normalise_std: bool = True) -> torch.Tensor:
    """Rewards relative to their group's mean, over the group's sample standard deviation plus 1e-6.

    Args:
        rewards_PG: one row a group of at least two.
        normalise_std: divide by the standard deviation.

    Returns:
        Advantages of the same shape; exactly 0 throughout a group whose rewards are all equal.

    Source: DeepSeekMath (2402.03300), section 4.1.2; sample standard deviation as in the released code.
    """
    centred = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if normalise_std:
        centred = centred / (rewards_PG.std(dim=1, keepdim=True) + 1e-6)
    return torch.where(zero_variance(rewards_PG)[:, None], 0.0, centred)


def zero_variance(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Which groups carry no gradient because all their rewards are equal; shape P, bool."""
    return (rewards_PG == rewards_PG[:, :1]).all(dim=1)


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


def sampler_weights(old_logps_N: torch.Tensor, sampler_logps_N: torch.Tensor, cap: float) -> torch.Tensor:
    """The truncated importance weight of each token: its probability under the learner over that under the sampler.

    Args:
        old_logps_N: under the policy before the step's first update, without gradient.
        sampler_logps_N: as the engine reported them; where it did not (NaN), the weight is 1.
        cap: the largest weight.

    Source: truncated importance sampling (Ionides 2008); between sampler and learner as in TRL's `token_truncate`.
    """
    return torch.exp(old_logps_N - sampler_logps_N).nan_to_num(nan=1.0).clamp(max=cap)


def completion_logps(model: Any, samples: Sequence[Sample], temperature: float, chunk: int,
                     entropy_gradient: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the completion tokens and the entropy at each, without ever holding all logits.

    Args:
        model: a causal language model.
        samples: one micro-batch.
        temperature: the logits are divided by it.
        chunk: tokens whose logits exist at once; they are computed again in the backward pass.
        entropy_gradient: whether the entropy has a gradient, too.

    Returns:
        `logps_N` (with gradient, float32, nats) and `entropy_N`, in the order of the samples.
    """
    hidden_BTD = (_hidden_shared if architecture.shares_prompts(model) else _hidden_whole)(model, samples)
    counts = torch.tensor([len(sample.completion) for sample in samples])
    real_BT = torch.arange(hidden_BTD.shape[1]) < counts[:, None]
    real_N = put(real_BT.flatten().nonzero()[:, 0], model.device)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, real_N)
    targets_N = put(torch.tensor([token for sample in samples for token in sample.completion]), model.device)
    weights = architecture.head_weights(model)
    parts = [_ChunkLogps.apply(model, temperature, entropy_gradient, targets, hidden, *weights)
             for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)]
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _hidden_shared(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """Last hidden states where completion token t is predicted, BTD; each distinct prompt is computed once.

    The gradient reaches a prompt through the keys and values of all completions that share it.
    """
    prompts = list(dict.fromkeys(sample.prompt for sample in samples))
    number = {prompt: row for row, prompt in enumerate(prompts)}
    rows_B = put(torch.tensor([number[sample.prompt] for sample in samples]), model.device)
    # Prompts end in one column: a gap before the completions would count as distance in a window of attention.
    ids_PT, lengths_P = _pad(prompts, model.device, left=True)
    before_P1 = put(ids_PT.shape[1] - lengths_P[:, None], model.device)
    columns_T = torch.arange(ids_PT.shape[1], device=model.device)
    mask_PT = (columns_T >= before_P1).long()
    cache = DynamicCache()
    hidden_PTD = architecture.body(model)(
        input_ids=ids_PT, attention_mask=mask_PT, past_key_values=cache, use_cache=True,
        **architecture.positions(model, (columns_T - before_P1).clamp(min=0))).last_hidden_state
    first_B1D = hidden_PTD[rows_B, -1:]
    ids_BT, _ = _pad([sample.completion[:-1] for sample in samples], model.device)
    if not ids_BT.shape[1]:
        return first_B1D
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows_B), layer.values.index_select(0, rows_B)
    mask_BT = torch.cat([mask_PT[rows_B], torch.ones_like(ids_BT)], dim=1)
    columns_T = ids_PT.shape[1] + torch.arange(ids_BT.shape[1], device=model.device)
    rest_BTD = architecture.body(model)(
        input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True,
        **architecture.positions(model, columns_T - before_P1[rows_B])).last_hidden_state
    return torch.cat([first_B1D, rest_BTD], dim=1)


def _hidden_whole(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """The same from whole sequences: for gradient checkpointing, and for caches that cannot be shared."""
    ids_BT, _ = _pad([sample.prompt + sample.completion[:-1] for sample in samples], model.device)
    hidden_BTD = architecture.body(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    width = max(len(sample.completion) for sample in samples)
    starts_B1 = put(torch.tensor([[len(sample.prompt) - 1] for sample in samples]), model.device)
    wanted_BT = (starts_B1 + torch.arange(width, device=model.device)).clamp(max=hidden_BTD.shape[1] - 1)
    return hidden_BTD[torch.arange(len(samples), device=model.device)[:, None], wanted_BT]


def last_states(model: Any, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The last hidden state at the end of each prompt, PD."""
    ids_PT, lengths_P = _pad(prompts, model.device)
    hidden_PTD = architecture.body(model)(input_ids=ids_PT, use_cache=False).last_hidden_state
    return hidden_PTD[torch.arange(len(prompts), device=model.device), put(lengths_P - 1, model.device)]


def _pad(rows: Sequence[tuple[int, ...]], device: torch.device,
         left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, where causal attention never looks, or the left, and the lengths (on the CPU)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for row, ids in enumerate(rows):
        start = width - len(ids) if left else 0
        ids_BT[row, start:start + len(ids)] = torch.tensor(ids)
    return put(ids_BT, device), lengths


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device, without waiting for what the device is at."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class _ChunkLogps(torch.autograd.Function):
    """Log-probs and entropy of a chunk's tokens; the backward pass computes the logits again.

    Written out because every pass over the logits is dear: a buffer or two of them serve the gradient.
    """

    @staticmethod
    def forward(ctx: Any, model: Any, temperature: float, entropy_gradient: bool, targets_N: torch.Tensor,
                hidden_ND: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of each target and entropy at its place (N,); `weights` are the trained ones behind the body."""
        kind = hidden_ND.device.type
        # No cache: a weight that is cast here, without a gradient, must not be found by the backward pass.
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind),
                        "enabled": torch.is_autocast_enabled(kind), "cache_enabled": False}
        with torch.autocast(**ctx.autocast):
            logits_NV = architecture.head_logits(model, hidden_ND).float().div_(temperature)
        highest_N = logits_NV.amax(dim=-1)
        logits_NV -= highest_N[:, None]
        target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
        odds_NV = logits_NV.exp()
        total_N = odds_NV.sum(dim=-1)
        entropy_N = total_N.log() - torch.linalg.vecdot(odds_NV, logits_NV) / total_N
        ctx.model, ctx.temperature, ctx.entropy_gradient, ctx.weights = model, temperature, entropy_gradient, weights
        ctx.save_for_backward(hidden_ND, targets_N, highest_N + total_N.log(), entropy_N)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return target_N - total_N.log(), entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logps_N: torch.Tensor, grad_entropy_N: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of the hidden states and of the head's weights, from logits computed once more."""
        hidden_ND, targets_N, normaliser_N, entropy_N = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            hidden_ND = hidden_ND.detach().requires_grad_()
            raw_NV = architecture.head_logits(ctx.model, hidden_ND)
        logps_NV = raw_NV.detach().float().div_(ctx.temperature).sub_(normaliser_N[:, None])
        if ctx.entropy_gradient:
            grad_NV = logps_NV.exp()
            grad_NV *= logps_NV.add_(entropy_N[:, None]).mul_(-grad_entropy_N[:, None]).sub_(grad_logps_N[:, None])
        else:
            grad_NV = logps_NV.exp_().mul_(-grad_logps_N[:, None])
        grad_NV.scatter_add_(1, targets_N[:, None], grad_logps_N[:, None])
        grad_NV /= ctx.temperature
        return None, None, None, None, *torch.autograd.grad(
            raw_NV, [hidden_ND, *ctx.weights], grad_NV.to(raw_NV.dtype), materialize_grads=True)


def micro_batches(samples: Sequence[AnySample], token_budget: int) -> Iterator[list[AnySample]]:
    """Cut samples, sorted by completion length, into batches of at most `token_budget` tokens with padding."""
    batch: list[AnySample] = []
    longest = 0
    for sample in sorted(samples, key=lambda sample: (len(sample.completion), sample.prompt)):
        longest = max(longest, sample.length)
        if batch and (len(batch) + 1) * longest > token_budget:
            yield batch
            batch, longest = [], sample.length
        batch.append(sample)
    if batch:
        yield batch


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
            loss_N = loss_N * sampler_weights(old_N, sampler_N, config.sampler_cap)
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
        last_PD = last_states(model, [sample.prompt for sample in batch])
        logits_PV = architecture.head_logits(model, last_PD)[:, list(choices)].float()
        likelihoods_PV = torch.tensor(np.stack([beliefs.log_binomial(sample.right, sample.solutions)
                                                for sample in batch]), dtype=torch.float32)
        rates_P = torch.tensor([sample.right / sample.solutions for sample in batch])
        scores_P = beliefs.score(logits_PV, put(likelihoods_PV, model.device), put(rates_P, model.device), mode)
        part = -scores_P.sum() / len(samples)
        for kept, found in zip(total, torch.autograd.grad(part, parameters, allow_unused=True), strict=True):
            if found is not None:
                kept += found
        loss += part.item()
    return total, loss


def computed_tokens(model: Any, samples: Sequence[Sample]) -> int:
    """Tokens of a micro-batch that go through the model: shared prompts once, where they can be."""
    prompts = [sample.prompt for sample in samples]
    return sum(len(sample.completion) for sample in samples) + sum(
        map(len, set(prompts) if architecture.shares_prompts(model) else prompts))


@torch.no_grad()
def reference_logps(model: Any, samples: Sequence[Sample], config: UpdateConfig,
                    temperature: float) -> dict[int, torch.Tensor]:
    """Log-probs of each sample's completion under the current policy, by the sample's `id`."""
    table: dict[int, torch.Tensor] = {}
    for batch in micro_batches(samples, config.token_budget):
        logps_N, _ = completion_logps(model, batch, temperature, config.logprob_chunk)
        parts = logps_N.split([len(sample.completion) for sample in batch])
        table |= {id(sample): part for sample, part in zip(batch, parts, strict=True)}
    return table
