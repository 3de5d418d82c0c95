"""The session and the recipe for a GPU, on the CPU in small: known to work before a GPU is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from masa_lib import config as configs
from masa_lib.config import ModelConfig
from masa_lib.models import loading, tiers
from masa_lib.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_stage_of_the_gpu_session_runs_on_the_cpu_and_records_what_it_found(tmp_path: Path) -> None:
    done = subprocess.run(["bash", "benchmarks/gpu_session/run.sh"], cwd=ROOT, capture_output=True, text=True,
                          check=False, env=os.environ | {"DRY": "1", "OUT": str(tmp_path), "PY": sys.executable})
    rows = [json.loads(line) for line in (tmp_path / "session.jsonl").read_text(encoding="utf8").splitlines()]
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = {row["what"]: row for row in rows}
    for engine in ("transformers", "paged"):
        exact = found[f"parity {engine} float32"]
        assert exact["mean_gap"] < 1e-4 and exact["after_update"] < 1e-4 < exact["stale_would_be"]
        assert exact["repeats"] and exact["same_as_cpu"] == exact["of"]
    assert all(found[f"gradients float32 {how}"]["relative_error"] < 1e-4 for how in ("shared", "whole"))
    assert {row["what"].split()[1] for row in rows if row["what"].startswith("training")} == {
        "grpo", "masa", "masa-efficient", "masa-read"}
    assert found["resume"]["code"] == 0 and found["resume"]["first_step_that_differs"] == 0
    for name in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-8b"):
        assert sum(row["what"].startswith(name) for row in rows) == 7


@pytest.mark.slow
def test_the_recipe_for_one_gpu_trains_three_steps_of_each_method_on_a_tiny_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = loading.load(ModelConfig())[1]
    Qwen3ForCausalLM(Qwen3Config(vocab_size=192, hidden_size=16, intermediate_size=32, num_attention_heads=2,
                                 num_hidden_layers=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
                                 max_position_embeddings=4096)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{number} + 1 =", "answer": str(number + 1)}) + "\n"
                                for number in range(48)), encoding="utf8")
    recipe = tiers.config(configs.read(ROOT / "configs" / "one-gpu-1.7b.toml"), cuda=True)
    assert (recipe.sampling.problems, recipe.sampling.solutions, recipe.sampling.solution_tokens) == (32, 8, 2048)
    tiny = {"model.name": str(tmp_path / "tiny"), "model.device": "cpu", "model.threads": 1, "steps": 3,
            "problems.source": str(problems), "problems.evaluation_source": str(problems), "sampling.problems": 8,
            "sampling.engine": "transformers", "sampling.solution_tokens": 24, "sampling.meta_tokens": 24}
    for method in ("grpo", "masa", "masa-read"):
        trainer = Trainer(configs.replace(recipe, tiny | {"method": method}))
        rows = [trainer.train_step()[1] for _ in range(3)]
        assert [row["step"] for row in rows] == [1, 2, 3] and all(row["tokens_solution"] > 0 for row in rows)
