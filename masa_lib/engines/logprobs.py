"""The learner's forward pass: log-probs of completion tokens, and hidden states, without ever holding all logits.

Logits exist for one chunk of tokens at a time; sequences are packed without padding, and a prompt that several of them
share is computed once (`packing`). Nothing here knows a reward or a loss. Suffixes: `_P` prompt, `_B` sequence, `_T`
token of a padded sequence, `_N` completion token of a whole micro-batch, one after the other, `_D` hidden, `_V` word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from masa_lib.config import UpdateConfig
from masa_lib.engines import packing
from masa_lib.engines.packing import put
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
    hidden_ND = (_hidden_packed if architecture.packs(model) else _hidden_whole)(model, samples)
    targets_N = put(torch.tensor([token for sample in samples for token in sample.completion]), model.device)
    weights = architecture.head_weights(model)
    parts = [_ChunkLogps.apply(model, temperature, entropy_gradient, targets, hidden, *weights)
             for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)]
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _hidden_packed(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """Last hidden states where each completion token is predicted, ND; each distinct prompt is computed once."""
    return packing.hidden_states(model, [sample.prompt for sample in samples],
                                 [sample.completion for sample in samples])


def _hidden_whole(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """The same from whole sequences, padded: for models that remember more than keys and values, or see otherwise."""
    ids_BT, _ = _pad([sample.prompt + sample.completion[:-1] for sample in samples], model.device)
    hidden_BTD = architecture.body(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    columns_T = torch.arange(ids_BT.shape[1])
    ranges = [(len(sample.prompt) - 1, sample.length - 1) for sample in samples]
    wanted_BT = torch.stack([(columns_T >= first) & (columns_T < end) for first, end in ranges])
    return hidden_BTD.flatten(0, 1).index_select(0, put(wanted_BT.flatten().nonzero()[:, 0], model.device))


def last_states(model: Any, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The last hidden state at the end of each prompt, PD."""
    ids_PT, lengths_P = _pad(prompts, model.device)
    hidden_PTD = architecture.body(model)(input_ids=ids_PT, use_cache=False).last_hidden_state
    return hidden_PTD[torch.arange(len(prompts), device=model.device), put(lengths_P - 1, model.device)]


def next_logits(model: Any, prompts: Sequence[tuple[int, ...]], choices: Sequence[int]) -> torch.Tensor:
    """The logits of some words behind each prompt, float32, one row a prompt and one column a word."""
    return architecture.head_logits(model, last_states(model, prompts))[:, list(choices)].float()


def _pad(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, where causal attention never looks, and the lengths (on the CPU)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids_BT = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, ids in enumerate(rows):
        ids_BT[row, :len(ids)] = torch.tensor(ids)
    return put(ids_BT, device), lengths


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
    """Cut samples into batches of at most `token_budget` tokens with padding.

    Those of a prompt stay together, so that it is computed once; prompts come by their longest completion.
    """
    longest: dict[tuple[int, ...], int] = {}
    for sample in samples:
        longest[sample.prompt] = max(longest.get(sample.prompt, 0), len(sample.completion))
    batch: list[AnySample] = []
    width = 0
    for sample in sorted(samples, key=lambda sample: (longest[sample.prompt], sample.prompt, len(sample.completion))):
        width = max(width, sample.length)
        if batch and (len(batch) + 1) * width > token_budget:
            yield batch
            batch, width = [], sample.length
        batch.append(sample)
    if batch:
        yield batch


def computed_tokens(model: Any, samples: Sequence[Sample]) -> int:
    """Tokens of a micro-batch that go through the model: shared prompts once, where they can be."""
    prompts = [sample.prompt for sample in samples]
    return sum(len(sample.completion) for sample in samples) + sum(
        map(len, set(prompts) if architecture.packs(model) else prompts))


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
