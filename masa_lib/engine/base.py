"""What every engine does: take requests as token ids, give completions as token ids with their log-probs.

An engine knows nothing of problems or rewards. A request carries its own cap and seed, so that one call can serve both
streams of a step and every problem can have its own limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from masa_lib.errors import MasaError


class EngineError(MasaError, RuntimeError):
    """Requests an engine cannot serve; the message says what to change."""


@dataclass(frozen=True)
class Request:
    """One sequence to sample.

    `prompt`: token ids. `max_tokens`: cap, end token included. `seed`: of this sequence alone. `temperature`: above 0.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Completion:
    """One sampled sequence.

    `tokens`: ids, the end token included. `logps`: natural log-probabilities of the tokens at the request's
    temperature. `finish`: `stop` after an end token, `length` at the cap.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finish: str


class Engine(Protocol):
    """The one interface of every back-end."""

    #: prompt tokens computed by the last call (a prompt shared by several requests counts once where it is shared)
    prefill_tokens: int

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Completion]:
        """Sample every request; completions in the order of the requests.

        Args:
            requests: not empty.
            progress: called with the number of newly finished requests.

        Raises:
            EngineError: an empty list, an empty prompt, a prompt that does not fit the context, or no memory left.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's current weights; called after every optimiser step."""
        ...


def check_requests(requests: Sequence[Request], context: int) -> None:
    """Refuse what no engine can serve.

    Raises:
        EngineError: says which request and what to change.
    """
    if not requests:
        raise EngineError("There are no requests to sample; give at least one.")
    for number, request in enumerate(requests):
        if not request.prompt or request.max_tokens < 1 or request.temperature <= 0:
            raise EngineError(f"Request {number} has a prompt of {len(request.prompt)} tokens, max_tokens "
                              f"{request.max_tokens} and temperature {request.temperature}; all must be above 0.")
        if len(request.prompt) + request.max_tokens > context:
            raise EngineError(f"Request {number} needs {len(request.prompt)} prompt + {request.max_tokens} new tokens, "
                              f"but the model's context is {context}; shorten the problem or lower max_tokens.")


@contextmanager
def explain_memory() -> Iterator[None]:
    """Turn the many ways to run out of memory into one.

    Raises:
        EngineError: says what to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own out-of-memory error is a RuntimeError
        if isinstance(error, EngineError) or not (isinstance(error, MemoryError) or "memory" in str(error)):
            raise
        raise EngineError(f"Sampling ran out of memory ({str(error).strip().splitlines()[0]}); lower sampling.batch or "
                          "the caps.") from error


def kv_bytes(config: Any, itemsize: int) -> int:
    """Bytes of keys and values a token: two states of every layer's key-value heads, `itemsize` bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * itemsize


def make_engine(name: str, model: Any, tokenizer: Any, *, batch: int, precision: str = "float32",
                memory: float = 0.4) -> Engine:
    """The engine that samples for a policy.

    Args:
        name: `sampling.engine`.
        model: the policy, on its device.
        tokenizer: of the model.
        batch: sequences decoded together, at most.
        precision: of an engine's own copy of the weights; engines without one compute as they are called.
        memory: `sampling.gpu_memory`.

    Raises:
        EngineError: the engine is not installed, or its memory does not suffice.
    """
    from masa_lib import models

    ends = models.end_tokens(model, tokenizer)
    if name == "vllm":
        from masa_lib.engine.vllm_engine import VllmEngine

        return VllmEngine(model, ends, batch=batch, precision=precision, memory=memory)
    if name == "paged":
        from masa_lib.engine.paged import PagedEngine

        return PagedEngine(model, ends, batch=batch, memory=memory)
    from masa_lib.engine.in_process import TransformersEngine

    return TransformersEngine(model, ends, batch=batch)
