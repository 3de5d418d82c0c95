"""Tiers and loading, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small import MODEL, small

from masa_lib import models, tiers
from masa_lib.config import ModelConfig
from masa_lib.models import ModelError

FOLDER = Path(tiers.resolve(MODEL))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The bundled model in a folder of its own."""
    return Path(shutil.copytree(FOLDER, tmp_path / "mine"))


def load(name: str | Path, **changes):
    return models.load(ModelConfig(name=str(name), device="cpu", **changes))


def test_the_table_of_tiers_names_all_of_them_without_a_path_of_this_machine() -> None:
    rows = tiers.table()
    names = [row["name"] for row in rows]
    assert names == ["pocket", "smollm2", *(f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b"))]
    assert all(set(row) == {"name", "where", "about", "hardware"} and all(row.values()) for row in rows)
    assert not any(Path(row["where"]).is_absolute() for row in rows)


def test_a_tier_stands_for_a_folder_or_a_hub_id_and_other_names_for_themselves(tmp_path: Path) -> None:
    assert Path(tiers.resolve("pocket")).parts[-2:] == ("data", "pocket")
    assert tiers.resolve("qwen3-8b") == "Qwen/Qwen3-8B-Base"
    assert tiers.resolve("some/model") == "some/model"
    assert tiers.resolve(str(tmp_path)) == str(tmp_path)


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
    model.save_pretrained(copy / "checkpoint")
    loaded, _ = models.load(ModelConfig(name=str(copy), device="cpu"), copy / "checkpoint")
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


def test_a_tokenizer_without_chat_template_is_refused_with_what_to_do(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template; save one with it"):
        load(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ModelError, match=r"model\.device is cuda"):
        models.pick_device(ModelConfig(device="cuda"))
    assert models.pick_device(ModelConfig(device="auto")).type == "cpu"


def test_end_tokens_are_those_of_the_generation_config_and_of_the_tokenizer() -> None:
    model, tokenizer = load(FOLDER)
    end = tokenizer.eos_token_id
    assert models.end_tokens(model, tokenizer) == {end}
    model.generation_config.eos_token_id = [7, 9]
    assert models.end_tokens(model, tokenizer) == {7, 9, end}
    model.generation_config.eos_token_id = None
    assert models.end_tokens(model, tokenizer) == {end}
    tokenizer.eos_token = None
    assert models.end_tokens(model, tokenizer) == frozenset()


def test_prepare_sets_seed_and_threads() -> None:
    before = torch.get_num_threads()
    try:
        models.prepare(small({"model.threads": 2, "seed": 5}))
        assert torch.get_num_threads() == 2
        first = torch.rand(3)
        models.prepare(small({"model.threads": 0, "seed": 5}))
        assert torch.get_num_threads() == 2
        assert torch.equal(first, torch.rand(3))
    finally:
        torch.set_num_threads(before)


def test_precision_is_that_of_the_computation_alone() -> None:
    model, _ = load(FOLDER)
    for name in ("float32", "bfloat16"):
        with models.precision(ModelConfig(precision=name), model.device):
            assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == getattr(torch, name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
