"""How much memory a training needs, from the model's architecture and the config alone: nothing is loaded.

The plan counts what the loop really holds: weights, gradients and AdamW's two moments through the whole run; keys and
values while it samples; what the backward pass needs at the token budget while it learns. It takes the worst case, in
which every rollout is as long as its cap. What the formulas leave out is in `RUNTIME`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.errors import MasaError
from masa_lib.hub import HubError
from masa_lib.models import tiers
from masa_lib.models.tiers import Architecture

GB = 2**30
#: what CUDA, its libraries and the allocator's gaps take of a GPU, bytes
RUNTIME = GB
#: of a prompt, tokens, by wording: what to expect where the problems are not known yet
PROMPT_TOKENS = {"compact": 64, "paper": 256}
#: sequences that vLLM has to decode together, or its share is wasted
SEQUENCES = 32
#: tokens by which the cache of the in-process engine grows
GROWTH = 64
#: numbers of four bytes that exist together for each of a chunk's logits, by precision
LOGITS_UPDATE = {"float32": 2, "bfloat16": 3}
#: what an allocator takes over what the tensors of an update hold, which come in many sizes
GAPS = 1.1
#: the least that a line of the plan is about, bytes: less would read 0.00 GB
SHOWN = GB // 200
#: share of its parameters by which a model may differ from a decoder of the Llama kind of its sizes
_UNLIKE = 0.1
#: the sizes of the table in docs/reference.md, GB
CARDS = (24, 40, 80, 141)
#: what to try in turn where the memory does not suffice, the mildest first
REMEDIES: tuple[tuple[str, Any], ...] = (
    ("update.logprob_chunk", 512), ("sampling.batch", 128), ("model.gradient_checkpointing", True),
    ("update.token_budget", 4096), ("model.precision", "bfloat16"), ("sampling.batch", 16), ("model.lora_rank", 32),
    ("sampling.engine", "paged"))


class PlanError(MasaError, RuntimeError):
    """A plan cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Plan:
    """Bytes by part: `always` there, while `sampling`, and in the `update` (its backward pass: AdamW needs no more).

    `engine` is what vLLM takes for itself, `engine_needs` the least it works with: its weights, and SEQUENCES sequences
    as long as their cap. `saving` is what the copy takes that is written: one tensor on a GPU, all of it on the CPU.
    """

    parameters: int
    trained: int
    always: Mapping[str, int]
    sampling: Mapping[str, int]
    update: Mapping[str, int]
    engine: int = 0
    engine_needs: int = 0
    saving: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The most that is there at one time, bytes."""
        return sum(self.always.values()) + self.engine + max(
            sum(part.values()) for part in (self.sampling, self.update, self.saving))


@functools.cache
def architecture(name: str) -> Architecture:
    """A model's sizes: from the table of tiers, else from its config, which alone is read.

    Raises:
        PlanError: the config cannot be read, or the model is no dense decoder.
    """
    tier = tiers.find(name)
    if tier:
        return tier.architecture
    try:
        found = tiers.model_config(name).get_text_config()
    except (HubError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(f"The config of model {name!r} cannot be read: {reason} Without a network a plan takes a tier "
                        f"({', '.join(tiers.TIERS)}) or a folder.") from error
    try:
        sizes = Architecture(
            found.num_hidden_layers, found.hidden_size, found.num_attention_heads, found.num_key_value_heads,
            getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads,
            found.intermediate_size, found.vocab_size, found.tie_word_embeddings, found.model_type == "qwen3")
    except AttributeError as error:
        raise PlanError(f"A plan takes dense decoders of the Llama and Qwen kind; {name!r} is a {found.model_type}, "
                        "whose config names other sizes.") from error
    count = tiers.parameters(name)
    if abs(count - sizes.parameters) > _UNLIKE * count:  # 0 is unknown: no weights, no plan
        raise PlanError(f"A plan takes dense decoders of the Llama and Qwen kind; {name!r} is a {found.model_type} of "
                        f"{count / 1e6:,.0f} million parameters, where its sizes make {sizes.parameters / 1e6:,.0f}.")
    return sizes


def plan(config: Config, gpu: float = 0, prompt: int = 0) -> Plan:
    """The memory that a training with this config needs.

    Args:
        config: of the run.
        gpu: of the GPU, GB, of which vLLM takes its share; 0: a training on the CPU.
        prompt: tokens of a prompt; 0: what is usual for the wording.
    """
    sizes, sampling, low = architecture(config.model.name), config.sampling, config.model.precision == "bfloat16"
    prompt = prompt or PROMPT_TOKENS[config.prompt.wording]
    longest = max(sampling.solution_tokens, sampling.meta_tokens if configs.samples_predictions(config) else 0)
    adapters = sizes.adapters(config.model.lora_rank)
    trained = adapters or sizes.parameters
    frozen = sizes.parameters * (2 if low else 4) if adapters else 0
    always = {"weights": trained * 4 + frozen, "gradients": trained * 4, "optimiser": trained * 8}
    casts = {"weights in bfloat16": (adapters or sizes.matrices) * 2} if low else {}
    update = casts | {"activations": _activations(sizes, config, prompt, longest),
                      "log-probs": _logprobs(sizes, config)}
    kept = 4 if not low else 2 if adapters else 3  # bytes a number: rotated keys stay float32 under autocast
    tokens = prompt + longest
    rows = min(sampling.batch, sampling.problems * (sampling.solutions + (
        sampling.predictions if configs.samples_predictions(config) else 0)))
    engine = needs = 0
    if sampling.engine == "vllm":
        copy = sizes.parameters * (2 if low else 4) + sizes.vocab * sizes.hidden * 4  # its head computes in float32
        needs = copy + min(SEQUENCES, rows) * sizes.key_values * tokens * (2 if low else 4) + GB
        engine = int(sampling.gpu_memory * gpu * GB) if gpu else copy + 2 * GB
        casts = {}
    free = max(gpu * GB - sum(always.values()), 0)
    room = free * sampling.gpu_memory if gpu and sampling.engine == "paged" else math.inf
    one = (tokens + GROWTH) * sizes.key_values * kept
    kv = max(int(min(rows * one, room)), one)
    # Each layer copies keys and values: in process for every query head, paged as they are.
    copies = kv // sizes.layers * (1 if sampling.engine == "paged" else sizes.heads // sizes.kv_heads)
    decoding = {} if sampling.engine == "vllm" else casts | {
        "keys and values": kv, "decoding": rows * sizes.vocab * 4 * 2 + max(rows * sizes.vocab * 4 * 2, copies)}
    return Plan(sizes.parameters, trained, always, decoding, update, engine, needs, _saving(sizes, config, gpu))


def _saving(sizes: Architecture, config: Config, gpu: float) -> dict[str, int]:
    """Bytes of the copy of the weights that is written; see `tensors.save`."""
    count = max(*(a * b for a, b in sizes.linears), sizes.vocab * sizes.hidden) if gpu else sizes.parameters
    if config.record.final_model == "none":  # what checkpoints hold is written as it is
        return {}
    if config.model.lora_rank:  # adapters are summed in float32
        return {"merged copy": count * (8 if gpu else 4)}
    return {"copy": count * 2} if config.record.final_model == "bfloat16" else {}


def _activations(sizes: Architecture, config: Config, prompt: int, longest: int) -> int:
    """Bytes that the backward pass of one micro-batch keeps, layer by layer as in transformers' Llama and Qwen3."""
    low, budget = config.model.precision == "bfloat16", max(config.update.token_budget, prompt + longest)
    sequences = budget // (prompt + longest)
    residual = 2 if low and config.model.lora_rank else 4
    if config.model.gradient_checkpointing:
        layers = sizes.layers * sizes.hidden * residual
        return int(GAPS * budget * (layers + 1.5 * _layer(sizes, low, sizes.kv_heads) + 5 * sizes.hidden * residual))
    own = sequences * longest + min(sequences, config.sampling.problems) * prompt
    # Each sequence has its own copy of keys and values, of its mask, and of what the shared prompt's cache holds.
    width = sizes.heads * sizes.head_dim
    shared = sequences * (prompt + longest) * 2 * width * (2 if low else 4)
    mask = sequences * longest * (prompt + longest) * (2 if low else 4)
    # Behind the layers: the last norm's states and their selection, and the gradients of one MLP.
    behind = own * (20 * sizes.hidden + 4 * sizes.intermediate * (2 if low else 4))
    return int(GAPS * (sizes.layers * (own * _layer(sizes, low, 0) + shared + mask) + behind))


def _layer(sizes: Architecture, low: bool, kv_heads: int) -> int:
    """Bytes a token that one layer keeps: norms, projections, attention over `kv_heads` heads, and the gated MLP."""
    queries, keys, norm = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, int(sizes.head_norms)
    if low:  # autocast: float32 around the norms, bfloat16 in the matrix products
        return (20 * sizes.hidden + queries * (4 + 6 * norm) + keys * 6 * norm + 4 * kv_heads * sizes.head_dim
                + 8 * sizes.intermediate)
    return 4 * (6 * sizes.hidden + queries * (2 + 2 * norm) + keys * 2 * norm + 2 * kv_heads * sizes.head_dim
                + 4 * sizes.intermediate)


def _logprobs(sizes: Architecture, config: Config) -> int:
    """Bytes of one chunk's logits with what the backward pass makes of them, and the gradient of the output weights."""
    head = 0 if config.model.lora_rank else sizes.vocab * sizes.hidden * 4
    return config.update.logprob_chunk * sizes.vocab * 4 * LOGITS_UPDATE[config.model.precision] + head


def fits(config: Config, gpu: float) -> bool:
    """Whether a training fits a GPU of so many GB."""
    found = plan(config, gpu)
    return found.peak + RUNTIME <= gpu * GB and found.engine >= found.engine_needs


def remedy(config: Config, gpu: float) -> dict[str, Any] | None:
    """Mild settings that make a training fit; empty where it fits as it is, None where none do."""
    changes: dict[str, Any] = {}
    for step in (None, *REMEDIES):
        if step and _lowers(config, *step):
            changes[step[0]] = step[1]
        found = _with_share(config, changes, gpu)
        if fits(configs.replace(config, found), gpu):
            break
    else:
        return None
    for key in changes:  # what came first may not be needed any more
        less = {name: value for name, value in found.items() if name != key}
        if fits(configs.replace(config, less), gpu):
            found = less
    return found


def _lowers(config: Config, key: str, value: Any) -> bool:
    """Whether a change lowers what this config needs."""
    now = configs.get(config, key)
    if key == "model.lora_rank":
        return not now
    return (value < now if type(value) is int else value != now) and not (
        key == "sampling.batch" and config.sampling.engine == "vllm")


def _with_share(config: Config, changes: dict[str, Any], gpu: float) -> dict[str, Any]:
    """The changes, and where vLLM's share is too small or leaves too little, the least one that it can work with."""
    new = configs.replace(config, changes)
    if new.sampling.engine != "vllm" or fits(new, gpu):
        return dict(changes)
    share = math.ceil(20 * plan(new, gpu).engine_needs / (gpu * GB)) / 20
    return changes | ({"sampling.gpu_memory": share} if share < 0.95 and share != new.sampling.gpu_memory else {})


def text(config: Config, gpu: float = 0) -> str:
    """The plan as a short table with its verdict; see `judge`."""
    return judge(config, gpu)[0]


def judge(config: Config, gpu: float = 0) -> tuple[str, bool]:
    """The plan as a short table with its verdict, and whether the training fits.

    Args:
        config: of the run; which of its settings are guesses, as the model is no tier, is said first.
        gpu: GB; 0: what this computer has, its GPU's memory or, on the CPU, its own.
    """
    on_gpu, size = (True, gpu) if gpu else _here(config)
    found = plan(config, size if on_gpu else 0)
    how = f"LoRA of rank {config.model.lora_rank}" if config.model.lora_rank else "all weights trained"
    guessed = tiers.explain(config, on_gpu)
    lines = [*filter(None, [guessed]),
             f"Memory plan of {config.model.name} ({found.parameters / 1e6:,.0f} million parameters, {how}, "
             f"{config.model.precision}), all numbers in GB:",
             *(_line(what, parts) for what, parts in (
                 ("all the time", {**found.always, "vLLM": found.engine}), ("sampling", found.sampling),
                 ("update", found.update), ("saving", found.saving)) if sum(parts.values()) >= SHOWN)]
    owner = "such a GPU" if gpu else "this computer's GPU" if on_gpu else "this computer"
    verdict = f"  peak {found.peak / GB:.2f} GB of the {size:.0f} GB that {owner} has: "
    if found.peak + (RUNTIME if on_gpu else 0) <= size * GB and (not on_gpu or found.engine >= found.engine_needs):
        return "\n".join([*lines, verdict + "fits."]), True
    changes = remedy(config, size) if on_gpu else None
    advice = f"It does with --set {_settings(changes)}." if changes else "Take a smaller model or lower the lengths."
    return "\n".join([*lines, f"{verdict}does not fit. {advice}"]), False


def _here(config: Config) -> tuple[bool, float]:
    """Whether this computer trains on a GPU, and the GB it has for that."""
    import psutil
    import torch

    if config.model.device != "cpu" and torch.cuda.is_available():
        return True, torch.cuda.get_device_properties(0).total_memory / GB  # pragma: no cover
    return False, psutil.virtual_memory().total / GB


def _line(what: str, parts: Mapping[str, int]) -> str:
    shown = " + ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    return f"  {what} {sum(parts.values()) / GB:.2f}: {shown}"


def _settings(changes: Mapping[str, Any]) -> str:
    return " ".join(configs.assignments(changes))


def table(cards: tuple[int, ...] = CARDS) -> str:
    """All tiers on GPUs of several sizes, as Markdown: the peak in GB, and what has to be set for it to fit."""
    rows = ["| tier | " + " | ".join(f"{card} GB" for card in cards) + " |", "|---|" + "---|" * len(cards)]
    for name in tiers.TIERS:
        config, cells = tiers.config({"model.name": name}), []
        for card in cards:
            changes = remedy(config, card)
            settings = "" if not changes else " with `" + _settings(changes) + "`"
            cells.append("no" if changes is None else
                         f"{plan(configs.replace(config, changes), card).peak / GB:.1f}{settings}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
