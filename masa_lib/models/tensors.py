"""The tensors of a model: which are trained, what adapters add to others, and how a folder of them is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from masa_lib import crash_safe_files as files
from masa_lib.config import Config, ModelConfig
from masa_lib.errors import MasaError

#: the file of a checkpoint's adapters
ADAPTERS = "adapters.safetensors"
#: the adapters' product counts this over their rank
LORA_ALPHA = 32.0


class ModelError(MasaError, RuntimeError):
    """A model cannot be loaded or used; the message says what to do."""


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the first tensor that holds NaN or infinity; empty where none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not torch.stack(
                torch.aminmax(tensor.detach())).isfinite().all():
            return name
    return ""


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


def add_adapters(model: Any, config: ModelConfig, weights: Path | None) -> list[str]:
    """Put trainable low-rank adapters, float32, on all linear layers but the output's, and freeze the rest.

    Returns:
        The adapters that `weights` lacks.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import load_file

    inject_adapter_in_model(
        LoraConfig(r=config.lora_rank, lora_alpha=LORA_ALPHA, target_modules="all-linear"), model)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    if not weights:
        return []
    found = load_file(weights / ADAPTERS)
    unknown = model.load_state_dict(found, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{ADAPTERS} has adapters that the model has no place for, such as {unknown[0]}.")
    return sorted(adapters(model).keys() - found.keys())


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


def final_precision(config: Config) -> str:
    """The precision of a run's trained model, `none` for no such model; merged adapters are kept in float32."""
    wanted = config.record.final_model
    return "float32" if config.model.lora_rank and wanted != "none" else wanted


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
        with quiet():
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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and tables of weights off the screen: what they say comes as one sentence."""
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.disable_progress_bar()  # its bars for a second of loading break ours
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(said)
