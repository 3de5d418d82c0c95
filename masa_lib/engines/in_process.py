"""Sampling with the policy itself, in this process: a KV-cache loop in plain transformers.

Each distinct prompt is computed once and its cache shared out to the requests that have it; finished sequences leave
the batch, so that the tail of a few long answers is cheap. Every request draws its own uniform numbers from its own
seed and samples by the inverse of the cumulative distribution, so a request's answer does not depend on its neighbours.
There is no copy of the weights, hence nothing to synchronise. The prompts of the last reading stay computed until the
weights change, so that who is read first and sampled then is computed once. A model that remembers more than keys and
values (states of a recurrence, of a convolution) decodes with its own cache: prompts of one length together, and none
leaves early.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from masa_lib.engines.base import (
    Completion,
    Reading,
    Request,
    Watch,
    check_reading,
    check_requests,
    context_of,
    explain_memory,
    to_reading,
)
from masa_lib.models import architecture

#: the cache grows by this many tokens at a time, rather than by one
_GROWTH = 64
#: tokens that prompts must have in common for these to be computed apart, once
_SHARED = 16
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
        self.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        self._length -= tokens_to_remove
        self.keys, self.values = (store[:, :, :self._length] for store in self._store)

    def close(self, beginning: int, gaps_B1: torch.Tensor) -> None:
        """Move the padding that follows the first `beginning` tokens to the front, so many columns in each row."""
        column = torch.arange(self._length, device=gaps_B1.device)
        behind = torch.where(column < gaps_B1 + beginning, column - gaps_B1, column)
        order = torch.where(column < gaps_B1, column + beginning, behind)[:, None, :, None]
        self._store = [states.gather(2, order.expand(-1, states.shape[1], -1, states.shape[-1]))
                       for states in (self.keys, self.values)]
        self.crop(0)

    def put(self, other: _RoomyLayer, rows: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> None:
        """Copy rows of another layer to places of this one, which begins as zeros of `shape` (batch, length).

        The last tokens of both stand in the same column; where this one is the longer, zeros go in front.
        """
        if not self.is_initialized:
            self.lazy_initialization(other.keys, other.values)
            self._length = shape[1]
            self._store = [states.new_zeros(shape[0], states.shape[1], shape[1] + _GROWTH, states.shape[-1])
                           for states in (other.keys, other.values)]
            self.crop(0)
        common = min(other._length, self._length)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[places, :, self._length - common:] = theirs[rows, :, other._length - common:]


@dataclass(frozen=True)
class _Computed:
    """Prompts with their keys and values, padded on the left.

    `rows`: which row of the rest is a prompt's. `logits_BV`: behind each prompt. `holds_for`: see `_state`.
    """

    rows: dict[tuple[int, ...], int]
    logits_BV: torch.Tensor
    cache: Cache
    holds_for: tuple[Any, ...]


@dataclass
class _Sequences:
    """Sequences that decode together: their cache, which of its columns are tokens, and the last positions."""

    model: Any
    cache: Cache
    mask: torch.Tensor
    positions: torch.Tensor

    def append(self, token_B: torch.Tensor) -> torch.Tensor:
        """Add a token to each; the logits behind it."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions + 1
        return self.model(input_ids=token_B[:, None], attention_mask=self.mask, use_cache=True,
                          **architecture.remembering(self.model, self.cache),
                          **architecture.positions(self.model, self.positions)).logits[:, -1]

    def keep(self, rows: torch.Tensor) -> bool:
        """Drop all but these rows."""
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        for layer in self.cache.layers:
            layer.select(rows)
        return True


class _Equals:
    """Sequences of one length that decode together with whatever cache the model makes for itself, or with none."""

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]]) -> None:
        self.model, self._cache = model, {}
        self._ids_BT = torch.tensor(prompts, device=model.device)
        self.logits = self._forward(self._ids_BT)

    def append(self, token_B: torch.Tensor) -> torch.Tensor:
        """Add a token to each; the logits behind it."""
        self._ids_BT = torch.cat([self._ids_BT, token_B[:, None]], dim=1)
        return self._forward(self._ids_BT[:, -1:] if self._cache else self._ids_BT)

    def keep(self, _: torch.Tensor) -> bool:
        """Not every such cache can drop rows, so none does."""
        return False

    def _forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        length = self._ids_BT.shape[1]
        places_T = torch.arange(length - ids_BT.shape[1], length, device=ids_BT.device)
        output = self.model(input_ids=ids_BT, use_cache=True, **self._cache,
                            **architecture.positions(self.model, places_T.expand_as(ids_BT)))
        self._cache = {name: output[name] for name in ALL_CACHE_NAMES if name in output}
        return output.logits[:, -1]


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
        self._kept: _Computed | None = None

    def sync(self) -> None:
        """Forget the prompts of the last reading; the policy itself samples."""
        self._kept = None

    @torch.no_grad()
    def read(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int]) -> Reading:
        """Read the next token's probabilities; see `Engine.read`. At most a batch of prompts stays computed."""
        check_reading(prompts, suffix, choices, context_of(self, self.model),
                      architecture.text_config(self.model).vocab_size)
        distinct = sorted(dict.fromkeys(prompts), key=len, reverse=True)
        self.prefill_tokens, self._kept = 0, None
        logps: list[np.ndarray] = []
        for part in self._batches(distinct, [len(prompt) for prompt in distinct]):
            with explain_memory():
                computed, logits = self._read(part, suffix)
                logps.extend(logits.float().log_softmax(dim=-1)[:, list(choices)].cpu().numpy())
            self._kept = self._kept or computed
        number = {prompt: row for row, prompt in enumerate(distinct)}
        return to_reading(np.stack([logps[number[prompt]] for prompt in prompts]))

    @torch.no_grad()  # inference mode has no autocast cache: weights would be cast again at each token
    def generate(self, requests: Sequence[Request], progress: Watch | None = None) -> list[Completion]:
        """Sample every request; see `Engine.generate`."""
        check_requests(requests, context_of(self, self.model))
        # Neighbours in length and prompt decode together: little padding, prompts shared.
        order = sorted(range(len(requests)), key=lambda i: (requests[i].max_tokens, requests[i].prompt), reverse=True)
        self.prefill_tokens = 0
        done: dict[int, Completion] = {}
        for part in self._batches(order, [len(requests[i].prompt) for i in order]):
            with explain_memory():
                done |= dict(zip(part, self._generate_batch([requests[i] for i in part], progress), strict=True))
        return [done[i] for i in range(len(requests))]

    def _batches(self, items: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
        """Items that are computed together, in their order; where a cache knows no padding, those of one length."""
        groups = [items]
        if not architecture.attention_alone(self.model):
            groups = [[item for item, own in zip(items, lengths, strict=True) if own == length]
                      for length in dict.fromkeys(lengths)]
        for group in groups:
            yield from (list(group[start:start + self.batch]) for start in range(0, len(group), self.batch))

    def _generate_batch(self, requests: Sequence[Request], progress: Watch | None) -> list[Completion]:
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

        logits, sequences = self._begin(requests)
        rows = torch.arange(count, device=device)  # which request each row of the batch still serves
        running, sampled = count, 0
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
                if progress is not None:
                    before, sampled = sampled, int(lengths_B.sum())
                    progress(running - len(kept), sampled - before)
                running = len(kept)
                if not len(kept):
                    break
                if len(kept) < len(rows) and sequences.keep(kept):
                    rows, token, live = rows[kept], token[kept], live[kept]
            logits = sequences.append(token)
        return to_completions(tokens_BT.tolist(), logps_BT.tolist(), lengths_B.tolist(), stopped_B.tolist())

    def _begin(self, requests: Sequence[Request]) -> tuple[torch.Tensor, _Sequences | _Equals]:
        """The logits behind each prompt, and the sequences that go on from there."""
        if architecture.attention_alone(self.model):
            logits, cache, mask, positions = self._prefill(requests)
            return logits, _Sequences(self.model, cache, mask, positions)
        equals = self._equals([request.prompt for request in requests])
        return equals.logits, equals

    def _equals(self, prompts: Sequence[tuple[int, ...]]) -> _Equals:
        self.prefill_tokens += sum(map(len, prompts))
        return _Equals(self.model, prompts)

    def _read(self, prompts: Sequence[tuple[int, ...]],
              suffix: tuple[int, ...]) -> tuple[_Computed | None, torch.Tensor]:
        """The prompts, computed, where they can be kept, and the logits behind the suffix that follows each."""
        if architecture.attention_alone(self.model):
            return self._compute(prompts, suffix)
        return None, self._equals([prompt + suffix for prompt in prompts]).logits

    def _prefill(self, requests: Sequence[Request]) -> tuple[torch.Tensor, Cache, torch.Tensor, torch.Tensor]:
        """Each distinct prompt, kept from a reading or computed now; logits, cache, mask, last position of each row."""
        kept = self._kept if self._kept and self._kept.holds_for == self._state() else None
        prompts = [request.prompt for request in requests]
        new = [prompt for prompt in dict.fromkeys(prompts) if not kept or prompt not in kept.rows]
        parts = [part for part in (kept, self._compute(new)[0] if new else None) if part]
        device = self.model.device
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        width = max(map(len, prompts))
        mask = (torch.arange(width, device=device) >= width - lengths_B1).long()
        return *_deal(parts, prompts, width), mask, lengths_B1 - 1

    def _compute(self, prompts: Sequence[tuple[int, ...]],
                 suffix: tuple[int, ...] = ()) -> tuple[_Computed, torch.Tensor]:
        """Compute different prompts (padded on the left); they, and the logits behind the suffix that follows each."""
        shared = self._shared(prompts, suffix)
        rests = [prompt[shared:] + suffix for prompt in prompts]
        self.prefill_tokens += shared + sum(map(len, rests))
        width, device = max(map(len, rests)), self.model.device
        ids = torch.zeros(len(rests), width, dtype=torch.long, device=device)
        mask = torch.zeros(len(rests), shared + width, dtype=torch.long, device=device)
        mask[:, :shared] = 1
        for row, rest in enumerate(rests):
            ids[row, width - len(rest):] = torch.tensor(rest)
            mask[row, shared + width - len(rest):] = 1
        cache = Cache(layer_class_to_replicate=_RoomyLayer)
        if shared:
            beginning = torch.tensor([prompts[0][:shared]], device=device)
            self._forward(beginning, mask[:1, :shared], cache, torch.tensor([-1], device=device))
            for layer in cache.layers:
                layer.select(torch.zeros(len(rests), dtype=torch.long, device=device))
        ends = torch.tensor([width - 1 - len(suffix), width - 1], device=device)
        logits = self._forward(ids, mask, cache, ends if suffix else ends[1:])
        for layer in cache.layers:
            if shared:
                layer.close(shared, (mask == 0).sum(1, keepdim=True))
            layer.crop(len(suffix))
        number = {prompt: row for row, prompt in enumerate(prompts)}
        return _Computed(number, logits[:, 0], cache, self._state()), logits[:, -1]

    def _shared(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...]) -> int:
        """How many tokens all prompts begin with, where that is worth a forward pass of its own; else 0.

        The padding then stands between beginning and rest, which a model must not see: layers that look back only so
        far, and models without position ids, measure distances by columns.
        """
        common = sum(itertools.takewhile(bool, map(operator.eq, min(prompts), max(prompts))))
        shared = min(common, min(map(len, prompts)) - 1)
        longest = max(map(len, prompts)) + len(suffix)
        by_columns = not architecture.takes(self.model, "position_ids") or any(
            longest > window for window in architecture.windows(self.model))
        return 0 if shared < _SHARED or len(prompts) == 1 or by_columns else shared

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, ends: torch.Tensor) -> torch.Tensor:
        """Append tokens to the cache; the logits at these columns. The mask covers what the cache holds already."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        keep = {"logits_to_keep": ends} if architecture.takes(self.model, "logits_to_keep") else {}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **keep,
                            **architecture.remembering(self.model, cache),
                            **architecture.positions(self.model, positions)).logits
        return logits if keep else logits[:, ends]

    def _state(self) -> tuple[Any, ...]:
        """What computed prompts hold for: these weights, in this precision."""
        kind = self.model.device.type
        return (sum(parameter._version for parameter in self.model.parameters()), torch.is_autocast_enabled(kind),
                torch.get_autocast_dtype(kind))


def _deal(parts: Sequence[_Computed], prompts: Sequence[tuple[int, ...]], width: int) -> tuple[torch.Tensor, Cache]:
    """Logits and keys and values of each prompt, out of the part that has it; the width is that of the longest."""
    logits_BV = parts[0].logits_BV.new_empty(len(prompts), parts[0].logits_BV.shape[1])
    cache = Cache(layers=[_RoomyLayer() for _ in parts[0].cache.layers])
    for part in parts:
        mine = [place for place, prompt in enumerate(prompts) if prompt in part.rows]
        if not mine:
            continue
        places = torch.tensor(mine, device=logits_BV.device)
        rows = torch.tensor([part.rows[prompts[place]] for place in mine], device=logits_BV.device)
        logits_BV[places] = part.logits_BV[rows]
        for layer, theirs in zip(cache.layers, part.cache.layers, strict=True):
            layer.put(theirs, rows, places, (len(prompts), width))
    return logits_BV, cache


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
