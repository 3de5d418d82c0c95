"""The table of tiers: where models come from, their sizes, and the defaults of a run."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.models import tiers

ROOT = Path(__file__).resolve().parent.parent
QWEN3 = [name for name in tiers.TIERS if name.startswith("qwen3")]
PAPER = sorted((ROOT / "configs").glob("paper-v*.toml"))


def test_the_table_of_tiers_names_all_of_them_without_a_path_of_this_machine() -> None:
    rows = tiers.table()
    assert [row["name"] for row in rows] == ["pocket", "smollm2", *(
        f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b"))]
    assert all(row.keys() == rows[0].keys() and all(row.values()) for row in rows)
    assert not any(Path(row["where"]).is_absolute() for row in rows)


def test_the_table_shows_the_defaults_that_a_run_takes() -> None:
    for row in tiers.table():
        config = tiers.config({"model.name": row["name"]})
        assert (row["G"], row["M"]) == (config.sampling.solutions, config.sampling.predictions)
        assert (row["rate"], row["batch"]) == (config.update.learning_rate, config.update.token_budget)
        assert row["lengths"] == f"{config.sampling.solution_tokens}/{config.sampling.meta_tokens}"
        assert (row["weights"] == "all") == (config.model.lora_rank == 0)
        assert (row["recompute"] == "yes") == config.model.gradient_checkpointing
        assert (row["engine"], row["precision"]) == (config.sampling.engine, config.model.precision)


def test_a_tier_stands_for_a_folder_or_a_hub_id_and_other_names_for_themselves(tmp_path: Path) -> None:
    assert Path(tiers.resolve("pocket")).parts[-2:] == ("data", "pocket")
    assert tiers.resolve("qwen3-8b") == "Qwen/Qwen3-8B-Base"
    assert tiers.resolve("some/model") == "some/model"
    assert tiers.resolve(str(tmp_path)) == str(tmp_path)


def test_every_tier_gives_a_valid_config_and_its_hub_id_has_the_same_defaults() -> None:
    for name, tier in tiers.TIERS.items():
        config = tiers.config({"model.name": name})
        assert all(configs.get(config, key) == value for key, value in tier.settings.items())
        same = tiers.config({"model.name": tier.where})
        assert configs.replace(same, {"model.name": name}) == config


def test_changes_override_a_tier() -> None:
    changed = tiers.config({"model.name": "qwen3-8b", "model.lora_rank": 0, "sampling.solutions": 4})
    assert (changed.model.lora_rank, changed.sampling.solutions, changed.update.warmup_steps) == (0, 4, 20)


# Models that are no tier.

def described(folder: Path, name: str, context: int, **sizes: Any) -> str:
    """A folder with the config of a model, and no weights."""
    place = folder / f"{name}-{context}"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"max_position_embeddings": context, **sizes}), encoding="utf8")
    return str(place)


def llama(hidden: int, layers: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 8,
            "num_key_value_heads": 4, "intermediate_size": 4 * hidden, "vocab_size": vocab, **more}


SIZES = {"toy": llama(64, 2, 100), "small": llama(576, 30, 49152), "middle": llama(2048, 16, 128256),
         "large": llama(4096, 32, 128256),
         "experts": {"model_type": "mixtral", "num_hidden_layers": 8, "hidden_size": 2048, "num_attention_heads": 8,
                     "num_key_value_heads": 4, "intermediate_size": 4096, "vocab_size": 32000, "num_local_experts": 16}}
#: by size: rate, LoRA, precision on CUDA, longest solution at a context without end
WANTED = {"toy": (1e-4, 0, "float32", 512), "small": (5e-5, 0, "bfloat16", 1024),
          "middle": (1e-6, 0, "bfloat16", 8192), "large": (1e-5, 32, "bfloat16", 8192),
          "experts": (1e-5, 32, "bfloat16", 8192)}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_that_is_no_tier_has_the_defaults_of_its_size_and_context(tmp_path: Path, name: str) -> None:
    for context in (2**17, 4096):
        place = described(tmp_path, name, context, **SIZES[name])
        found = tiers.config({"model.name": place}, cuda=True)
        rate, rank, precision, longest = WANTED[name]
        assert (found.update.learning_rate, found.model.lora_rank, found.model.precision) == (rate, rank, precision)
        assert found.sampling.solution_tokens == found.sampling.meta_tokens == min(longest, context // 2)
        assert found.prompt.wording == "paper" and found.prompt.min_length <= found.sampling.solution_tokens
        assert found.update.token_budget >= found.sampling.solution_tokens + 256
        assert tiers.config({"model.name": place}, cuda=False) == configs.replace(found, {"model.precision": "float32"})
    short = tiers.config({"model.name": described(tmp_path, name, 512, **SIZES[name])}, cuda=True)
    assert (short.prompt.wording, short.sampling.solution_tokens) == ("compact", 128)
    assert short.update.learning_rate == rate


@pytest.mark.parametrize("kind, sizes, places", [
    ("llama", {"max_position_embeddings": 700}, 700), ("gpt2", {"n_positions": 700}, 700),
    ("mpt", {"max_seq_len": 700}, 700), ("mamba", {}, None),
    ("gemma3", {"text_config": {"max_position_embeddings": 700}}, 700)])
def test_a_context_has_many_names(kind: str, sizes: dict, places: int | None) -> None:
    assert tiers.context(AutoConfig.for_model(kind, **sizes)) == places


def test_what_is_set_goes_before_the_defaults_of_a_class_and_tiers_have_their_own(tmp_path: Path) -> None:
    place = described(tmp_path, "middle", 2**17, **SIZES["middle"])
    mine = {"update.learning_rate": 3e-4, "prompt.wording": "compact", "model.precision": "float32",
            "sampling.solution_tokens": 77}
    found = tiers.config({"model.name": place, **mine}, cuda=True)
    assert all(configs.get(found, key) == value for key, value in mine.items())
    assert found.sampling.meta_tokens == 8192
    said = tiers.explain(found, cuda=True)
    assert not any(key in said for key in mine) and "sampling.meta_tokens=8192 " in said
    assert re.search(r"no tier .* 1,\d{3} million parameters and context of 131,072 tokens", said) and "\n" not in said
    for name in tiers.TIERS:
        assert tiers.explain(tiers.config({"model.name": name})) == ""
        assert tiers.config({"model.name": name}, cuda=True) == tiers.config({"model.name": name}, cuda=False)


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "abacus"}', '{"model_type": "bert", "vocab_size": -1}'])
def test_a_model_of_unknown_size_has_the_general_defaults_and_that_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf8")
    for name in (str(tmp_path), "some/model"):
        found = tiers.config({"model.name": name})
        assert found == configs.replace(Config(), {"model.name": name})
        assert "its size cannot be read" in tiers.explain(found)


def test_a_wrong_value_is_refused_before_a_models_config_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "model_config", lambda name: pytest.fail("was looked for"))
    with pytest.raises(configs.ConfigError, match="There is no setting 'nonsense'"):
        tiers.config({"model.name": "some/model", "nonsense": 1})


def test_a_solution_and_its_prompt_fit_the_token_budget_of_every_tier() -> None:
    for name in tiers.TIERS:
        config = tiers.config({"model.name": name})
        assert config.update.token_budget > config.sampling.solution_tokens + 256


@pytest.mark.parametrize(("name", "billions"), [
    ("qwen3-0.6b", 0.44), ("qwen3-1.7b", 1.4), ("qwen3-4b", 3.6), ("qwen3-8b", 6.95), ("qwen3-14b", 13.2)])
def test_the_sizes_of_qwen3_give_the_published_parameters_without_embeddings(name: str, billions: float) -> None:
    sizes = tiers.TIERS[name].architecture
    embeddings = sizes.vocab * sizes.hidden * (1 if sizes.tied else 2)
    assert (sizes.parameters - embeddings) / 1e9 == pytest.approx(billions, rel=0.02)


def test_qwen3_takes_the_papers_settings_where_one_gpu_allows_them() -> None:
    (paper,) = (tiers.config(configs.read(file)) for file in PAPER if "v2" in file.name)
    kept = ("steps", "problems.source", "prompt.wording", "sampling.problems", "sampling.solutions",
            "sampling.predictions", "sampling.solution_tokens", "update.warmup_steps", "update.weight_decay",
            "update.clip_high", "evaluation.temperature")
    for name in QWEN3:
        config = tiers.config({"model.name": name})
        assert all(configs.get(config, key) == configs.get(paper, key) for key in kept)
        changed = configs.get(config, "update.learning_rate") != configs.get(paper, "update.learning_rate")
        assert changed == bool(config.model.lora_rank)


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_a_config_of_the_paper_is_valid_and_states_a_source_for_every_number(file: Path) -> None:
    text = file.read_text(encoding="utf8")
    config = tiers.config(configs.read(file))
    assert (config.model.name, config.model.lora_rank, config.sampling.solutions) == ("qwen3-8b", 0, 16)
    assert config.sampling.predictions == (16 if "v1" in file.stem else 8)
    assert config.steps * config.sampling.problems == 40192  # v1, figure 4a: the tasks that GRPO has seen
    words = ("paper", "v1", "v2", "formula", "released", "ours", "the published", "all of AIME")
    for line in text.splitlines():
        if "=" in line and not line.startswith("#") and not line.startswith("final_problems"):
            assert any(word in line.partition("#")[2] for word in words), line
    assert len(PAPER) == 2 and len(configs.flatten(tomllib.loads(text))) > 40
