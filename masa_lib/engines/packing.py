"""Sequences of an update in one row without padding, in which a prompt that several of them share stands once.

All of a model but its attention works on tokens one by one, so that padding there is work for nothing. Attention alone
sees sequences apart; completions see their prompt in front of them. A FlashAttention kernel takes sequences of any
length; for other attention they are laid out in two padded batches, prompts and completions. Nothing is kept in a
cache, so layers may be computed again in the backward pass. Suffixes: `_N` token of the row, `_P` prompt,
`_B` completion, `_Q` query, `_K` key.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from masa_lib.models import architecture

#: the attention of packed rows
NAME = "masa_packed"


def hidden_states(model: Any, prompts: Sequence[tuple[int, ...]],
                  completions: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Last hidden states where each token of the completions is predicted, ND, one completion after the other.

    Args:
        model: one that `architecture.packs`.
        prompts: of each completion, token ids; equal ones are computed once.
        completions: token ids, at least one each.
    """
    config = architecture.text_config(model)
    layout = Layout(prompts, completions, model.device, config._attn_implementation)
    with architecture.attending(config, layout):
        states_1ND = architecture.body(model)(
            input_ids=layout.ids_1N, use_cache=False,
            **architecture.positions(model, layout.positions_1N)).last_hidden_state
    return states_1ND[0].index_select(0, layout.wanted_N)


class Layout(str):
    """Where the tokens of a row stand; as a text it is NAME, so that a model's config can hand it to `attention`.

    `ids_1N`, `positions_1N`: of each token, its id and its position in its sequence. `wanted_N`: places in the row at
    which completion tokens are predicted. `own`: how the model attends otherwise. `prompts_PQ`, `completions_BQ`,
    `keys_BK`: what stands in the padded batches, as places in the row; padding is the row's first token. `back_N`: of
    each token of the row, its place among the queries of both batches.
    """

    def __new__(cls, *_: Any) -> Layout:
        """The name alone; all else is set by `__init__`."""
        return super().__new__(cls, NAME)

    def __init__(self, prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]],
                 device: torch.device, own: str) -> None:
        number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        rows_B = torch.tensor([number[prompt] for prompt in prompts])
        fed = [completion[:-1] for completion in completions]  # nothing is predicted behind the last
        self.own, self._device, self._masks = own, device, {}
        self._lengths_P, self._lengths_B = (torch.tensor([len(part) for part in parts]) for parts in (number, fed))
        prompts_PQ, real_PQ = _batch(self._lengths_P, 0)
        completions_BQ, real_BQ = _batch(self._lengths_B, int(self._lengths_P.sum()))
        positions_PQ = torch.arange(prompts_PQ.shape[1]).expand_as(prompts_PQ)
        positions_BQ = self._lengths_P[rows_B, None] + torch.arange(completions_BQ.shape[1])
        last_B1 = self._lengths_P.cumsum(0)[rows_B, None] - 1
        wanted_N = torch.cat([last_B1, completions_BQ], dim=1)[torch.cat([last_B1 >= 0, real_BQ], dim=1)]
        self._rows_B, self._real_PQ, self._real_BQ = rows_B, real_PQ, real_BQ
        self._positions_PQ, self._positions_BQ = positions_PQ, positions_BQ
        self.ids_1N = self._put(torch.tensor([[token for part in (*number, *fed) for token in part]]))
        self.positions_1N = self._put(torch.cat([positions_PQ[real_PQ], positions_BQ[real_BQ]])[None])
        self.wanted_N = self._put(wanted_N)
        self.prompts_PQ, self.completions_BQ = self._put(prompts_PQ), self._put(completions_BQ)
        self.keys_BK = self._put(torch.cat([prompts_PQ[rows_B], completions_BQ], dim=1))
        self.back_N = self._put(torch.cat([real_PQ.flatten(), real_BQ.flatten()]).nonzero()[:, 0])

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return put(tensor, self._device)

    def masks(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What queries of prompts and of completions see, P1QK and B1QK; None: themselves and all before.

        Args:
            window: tokens that a token sees, itself too; None: all.
            dtype: of the queries; the model's plain attention adds its masks, in this precision.
        """
        if (window, dtype) not in self._masks:
            positions_BK = torch.cat([self._positions_PQ[self._rows_B], self._positions_BQ], dim=1)
            real_BK = torch.cat([self._real_PQ[self._rows_B], torch.ones_like(self._real_BQ)], dim=1)
            first = _seen(self._positions_PQ, self._positions_PQ, window)
            second = _seen(self._positions_BQ, positions_BK, window) & real_BK[:, None]
            if self.own == "eager":
                first, second = (torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
                                 for seen in (first, second))
            elif window is None:
                first = None
            self._masks[window, dtype] = (first if first is None else self._put(first[:, None]),
                                          self._put(second[:, None]))
        return self._masks[window, dtype]

    @cached_property
    def paths(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """What each prompt, then each completion sees, one behind the other as places in the row, and their lengths.

        The lengths are named as transformers' FlashAttention takes them.
        """
        real_BK = torch.cat([self._real_PQ[self._rows_B], self._real_BQ], dim=1)
        places_K = torch.cat([self.prompts_PQ[self._put(self._real_PQ)], self.keys_BK[self._put(real_BK)]])
        queries = torch.cat([self._lengths_P, self._lengths_B])
        keys = torch.cat([self._lengths_P, self._lengths_P[self._rows_B] + self._lengths_B])
        ends_q, ends_k = (self._put(torch.nn.functional.pad(part.cumsum(0), (1, 0)).int()) for part in (queries, keys))
        return places_K, {"cu_seq_lens_q": ends_q, "cu_seq_lens_k": ends_k,
                          "max_length_q": int(queries.max()), "max_length_k": int(keys.max())}


def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
              **others: Any) -> tuple[torch.Tensor, None]:
    """The attention of a packed row.

    Args:
        module: the layer; its config holds the row's layout.
        query: 1, heads, tokens, width.
        key: likewise, with a divisor of the heads.
        value: likewise.
        attention_mask: none; the layout says what is seen.
        others: what the model's own attention takes, such as its window.

    Returns:
        1, tokens, heads, width; and no weights.
    """
    layout = module.config._attn_implementation
    plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = partial(ALL_ATTENTION_FUNCTIONS.get_interface(layout.own, plain), module, **others)
    with architecture.attending(module.config, layout.own):
        if layout.own.startswith("flash"):
            places_K, lengths = layout.paths
            return attend(query, *(states.index_select(2, places_K) for states in (key, value)), None, **lengths)
        masks = layout.masks(others.get("sliding_window"), query.dtype)
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        found = [attend(_laid_out(query, queries), _laid_out(key, keys), _laid_out(value, keys), mask)[0].flatten(0, 1)
                 for queries, keys, mask in ((layout.prompts_PQ, layout.prompts_PQ, masks[0]),
                                             (layout.completions_BQ, layout.keys_BK, masks[1])) if queries.numel()]
    return torch.cat(found).index_select(0, layout.back_N)[None], None


AttentionInterface.register(NAME, attention)


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device, without waiting for what the device is at."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _batch(lengths_B: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that follow each other in a row, the first at `start`, as a padded batch of places; which are real."""
    columns_Q = torch.arange(int(lengths_B.max()))
    real_BQ = columns_Q < lengths_B[:, None]
    return torch.where(real_BQ, start + (lengths_B.cumsum(0) - lengths_B)[:, None] + columns_Q, 0), real_BQ


def _seen(positions_BQ: torch.Tensor, positions_BK: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which keys are at a query's position or before it, by less than the window: BQK."""
    back_BQK = positions_BQ[:, :, None] - positions_BK[:, None]
    return (back_BQK >= 0) & (back_BQK < window) if window else back_BQK >= 0


def _laid_out(states_NHD: torch.Tensor, places_BQ: torch.Tensor) -> torch.Tensor:
    """Rows of states as a padded batch: B, heads, Q, width."""
    return states_NHD.index_select(0, places_BQ.flatten()).unflatten(0, places_BQ.shape).transpose(1, 2)
