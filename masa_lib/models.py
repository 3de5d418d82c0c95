"""How a model is loaded: its device, its precision, its errors as sentences."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from masa_lib.config import Config, ModelConfig
from masa_lib.tiers import TIERS, resolve


class ModelError(RuntimeError):
    """A model cannot be loaded or used; the message says what to do."""


def pick_device(config: ModelConfig) -> torch.device:
    """The device the config asks for.

    Raises:
        ModelError: when CUDA is asked for and not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no CUDA device; set model.device=cpu or auto.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def load(config: ModelConfig, weights: Path | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        config: name and device.
        weights: a checkpoint's folder to take the weights from instead of the model's own.

    Returns:
        The model in evaluation mode on its device, and its tokenizer.

    Raises:
        ModelError: unknown id, unreadable folder, no tokenizer or no chat template.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for a second of loading break ours

    where = resolve(config.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(weights or where, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(_cannot_load(config.name, where, error)) from error
    if not tokenizer("1")["input_ids"]:  # transformers makes an empty one where the files are missing
        raise ModelError(f"The tokenizer of {config.name!r} knows no token; its files are missing. Save it beside the "
                         "weights (tokenizer.save_pretrained(folder)).")
    if not tokenizer.chat_template:
        raise ModelError(f"The tokenizer of {config.name!r} has no chat template; save one with it "
                         "(tokenizer.chat_template = ...; tokenizer.save_pretrained(folder)) and pass that folder.")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(pick_device(config)).eval(), tokenizer


def prepare(config: Config) -> None:
    """Set torch's threads and seed as the config wants; before anything is loaded."""
    bound_heap()
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    torch.manual_seed(config.seed)


def bound_heap() -> None:
    """Have glibc give large freed blocks back: else aligned tensors of a vocabulary's width pile up on its heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 16 * 2**20)  # M_MMAP_THRESHOLD, bytes; setting it also stops glibc from raising it by itself


def precision(config: ModelConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a model computes; weights and optimiser stay in float32 either way."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The token ids that end an answer."""
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return frozenset([*listed, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])


def _cannot_load(name: str, where: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(where).exists():
        return f"The folder of model {name!r} cannot be loaded: {reason}"
    return (f"The model {name!r} is neither a tier ({', '.join(TIERS)}) nor a folder, and the Hugging Face hub did not "
            f"give it: {reason}")
