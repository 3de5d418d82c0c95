"""Which engine a config's `sampling.engine` means: the one place where a new one is entered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from masa_lib.config import ENGINES, Config
from masa_lib.engines.base import Engine


def _transformers(model: Any, ends: frozenset[int], *, batch: int, **others: Any) -> Engine:
    from masa_lib.engines.in_process import TransformersEngine

    return TransformersEngine(model, ends, batch=batch)


def _paged(model: Any, ends: frozenset[int], *, batch: int, memory: float, **others: Any) -> Engine:
    from masa_lib.engines.paged import PagedEngine

    return PagedEngine(model, ends, batch=batch, memory=memory)


def _vllm(model: Any, ends: frozenset[int], *, batch: int, precision: str, memory: float, options: str) -> Engine:
    from masa_lib.engines.vllm import VllmEngine

    return VllmEngine(model, ends, batch=batch, precision=precision, memory=memory, options=options)


#: by name, what makes an engine of a policy and the ids that end an answer; the other arguments are `make_engine`'s
MAKERS: dict[str, Callable[..., Engine]] = {"transformers": _transformers, "paged": _paged, "vllm": _vllm}


def register(name: str, about: str, make: Callable[..., Engine]) -> None:
    """Enter an engine, which `sampling.engine` then takes.

    Args:
        name: of the engine.
        about: a sentence.
        make: see MAKERS.
    """
    MAKERS[name], ENGINES[name] = make, about


def load_policy(config: Config, checkpoint: Path | None = None) -> tuple[Any, Any, Engine]:
    """The model of a config, its tokenizer and the engine that samples for it; seeds and threads are set first.

    Args:
        config: of the run.
        checkpoint: a folder to take the weights from, such as a run's checkpoint.

    Raises:
        ModelError, EngineError: one of them cannot be had; see `loading.load` and `make_engine`.
    """
    from masa_lib.models import loading

    loading.prepare(config)
    model, tokenizer = loading.load(config.model, checkpoint)
    return model, tokenizer, engine_of(config, model, tokenizer)


def engine_of(config: Config, model: Any, tokenizer: Any) -> Engine:
    """The engine that a config asks for; see `make_engine`."""
    sampling = config.sampling
    return make_engine(sampling.engine, model, tokenizer, batch=sampling.batch, precision=config.model.precision,
                       memory=sampling.gpu_memory, end_tokens=sampling.end_tokens, options=sampling.vllm)


def make_engine(name: str, model: Any, tokenizer: Any, *, batch: int, precision: str = "float32",
                memory: float = 0.4, end_tokens: str = "", options: str = "") -> Engine:
    """The engine that samples for a policy.

    Args:
        name: `sampling.engine`.
        model: the policy, on its device.
        tokenizer: of the model.
        batch: sequences decoded together, at most.
        precision: of an engine's own copy of the weights; engines without one compute as they are called.
        memory: `sampling.gpu_memory`.
        end_tokens: `sampling.end_tokens`.
        options: `sampling.vllm`.

    Raises:
        ModelError: an end token that is no token.
        EngineError: the engine is not installed, or its memory does not suffice.
    """
    from masa_lib.models import loading

    ends = loading.end_tokens(model, tokenizer, end_tokens)
    return MAKERS[name](model, ends, batch=batch, precision=precision, memory=memory, options=options)
