"""What keeps an update from ruining a run: memory that runs out halves the micro-batch, and NaN ends the step.

Both act before the optimiser moves, so that weights and moments are always those of a whole update.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from masa_lib.crash_safe_files import logger
from masa_lib.engines import logprobs
from masa_lib.engines.logprobs import Sample
from masa_lib.errors import MasaError, is_out_of_memory

Passed = TypeVar("Passed")


class UpdateError(MasaError, RuntimeError):
    """An update cannot be made; the message says what to change."""


class TokenBudget:
    """The tokens of a micro-batch, halved where memory runs out; what was halved stays so.

    Attributes:
        most: what it came to, also in an earlier life of the run; None: whatever is set.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def within(self, wanted: int) -> int:
        """The budget in force where `wanted` tokens are set."""
        return wanted if self.most is None else min(wanted, self.most)

    def spend(self, passes: Callable[[int], Passed], samples: Sequence[Sample], wanted: int) -> Passed:
        """What the passes over the samples give; out of memory halves the budget and begins all of them again.

        Args:
            passes: forward and backward over all samples, at the budget given. They clear the gradients first: one that
                ends in the middle of a backward pass leaves a part of them.
            samples: of the update.
            wanted: `update.token_budget`.

        Raises:
            UpdateError: one sequence alone is too much.
        """
        budget = self.within(wanted)
        while True:
            try:
                found = passes(budget)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                budget = _half(samples, budget, error)
            else:
                break
            free_memory()  # only here, where the error is gone, does nothing hold the tensors of the passes any more
        if budget < self.within(wanted):
            self.most = budget
            logger.warning("An update ran out of memory; from here on its micro-batches have at most %d tokens instead "
                           "of update.token_budget=%d.", budget, wanted)
        return found


def _half(samples: Sequence[Sample], budget: int, error: Exception) -> int:
    """Half of what the largest micro-batch of several sequences takes, tokens."""
    batches = [batch for batch in logprobs.micro_batches(samples, budget) if len(batch) > 1]
    if not batches:
        longest = max((sample.length for sample in samples), default=0)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UpdateError(f"An update ran out of memory with one sequence at a time, of {longest} tokens at most "
                          f"({reason}); set model.gradient_checkpointing=true, model.lora_rank=32, or lower "
                          "update.logprob_chunk, sampling.solution_tokens or sampling.meta_tokens.") from error
    return max(len(batch) * max(sample.length for sample in batch) for batch in batches) // 2


def free_memory() -> None:
    """Give back what nothing holds any more, and the weights that autocast keeps in another precision."""
    torch.clear_autocast_cache()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # pragma: no cover


def move(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser move the weights; its moments, two numbers a weight, are made at its first step.

    Raises:
        UpdateError: there is no memory for them.
    """
    try:
        optimizer.step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UpdateError("The optimiser ran out of memory for its moments, two float32 numbers for each trained "
                          "weight; set model.lora_rank=32 to train adapters alone, or take a smaller model.") from error


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float, loss: float) -> torch.Tensor:
    """Clip gradients to a norm, and give the norm that they had.

    Args:
        parameters: with their gradients.
        limit: `update.gradient_clip`.
        loss: whose gradients they are.

    Raises:
        UpdateError: norm or loss is not finite; clipping has written it into every gradient by then.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    check_finite(norm.item(), loss)
    return norm


def check_finite(norm: float, loss: float = 0.0) -> None:
    """Refuse an update whose gradient norm or loss is no finite number: the optimiser would write it everywhere.

    Raises:
        UpdateError: says what to change.
    """
    what = " and ".join(f"{name} is {value:g}" for name, value in (
        ("its loss", loss), ("the norm of its gradient", norm)) if not math.isfinite(value))
    if what:
        raise UpdateError(f"The update was left out, so the weights are whole, but {what}, where a finite number is "
                          "needed. Lower update.learning_rate or set model.precision=float32, in a new run.")
