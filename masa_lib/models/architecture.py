"""What of a model's architecture decides its log-probs: what it does behind its body, its caches, its windows.

Everything here is read off the model's own code and config, so that no list of known models is needed; whatever cannot
be read so is met by `masa_lib.engines.self_check`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from masa_lib.errors import MasaError

#: what configs call the number of tokens that a layer looks back, or at
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention",
            "keep_window_size", "index_topk")


class ArchitectureError(MasaError):
    """A model whose log-probs cannot be computed as it computes them itself; the message names it."""


class _Hidden:
    """The output of a body that has not run: last hidden states, and None for all else that may be asked for."""

    def __init__(self, states_1ND: torch.Tensor) -> None:
        self.last_hidden_state = states_1ND

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, item: Any) -> Any:
        return (self.last_hidden_state,)[item]


def body(model: Any) -> Any:
    """The part that turns tokens into last hidden states: whatever stands below the model and embeds its input."""
    embeddings = model.get_input_embeddings()
    return next((child for child in model.children() if embeddings in child.modules()), model.base_model)


def head_logits(model: Any, hidden_ND: torch.Tensor) -> torch.Tensor:
    """The logits that the model itself makes of last hidden states, shape (tokens, vocabulary).

    Its own forward pass runs with a body that only hands the states over, so that scaling, soft-capping and whatever
    else stands around the output embeddings are what they are in `model(...).logits`.

    Raises:
        ArchitectureError: the model does not compute its logits from the output of its body.
    """
    handed: list[bool] = []

    def hand_over(*_: Any, **__: Any) -> _Hidden:
        handed.append(True)
        return _Hidden(hidden_ND[None])

    bodies = {body(model), model.get_decoder()} - {model}
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=hidden_ND.device)
    try:
        for part in bodies:  # some wrappers call the decoder within the body
            part.forward = hand_over
        logits_NV = model(input_ids=token_11).logits[0] if bodies else None
    finally:
        for part in bodies:
            del part.forward
    if not handed:
        raise ArchitectureError(f"A model of type {kind(model)!r} does not make its logits from the output of its "
                                "body, so they cannot be computed piece by piece; choose another in model.name.")
    return logits_NV


def head_weights(model: Any) -> list[torch.nn.Parameter]:
    """The trained parameters that logits depend on beside the hidden states, those of tied embeddings included."""
    head = model.get_output_embeddings()
    inside = set(map(id, body(model).parameters())) - set(map(id, head.parameters() if head else ()))
    return [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in inside]


def attention_alone(model: Any) -> bool:
    """Whether all that the model remembers of earlier tokens are keys and values, one of each a token.

    Only then can prompts be padded, and rows of a cache be taken, dropped and shared.
    """
    if model._is_stateful or not (takes(body(model), "past_key_values") or takes(body(model), "cache")):
        return False
    layers = DynamicCache(config=text_config(model)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def packs(model: Any) -> bool:
    """Whether an update computes its sequences in one row, each distinct prompt once; otherwise whole and padded.

    That takes attention that can be exchanged, and that sees all tokens before it or a sliding window of them.
    """
    config = text_config(model)
    other = any(getattr(config, name, None) for name in _WINDOWS if name != "sliding_window")
    return model._can_set_attn_implementation() and attention_alone(model) and not other and (
        takes(body(model), "position_ids")) and config._attn_implementation.startswith(("eager", "sdpa", "flash"))


@contextmanager
def attending(config: Any, attention: str) -> Iterator[None]:
    """Have the models of a config attend in another way, by its name in transformers' `AttentionInterface`."""
    before, config._attn_implementation = config._attn_implementation, attention
    try:
        yield
    finally:
        config._attn_implementation = before


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward pass knows an argument by name."""
    return argument in inspect.signature(model.forward).parameters


def remembering(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as the argument that the model takes it by: newer releases of transformers have another name for it."""
    return {"cache" if takes(model, "cache") else "past_key_values": cache}


def positions(model: Any, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position ids as an argument for a model that takes them; others count by the attention mask."""
    return {"position_ids": position_ids} if takes(model, "position_ids") else {}


def windows(model: Any) -> list[int]:
    """How many tokens the layers of limited sight look back; empty where all layers see everything.

    Among them is the length beyond which rotations of another rate hold for all tokens, those before included.
    """
    config = text_config(model)
    found = [getattr(config, name, None) for name in _WINDOWS]
    rotations = getattr(config, "rope_parameters", None) or {}
    for each in (rotations, *rotations.values()):  # of all layers, or by their kind
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            found.append(each.get("original_max_position_embeddings"))
    return [size for size in found if isinstance(size, int)]


def text_config(model: Any) -> Any:
    """The config of the part that writes text."""
    return model.config.get_text_config(decoder=True)


def kind(model: Any) -> str:
    """What transformers calls the architecture."""
    return model.config.model_type


def checkpoint_layers(model: Any) -> None:
    """Have each layer computed again in the backward pass, in evaluation mode, too.

    transformers does so in training mode alone, which also switches on dropout and other noise.

    Raises:
        ArchitectureError: the model's layers cannot be computed apart.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ArchitectureError(f"A model of type {kind(model)!r} does not support gradient checkpointing; set "
                                "model.gradient_checkpointing=false.")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.forward = _Recomputed(layer, text_config(model))


class _Recomputed:
    """A layer's forward pass whose activations are forgotten; a copy of the layer copies this with it.

    It is computed again with the attention that the model's config named the first time.
    """

    def __init__(self, layer: torch.nn.Module, config: Any) -> None:
        self.layer, self.config = layer, config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See the layer's own `forward`."""
        forward: Callable[..., Any] = type(self.layer).forward.__get__(self.layer)
        if self.layer.training or not torch.is_grad_enabled():  # in training mode transformers does it itself
            return forward(*args, **kwargs)
        again = attending(self.config, self.config._attn_implementation)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)
