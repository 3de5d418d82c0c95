"""The table of tiers: where models come from, their sizes, and the defaults of a run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from masa_lib import config as configs
from masa_lib import tiers
from masa_lib.config import Config

ROOT = Path(__file__).resolve().parent.parent
QWEN3 = [name for name in tiers.TIERS if name.startswith("qwen3")]
PAPER = sorted((ROOT / "configs").glob("paper-*.toml"))


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


def test_changes_override_a_tier_and_no_tier_means_the_general_defaults() -> None:
    changed = tiers.config({"model.name": "qwen3-8b", "model.lora_rank": 0, "sampling.solutions": 4})
    assert (changed.model.lora_rank, changed.sampling.solutions, changed.update.warmup_steps) == (0, 4, 20)
    assert tiers.config({"model.name": "some/model"}) == configs.replace(Config(), {"model.name": "some/model"})


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
