"""What TRL's AsyncGRPOTrainer wants of a GPU, in plain torch: with it that trainer's own code runs on a CPU.

Two things in it need a GPU. It asks for the device's name, to log a share of its peak, and it folds the sequences of a
batch into a tree in which a shared beginning stands once and attends with FlashAttention 3, which is fetched from the
Hugging Face hub and runs on Hopper GPUs alone. The name is answered here, and the attention written out, a piece of the
tree at a time: slower, and it runs anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface


@contextlib.contextmanager
def trainer() -> Iterator[None]:
    """Make an AsyncGRPOTrainer inside, in every process; where there is a GPU, nothing is changed."""
    from trl.experimental.async_grpo.packing import TREE_ATTENTION

    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch.cuda, "get_device_name", lambda device=None: "CPU"):
        yield
    AttentionInterface.register(TREE_ATTENTION, tree_attention)  # the trainer has registered its own by now


def tree_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *,
                   tree_kv_index: torch.Tensor, tree_cu_seqlens_q: torch.Tensor, tree_cu_seqlens_k: torch.Tensor,
                   scaling: float | None = None, sliding_window: int | None = None,
                   **others: Any) -> tuple[torch.Tensor, None]:
    """Each piece of the tree attends to the path from its root to itself.

    Args:
        module: the layer; not looked at.
        query: 1, heads, tokens, width.
        key: likewise, with a divisor of the heads.
        value: likewise.
        attention_mask: none; the tree is all that is masked.
        tree_kv_index: where the tokens of all paths stand, one path after the other.
        tree_cu_seqlens_q: where each piece begins, and the end.
        tree_cu_seqlens_k: where each path does.
        scaling: of the products.
        sliding_window: tokens that a token sees, itself too.
        others: the lengths of the longest piece and path, which only a kernel needs.

    Returns:
        1, tokens, heads, width; and no weights.
    """
    pieces, paths = tree_cu_seqlens_q.tolist(), tree_cu_seqlens_k.tolist()
    found = []
    for first, last, begin, end in zip(pieces[:-1], pieces[1:], paths[:-1], paths[1:], strict=True):
        path = tree_kv_index[begin:end]
        place_Q, place_K = torch.arange(len(path) - (last - first), len(path)), torch.arange(len(path))
        back_QK = place_Q[:, None] - place_K
        seen_QK = (back_QK >= 0) & (back_QK < (sliding_window or len(path)))
        found.append(scaled_dot_product_attention(
            query[:, :, first:last], key[:, :, path], value[:, :, path], seen_QK.to(query.device), scale=scaling,
            enable_gqa=True))
    return torch.cat(found, dim=2).transpose(1, 2), None
