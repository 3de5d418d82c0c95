"""An exported run: a folder that others can load, and a card that says what the run recorded."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
import yaml
from small import small
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from masa_lib import cli, config
from masa_lib.config import ModelConfig
from masa_lib.crash_safe_files import RunError
from masa_lib.models import loading, tensors
from masa_lib.models.tensors import ModelError
from masa_lib.runs.folder import Run
from masa_lib.runs.packed import TABLES, PackedStudy
from masa_lib.training import evaluation
from masa_lib.training.drive import train
from masa_lib.training.export import ROWS, ExportError, export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with a change made live and several evaluations."""
    changes = {"evaluation.every": 1, "record.final_model": "float32", "record.checkpoints_kept": 1}
    run = train(small(changes | {"steps": 2}), tmp_path_factory.mktemp("made") / "run", "masa train --seed 0")
    run.append_change(2, {"update.learning_rate": 1e-5})
    return run


@pytest.mark.parametrize("which", ["last", "best"])
def test_the_exported_model_is_the_checkpoint_and_loads_as_any_other(run: Run, tmp_path: Path, which: str) -> None:
    step, folder = run.weights(which)
    assert export(run.path, tmp_path / "out", which) == step
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained, tokenizer = loading.load(run.config.model, folder)
    expected = dict(trained.named_parameters())
    assert {name for name, _ in exported.named_parameters()} == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in exported.named_parameters())
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "Left to right: 3 + 4"}]
    assert loaded.apply_chat_template(asked) == tokenizer.apply_chat_template(asked)
    assert f"after step {step} of a training" in (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    assert not {"optimizer.pt", "state.json"} & {file.name for file in (tmp_path / "out").iterdir()}


def test_the_card_tells_the_facts_that_the_run_recorded(run: Run, tmp_path: Path) -> None:
    export(run.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    told = json.loads((run.path / "environment.json").read_text(encoding="utf8"))
    for fact in ("Base model: `pocket`", "Method: masa", "Steps: 2 of 2", "Seed: 0", "Command: `masa train --seed 0`",
                 f"Commit: {told['git']['commit']}", told["hardware"]["cpu"], f"torch {torch.__version__}",
                 f"{run.metrics()['tokens_solution'].sum():,} solution", "licence", "from_pretrained"):
        assert fact in card, fact
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["masa_lib", "masa"]}
    assert len(run.evaluations()) == 3
    for row in run.evaluations().to_dict("records"):
        interval = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        assert f"| {row['step']} | {row['accuracy']:.3f} ({interval}) |" in card
    settings, changed = re.search(r"```toml\n(.*?)```", card, re.DOTALL)[1].split("# from step 2 on\n")
    assert config.replace(config.Config(), config.flatten(tomllib.loads(settings))) == run.config
    assert tomllib.loads(changed) == {"update": {"learning_rate": 1e-5}}
    assert str(run.path.parent) not in card and str(Path.home()) not in card


def test_a_packed_study_becomes_a_data_set_whose_card_names_each_table(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Path(__file__).parents[1] / "data" / "runs" / "baseline"
    assert cli.main(["export", str(study), "--out", str(tmp_path / "out")]) == 0
    runs = len(PackedStudy(study).runs)
    assert f"the tables of {runs} runs" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    assert f"Recorded trainings: baseline\n\n{runs} runs" in card
    named = {entry["config_name"]: entry["data_files"] for entry in yaml.safe_load(card.split("---")[1])["configs"]}
    assert set(named) == {"metrics", "evaluations", "problems", "rollouts"} < set(ROWS) == set(TABLES)
    for name, file in named.items():
        loaded = datasets.load_dataset(str(tmp_path / "out"), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == len(pd.read_parquet(study / file)) and f"`{name}`: a row is" in card
    assert cli.main(["export", str(study), "--out", str(tmp_path / "out")]) == 1


def test_an_export_needs_an_empty_folder_and_a_run_with_weights(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf8")
    with pytest.raises(ExportError, match="is not empty; choose a new folder with --out"):
        export(run.path, tmp_path)
    with pytest.raises(RunError, match="no run in"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(RunError, match="neither a checkpoint nor a trained model"):
        export(Run.create(tmp_path / "new", small(), "masa train").path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_and_a_record_without_checkpoints_gives_its_model(
        run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = shutil.copytree(run.path, tmp_path / "recorded", ignore=shutil.ignore_patterns("checkpoints"))
    assert cli.main(["export", str(recorded), "--out", str(tmp_path / "out")]) == 0
    assert "step 2" in capsys.readouterr().out
    assert cli.main(["export", str(recorded), "--out", str(tmp_path / "other"), "--checkpoint", "best"]) == 1
    assert "take the last" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 1000


def test_eval_takes_the_best_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    step, folder = run.weights("best")
    expected, _ = evaluation.evaluate_model(run.config_at(step), folder)
    assert cli.main(["eval", "--run", str(run.path), "--checkpoint", "best", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found.pop("run"), found.pop("weights"), found["step"]) == (run.path.name, folder.name, step)
    expected |= {"step": step}
    assert {key: found[key] for key in found if key != "seconds"} == pytest.approx(
        {key: None if expected[key] != expected[key] else expected[key] for key in found if key != "seconds"})


#: tiny models of several kinds: tied and own heads, fused experts, linear maps stored the other way round
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 192}
KINDS = {"llama": SIZES, "qwen3": SIZES | {"head_dim": 8, "tie_word_embeddings": True},
         "qwen3_moe": SIZES | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
         "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
         "glm4_moe": SIZES | {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
                              "head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
         "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 192}}
IDS = torch.tensor([[5, 6, 7, 8, 9, 40, 41, 42, 3, 3, 90, 91]])


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of a tiny random model with the bundled tokenizer."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **KINDS[request.param], **ends))
    model.save_pretrained(tmp_path / "tiny")
    loading.load(ModelConfig())[1].save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|alpha_pattern|rank_pattern).*")
def test_a_merged_model_answers_as_its_adapters_do_experts_and_small_changes_included(
        folder: Path, precision: str) -> None:
    config = ModelConfig(name=str(folder), device="cpu", precision=precision, lora_rank=4)
    model, tokenizer = loading.load(config)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in tensors.adapters(model).values():
            value += 0.002 * torch.randn_like(value)  # as after a few steps: a bfloat16 sum would round it away
    tensors.save(model, tokenizer, folder / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        expected = model.float()(input_ids=IDS).logits
        moved = (expected - plain(input_ids=IDS).logits).abs().mean()
        gap = (expected - merged(input_ids=IDS).logits).abs().mean()
    # Frozen weights in bfloat16 differ from the plain model's; what the adapters add is exact beside that.
    assert moved > 0 and gap < (1e-6 if precision == "float32" else 0.02 * moved)


def test_what_no_gradient_trains_is_written_too_and_not_rounded(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **KINDS["glm4_moe"]))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    biases = model.state_dict()[name].copy_(torch.rand(4))
    tensors.save(model, loading.load(ModelConfig())[1], tmp_path / "out", "bfloat16")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[name], biases)
    assert torch.equal(tensors.checkpoint_weights(model)[name], biases)


def test_a_run_with_adapters_keeps_and_exports_them_in_float32(tmp_path: Path) -> None:
    config = small({"model.lora_rank": 4, "steps": 1, "model.precision": "bfloat16", "evaluation.final_problems": 2})
    run = train(config, tmp_path / "run", "masa train")
    export(run.path, tmp_path / "out")
    for place in (run.path / "model", tmp_path / "out"):
        assert json.loads((place / "config.json").read_text(encoding="utf8"))["dtype"] == "float32"
        assert {value.dtype for value in AutoModelForCausalLM.from_pretrained(place).parameters()} == {torch.float32}
    assert "Weights are safetensors in float32 (low-rank adapters merged in)" in (
        tmp_path / "out" / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("change, message", [
    (lambda weights: weights.pop("model.norm.weight"), "1 missing, such as model.norm.weight"),
    (lambda weights: weights.update(other=torch.zeros(2)), "1 unexpected, such as other"),
    (lambda weights: weights.update({"model.norm.weight": torch.zeros(2)}), "do not fit the model")])
def test_weights_that_are_not_the_models_are_refused_when_they_are_saved(
        tmp_path: Path, change, message: str) -> None:
    model, tokenizer = loading.load(ModelConfig(device="cpu"))
    weights = dict(tensors.policy_weights(model))
    change(weights)
    with pytest.raises(ModelError, match=message):
        tensors.save(model, tokenizer, tmp_path / "out", weights=weights)
