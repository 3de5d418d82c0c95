"""One engine of several processes: each samples its share of the requests, and all get all completions.

With our engines, what a request samples depends on its own seed alone, so the number of processes changes nothing but
the time. They need the whole weights; where weights are sharded, `TrlEngine` lets TRL sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from masa_lib.engines import Completion, Engine, EngineError, Reading, Request
from masa_lib.engines.base import to_reading


class SharedEngine:
    """The engine of all processes; every process makes the same calls.

    Args:
        engine: this process's own, over the whole weights.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.prefill_tokens = engine, 0

    def sync(self) -> None:
        """See `Engine.sync`."""
        self.engine.sync()

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Completion]:
        """See `Engine.generate`; distinct prompts are dealt out in turn, so that each is computed in one place."""
        state = PartialState()
        number = {prompt: count for count, prompt in enumerate(dict.fromkeys(request.prompt for request in requests))}
        mine = [row for row, request in enumerate(requests)
                if number[request.prompt] % state.num_processes == state.process_index]
        mine = mine or [0]  # sharded weights compute with all processes or not at all
        found = self.engine.generate([requests[row] for row in mine], progress)
        parts = gather_object([(dict(zip(mine, found, strict=True)), self.engine.prefill_tokens)])
        done = {row: completion for part, _ in parts for row, completion in part.items()}
        self.prefill_tokens = sum(prefill for _, prefill in parts)
        return [done[row] for row in range(len(requests))]

    def read(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int]) -> Reading:
        """See `Engine.read`; distinct prompts are dealt out in turn, as in `generate`."""
        state = PartialState()
        distinct = list(dict.fromkeys(prompts))
        mine = distinct[state.process_index::state.num_processes] or distinct[:1]  # see `generate`
        found = self.engine.read(mine, suffix, choices).logps
        parts = gather_object([(dict(zip(mine, found, strict=True)), self.engine.prefill_tokens)])
        done = {prompt: logps for part, _ in parts for prompt, logps in part.items()}
        self.prefill_tokens = sum(prefill for _, prefill in parts)
        return to_reading(np.stack([done[prompt] for prompt in prompts]))


class TrlEngine:
    """TRL's own sampling as an engine: the way that works on sharded weights.

    A request's seed is not obeyed one by one: the first one's seeds the process's generator for the call. TRL knows
    one temperature, the first one's, and one cap, the largest; the other answers are cut at theirs.

    Args:
        trainer: samples with `generate`, continuous batching or vLLM, as its settings want.
        end_tokens: ids that end an answer.
    """

    def __init__(self, trainer: Any, end_tokens: frozenset[int]) -> None:
        self.trainer, self.prefill_tokens, self._ends = trainer, 0, end_tokens

    def sync(self) -> None:
        """Nothing to do: TRL hands the weights to vLLM before a call that follows an update."""

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Completion]:
        """See `Engine.generate`; log-probs are not reported."""
        trainer, first = self.trainer, requests[0]
        cap = max(request.max_tokens for request in requests)
        if trainer.use_vllm:
            sampler = trainer.vllm_generation
            sampler.temperature, sampler.max_completion_length = first.temperature, cap
            sampler.generation_kwargs |= {"stop_token_ids": sorted(self._ends)}
        else:
            sampler = trainer.generation_config
            sampler.temperature, sampler.max_new_tokens, sampler.eos_token_id = (
                first.temperature, cap, sorted(self._ends))
        torch.manual_seed(first.seed % 2**63)
        rows, _ = trainer._generate_single_turn([list(request.prompt) for request in requests], None, {}, 1)
        if progress is not None:
            progress(len(rows))
        self.prefill_tokens = sum(len(request.prompt) for request in requests)
        return [self._completion(row, request.max_tokens) for row, request in zip(rows, requests, strict=True)]

    def read(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int]) -> Reading:
        """Refused: TRL samples, and reads nothing.

        Raises:
            EngineError: always.
        """
        raise EngineError("On sharded weights TRL samples, and it cannot read the probabilities of chosen "
                          "tokens; sample the predictions (prediction.mode=sampled), or keep the weights whole in each "
                          "process.")

    def _completion(self, row: Sequence[int], cap: int) -> Completion:
        tokens = tuple(row[:cap])
        return Completion(tokens, (math.nan,) * len(tokens), "stop" if tokens[-1] in self._ends else "length")
