"""Sampling with the policy itself, in this process: a KV-cache loop in plain transformers.

Each distinct prompt is computed once and its cache shared out to the requests that have it; finished sequences leave
the batch, so that the tail of a few long answers is cheap. Every request draws its own uniform numbers from its own
seed and samples by the inverse of the cumulative distribution, so a request's answer does not depend on its neighbours.
There is no copy of the weights, hence nothing to synchronise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from masa_lib.engine.base import Completion, Request, check_requests, explain_memory

#: the cache grows by this many tokens at a time, rather than by one
_GROWTH = 64
#: tokens between two looks at which sequences have finished: on a GPU a look waits for the device and copies the cache
_LOOK = {"cuda": 8}


class _RoomyLayer(DynamicLayer):
    """A cache layer with room to grow: appending a token writes in place instead of copying the whole cache."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens and return all states so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._length, self._store = 0, [key_states[:, :, :0], value_states[:, :, :0]]
        end = self._length + key_states.shape[-2]
        for index, states in enumerate((key_states, value_states)):
            store = self._store[index]
            if store.shape[-2] < end:
                room = states.new_zeros(*states.shape[:2], end - store.shape[-2] + _GROWTH, states.shape[-1])
                store = self._store[index] = torch.cat([store, room], dim=-2)
            store[:, :, self._length:end] = states
        self._length = end
        self.keys, self.values = (store[:, :, :end] for store in self._store)
        return self.keys, self.values

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be taken several times."""
        self._store = [store.index_select(0, rows) for store in self._store]
        self.keys, self.values = (store[:, :, :self._length] for store in self._store)


class TransformersEngine:
    """The in-process engine.

    Args:
        model: a causal language model; it is used as it is at each call.
        end_tokens: ids that end an answer.
        batch: sequences decoded together, at most.
    """

    def __init__(self, model: Any, end_tokens: Iterable[int], *, batch: int = 512) -> None:
        self.model, self.batch, self.prefill_tokens = model, batch, 0
        self._ends = torch.tensor(sorted(end_tokens), device=model.device)

    def sync(self) -> None:
        """Nothing to do: the policy itself samples."""

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Completion]:
        """Sample every request; see `Engine.generate`."""
        check_requests(requests, getattr(self.model.config, "max_position_embeddings", 1 << 30))
        # Neighbours in length and prompt decode together: little padding, prompts shared.
        order = sorted(range(len(requests)), key=lambda i: (requests[i].max_tokens, requests[i].prompt), reverse=True)
        self.prefill_tokens = 0
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch):
            part = order[start:start + self.batch]
            with explain_memory():
                done |= dict(zip(part, self._generate_batch([requests[i] for i in part], progress), strict=True))
        return [done[i] for i in range(len(requests))]

    def _generate_batch(self, requests: Sequence[Request], progress: Callable[[int], Any] | None) -> list[Completion]:
        device = self.model.device
        caps = torch.tensor([request.max_tokens for request in requests], device=device)
        longest, count = max(request.max_tokens for request in requests), len(requests)
        look = _LOOK.get(device.type, 1)
        uniform_BT = torch.from_numpy(uniforms(requests, longest)).to(device)
        temperature_B1 = torch.tensor([[request.temperature] for request in requests], device=device)
        tokens_BT = torch.zeros(count, longest, dtype=torch.long, device=device)
        logps_BT = torch.zeros(count, longest, device=device)
        lengths_B = torch.zeros(count, dtype=torch.long, device=device)
        stopped_B = torch.zeros(count, dtype=torch.bool, device=device)

        logits, cache, mask, positions = self._prefill(requests)
        rows = torch.arange(count, device=device)  # which request each row of the batch still serves
        live = torch.ones_like(rows, dtype=torch.bool)  # a finished row stays, and what it samples is cut off
        for step in range(longest):
            logps = torch.log_softmax(logits.float() / temperature_B1[rows], dim=-1)
            token = inverse_cdf(logps, uniform_BT[rows, step])
            tokens_BT[rows, step] = token
            logps_BT[rows, step] = logps.gather(1, token[:, None])[:, 0]
            lengths_B[rows] += live
            stopped = torch.isin(token, self._ends)
            stopped_B[rows] |= live & stopped
            live = live & ~stopped & (caps[rows] > step + 1)
            if (step + 1) % look == 0 or step + 1 == longest:
                kept = live.nonzero()[:, 0]
                if progress is not None and len(kept) < len(rows):
                    progress(len(rows) - len(kept))
                if not len(kept):
                    break
                if len(kept) < len(rows):
                    rows, token, mask, positions = rows[kept], token[kept], mask[kept], positions[kept]
                    live = live[kept]
                    for layer in cache.layers:
                        layer.select(kept)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions + 1
            logits = self.model(input_ids=token[:, None], attention_mask=mask, position_ids=positions,
                                past_key_values=cache, use_cache=True).logits[:, -1]
        return to_completions(tokens_BT.tolist(), logps_BT.tolist(), lengths_B.tolist(), stopped_B.tolist())

    def _prefill(self, requests: Sequence[Request]) -> tuple[torch.Tensor, Cache, torch.Tensor, torch.Tensor]:
        """Compute each distinct prompt once (padded on the left); logits, cache, mask and last position of each row."""
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        self.prefill_tokens += sum(map(len, prompts))
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):] = torch.tensor(prompt)
            mask[row, width - len(prompt):] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = Cache(layer_class_to_replicate=_RoomyLayer)
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                            use_cache=True, logits_to_keep=1).logits[:, -1]
        number = {prompt: row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([number[request.prompt] for request in requests], device=self.model.device)
        for layer in cache.layers:
            layer.select(rows)
        return logits[rows], cache, mask[rows], positions[rows, -1:]


def uniforms(requests: Sequence[Request], length: int) -> np.ndarray:
    """One uniform number a request and token, float32: row b comes from the seed of request b alone."""
    return np.stack([np.random.Generator(np.random.Philox(key=request.seed)).random(length, dtype=np.float32)
                     for request in requests])


def inverse_cdf(logps_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The token where the cumulative probability passes the uniform number."""
    cumulative = logps_BV.exp().cumsum(-1)
    # The last entry is 1 up to rounding; scaling by it keeps the search inside the vocabulary.
    target = uniform_B[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logps_BV.shape[1] - 1)


def to_completions(tokens_BT: list[list[int]], logps_BT: list[list[float]], lengths_B: list[int],
                   stopped_B: list[bool]) -> list[Completion]:
    """One completion a row; rows may be longer than what was sampled."""
    return [Completion(tuple(tokens[:n]), tuple(logps[:n]), "stop" if stop else "length")
            for tokens, logps, n, stop in zip(tokens_BT, logps_BT, lengths_B, stopped_B, strict=True)]
