"""Sampling with the policy itself through the continuous batching of transformers: paged keys and values.

A new request takes a finished one's place at once, and memory is shared out in blocks, so long and short answers mix
well. A manager lives for one call: one that outlives an optimiser step would go on with the old weights' blocks. It
works in a thread of its own, where the caller's autocast does not reach: `_Policy` takes it there. Sampling is that of
the in-process engine (one seed a request, inverse of the cumulative distribution), done by a logits processor that
leaves the manager only the sampled token to choose. There is no copy of the weights, hence nothing to synchronise.
The manager tells the probability of sampled tokens only, so a reading is the in-process engine's forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from masa_lib.engines.base import (
    Completion,
    EngineError,
    Reading,
    Request,
    Watch,
    check_requests,
    context_of,
    explain_memory,
    kv_bytes,
)
from masa_lib.engines.in_process import TransformersEngine, inverse_cdf, to_completions, uniforms
from masa_lib.errors import is_out_of_memory
from masa_lib.models import architecture

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what fails is raised as an EngineError

#: tokens of a block of keys and values
_BLOCK = 32
#: tokens computed at once, at least: prompts are cut into pieces of this length
_CHUNK = 512


class PagedEngine:
    """The engine over transformers' continuous batching.

    Args:
        model: a causal language model; it is used as it is at each call.
        end_tokens: ids that end an answer.
        batch: sequences decoded together, at most.
        memory: share of the free memory that keys and values may take.
    """

    def __init__(self, model: Any, end_tokens: Iterable[int], *, batch: int = 512, memory: float = 0.4) -> None:
        self.model, self.batch, self.memory, self.prefill_tokens = model, batch, memory, 0
        self._ends = sorted(end_tokens)

    def sync(self) -> None:
        """Nothing to do: the policy itself samples."""

    def generate(self, requests: Sequence[Request], progress: Watch | None = None) -> list[Completion]:
        """Sample every request; see `Engine.generate`."""
        check_requests(requests, context_of(self, self.model))
        self.prefill_tokens = sum(len(request.prompt) for request in requests)
        device = self.model.device
        with explain_memory(), torch.random.fork_rng([device] if device.type == "cuda" else []):  # it seeds torch
            sampler = _Sampler(requests, self.batch, device)
            manager = ContinuousMixin.init_continuous_batching(
                _Policy(self.model, sampler), GenerationConfig(do_sample=False, eos_token_id=self._ends),
                ContinuousBatchingConfig(
                    block_size=_BLOCK, num_blocks=self._blocks(requests), max_memory_percent=1.0, seed=0,
                    max_batch_tokens=max(_CHUNK, self.batch), max_requests_per_batch=self.batch,
                    allow_block_sharing=False, use_async_batching=False, use_cuda_graph=False))
            manager.logit_processor.tensors_required = 1  # the sampler's rows: it counts its own kinds only
            for row, request in enumerate(requests):
                manager.add_request(list(request.prompt), str(row), request.max_tokens, row=row)
            manager.start()
            try:
                rows = self._collect(manager, len(requests), progress)
            finally:
                manager.stop(hard_stop=True)
        lengths = [len(tokens) for tokens in rows]
        return to_completions(rows, sampler.logps_BT[:-1].tolist(), lengths,
                              [tokens[-1] in self._ends for tokens in rows])

    def read(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int]) -> Reading:
        """Read the next token's probabilities; see `Engine.read`. No prompt stays computed."""
        reader = TransformersEngine(self.model, self._ends, batch=self.batch)
        reading = reader.read(prompts, suffix, choices)
        self.prefill_tokens = reader.prefill_tokens
        return reading

    def _collect(self, manager: Any, count: int, progress: Watch | None) -> list[list[int]]:
        """Wait for every request's tokens."""
        done: dict[str, list[int]] = {}
        while len(done) < count:
            result = manager.get_result(timeout=1)
            error = result.error if result else None if manager.is_running() else "its thread ended."
            if error:
                raise (MemoryError(error) if is_out_of_memory(RuntimeError(error)) else
                       EngineError(f"The paged engine failed: {error.strip().splitlines()[0]}"))
            if result and result.is_finished():
                done[result.request_id] = result.generated_tokens
                if progress is not None:
                    progress(1, len(result.generated_tokens))
        return [done[str(row)] for row in range(count)]

    def _blocks(self, requests: Sequence[Request]) -> int:
        """Blocks of the cache: for the longest requests that decode together, or what fits.

        Raises:
            EngineError: not even the longest request fits.
        """
        model = self.model
        free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
        dtype = _dtype(model)
        fits = int(self.memory * free / (_BLOCK * kv_bytes(architecture.text_config(model), dtype.itemsize)))
        # The scheduler takes a block more than it fills.
        needs = sorted(((len(r.prompt) + r.max_tokens) // _BLOCK + 2 for r in requests), reverse=True)
        if needs[0] > fits:
            raise EngineError(f"The longest request needs {needs[0] * _BLOCK} tokens of keys and values, but "
                              f"{self.memory:.0%} of the free memory holds {fits * _BLOCK}; lower the caps or raise "
                              "sampling.gpu_memory.")
        return min(sum(needs[:self.batch]), fits)


class _Policy:
    """The model as the manager's thread sees it: under the caller's autocast, with our sampler."""

    def __init__(self, model: Any, sampler: _Sampler) -> None:
        self._model, self._sampler, self.dtype = model, sampler, _dtype(model)
        self._autocast = torch.is_autocast_enabled(model.device.type)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, cache: Any, **batch: Any) -> Any:
        """The model's forward pass."""
        with torch.autocast(self._model.device.type, self.dtype, enabled=self._autocast):
            return self._model(cache=_Cache(cache), **batch)

    def eval(self) -> _Policy:
        """Nothing to do: the trainer keeps the model in evaluation mode while it samples."""
        return self

    def _get_logits_processor(self, _: GenerationConfig) -> list[Any]:
        return [self._sampler]


class _Cache:
    """A paged cache that takes keys and values in any precision: under autocast they come in two."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *where: Any, **more: Any) -> Any:
        """Append states; see `PagedAttentionCache.update`."""
        dtype = self._cache.dtype
        return self._cache.update(key_states.to(dtype), value_states.to(dtype), *where, **more)


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Draw each request's next token from its own seed and leave only that token possible; keep its log-prob."""

    supported_kwargs = {"row": int}  # noqa: RUF012 (the base class's form)
    ignored_kwargs = ()

    def __init__(self, requests: Sequence[Request], batch: int, device: torch.device) -> None:
        count, longest = len(requests), max(request.max_tokens for request in requests)
        self._batch, self._spare = batch, count  # a row for the batch's places that get no token
        self._uniform_BT = torch.zeros(count + 1, longest, device=device)
        self._uniform_BT[:count] = torch.from_numpy(uniforms(requests, longest))
        self._temperature_B1 = torch.tensor([[request.temperature] for request in requests] + [[1.0]], device=device)
        self._step_B = torch.zeros(count + 1, dtype=torch.long, device=device)
        self.logps_BT = torch.zeros(count + 1, longest, device=device)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Places without a request belong to the spare row."""
        int32_tensor.fill_(self._spare)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """The rows of the requests that get a token now; prompts cut short leave places behind them."""
        rows = [request.state.logit_processor_kwargs["row"] for request in requests_with_new_token]
        return torch.tensor(rows + [self._spare] * (self._batch - len(rows)), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Logits in, shape (tokens, vocabulary); 0 for the sampled tokens and minus infinity elsewhere out."""
        rows = tensor_arg[:len(scores)].long()
        step = self._step_B[rows] % self.logps_BT.shape[1]  # the spare row's steps have no end
        logps = torch.log_softmax(scores / self._temperature_B1[rows], dim=-1)
        token = inverse_cdf(logps, self._uniform_BT[rows, step])[:, None]
        self.logps_BT[rows, step] = logps.gather(1, token)[:, 0]
        self._step_B[rows] = step + 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _dtype(model: Any) -> torch.dtype:
    """The precision in which the model computes here: the caller's autocast, or that of the weights."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
