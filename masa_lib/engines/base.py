"""What every engine does: take requests as token ids, give completions as token ids with their log-probs.

It also reads: what the model would say next, as probabilities, without a token sampled.

An engine knows nothing of problems or rewards. A request carries its own cap and seed, so that one call can serve both
streams of a step and every problem can have its own limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from masa_lib.errors import MasaError, is_out_of_memory
from masa_lib.models import tiers

#: is told of newly finished requests and of newly sampled tokens, two numbers
Watch = Callable[[int, int], Any]


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


@dataclass(frozen=True)
class Reading:
    """What a model would say next, limited to a few choices; P prompts, C choices.

    `logps`: (P, C), float32, natural log-probabilities at temperature 1 under the whole vocabulary, not made to add up.
    `outside`: (P,), float32, probability of all other tokens together.
    """

    logps: np.ndarray
    outside: np.ndarray


class Engine(Protocol):
    """The one interface of every back-end."""

    #: prompt tokens computed by the last call (a prompt shared by several requests counts once where it is shared)
    prefill_tokens: int

    def generate(self, requests: Sequence[Request], progress: Watch | None = None) -> list[Completion]:
        """Sample every request; completions in the order of the requests.

        Args:
            requests: not empty.
            progress: is told meanwhile; of some engines tokens only with their request.

        Raises:
            EngineError: an empty list, an empty prompt, a prompt that does not fit the context, or no memory left.
        """
        ...

    def read(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int]) -> Reading:
        """Read the next token's probabilities, without sampling it.

        Until the next `sync`, a `generate` from prompts of the last reading need not compute them again.

        Args:
            prompts: not empty; a prompt that is there twice is computed once.
            suffix: token ids behind every prompt, the forced beginning of an answer; may be empty.
            choices: the token ids whose log-probabilities are wanted, all different.

        Raises:
            EngineError: no prompts, an empty prompt, one that does not fit the context, choices that are none, double
                or not in the vocabulary, or no memory left.
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


def check_reading(prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int], context: int,
                  vocabulary: int) -> None:
    """Refuse what no engine can read; the token that is read must have a place in the context, too.

    Raises:
        EngineError: says what to change.
    """
    if not prompts:
        raise EngineError("There are no prompts to read; give at least one.")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise EngineError(f"Prompt {number} of a reading is empty; it must have at least one token.")
        if len(prompt) + len(suffix) + 1 > context:
            raise EngineError(f"Reading {number} needs {len(prompt)} prompt + {len(suffix)} forced + 1 read tokens, "
                              f"but the model's context is {context}; shorten the problem.")
    if not choices or len(set(choices)) < len(choices) or min(choices) < 0 or max(choices) >= vocabulary:
        raise EngineError(f"The choices of a reading are {list(choices)}; they must be at least one token id, all "
                          f"different, from 0 to {vocabulary - 1}.")


def to_reading(logps_PC: np.ndarray) -> Reading:
    """A reading from the log-probabilities of its choices; what they leave of 1 lies outside."""
    logps_PC = np.asarray(logps_PC, dtype=np.float32)
    outside_P = 1 - np.exp(logps_PC.astype(np.float64)).sum(axis=1)
    return Reading(logps_PC, outside_P.clip(0, 1).astype(np.float32))


def context_of(engine: Engine | None, model: Any) -> int:
    """How many tokens of prompt and completion an engine (None: any) takes for a model."""
    if llm := getattr(engine, "llm", None):  # vLLM takes what its memory has room for
        return llm.model_config.max_model_len
    return tiers.context(model.config) or 1 << 30


@contextmanager
def explain_memory() -> Iterator[None]:
    """Turn the many ways to run out of memory into one.

    Raises:
        EngineError: says what to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, EngineError) or not is_out_of_memory(error):
            raise
        raise EngineError(f"Sampling ran out of memory ({str(error).strip().splitlines()[0]}); lower sampling.batch or "
                          "the caps.") from error


def kv_bytes(config: Any, itemsize: int) -> int:
    """Bytes of keys and values a token: two states of every layer's key-value heads, `itemsize` bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * itemsize
