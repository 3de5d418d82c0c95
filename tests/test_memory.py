"""The memory plan: its arithmetic, its verdicts and its sentences; nothing is downloaded and no weights are loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from masa_lib import cli
from masa_lib import config as configs
from masa_lib.config import Config, ModelConfig
from masa_lib.models import loading, memory, tensors, tiers
from masa_lib.models.memory import GB, PlanError
from masa_lib.runs.folder import Run


def config(name: str = "qwen3-1.7b", **changes: object) -> Config:
    """A tier's config with changes, dots written as two underscores."""
    return configs.replace(tiers.config({"model.name": name}),
                           {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("name", ["pocket", "smollm2"])
def test_the_sizes_in_the_table_are_those_of_the_real_model(name: str) -> None:
    facts = tiers.TIERS[name].architecture
    assert memory.architecture(loading.folder(name)) == facts
    model, _ = loading.load(ModelConfig(name=name, device="cpu"))
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert facts.matrices == sum(module.weight.numel() for module in linears)


def test_the_adapters_that_are_planned_are_those_that_are_trained() -> None:
    model, _ = loading.load(ModelConfig(device="cpu", lora_rank=4))
    found = memory.plan(config("pocket", model__lora_rank=4))
    assert found.trained == sum(parameter.numel() for parameter in tensors.trainable(model))
    assert found.always == {"weights": (found.parameters + found.trained) * 4, "gradients": found.trained * 4,
                            "optimiser": found.trained * 8}


def test_training_all_weights_holds_sixteen_bytes_a_parameter() -> None:
    found = memory.plan(config())
    assert found.trained == found.parameters
    assert sum(found.always.values()) == 16 * found.parameters
    assert found.peak == 16 * found.parameters + found.engine + sum(found.update.values())


def test_lora_in_bfloat16_holds_two_bytes_a_frozen_parameter() -> None:
    found = memory.plan(config(model__lora_rank=8))
    assert found.always["weights"] == 2 * found.parameters + 4 * found.trained
    assert found.trained < found.parameters / 100


def test_the_engine_in_process_holds_keys_and_values_of_a_full_batch_and_paged_those_that_fit() -> None:
    sizes = tiers.TIERS["smollm2"].architecture
    found = memory.plan(config("smollm2", sampling__batch=10, sampling__solution_tokens=100), prompt=36)
    assert found.sampling["keys and values"] == 10 * (36 + 100 + memory.GROWTH) * sizes.layers * 2 * 3 * 64 * 4
    paged = config("qwen3-4b", sampling__engine="paged", sampling__batch=512, sampling__gpu_memory=0.4)
    assert memory.plan(paged, 80).sampling["keys and values"] < 0.4 * 80 * GB < memory.plan(paged).sampling[
        "keys and values"]


def test_vllm_takes_its_share_of_the_gpu_and_needs_its_weights_and_32_sequences() -> None:
    run, sizes = config("qwen3-8b"), tiers.TIERS["qwen3-8b"].architecture
    found = memory.plan(run, 80)
    assert found.engine == 0.4 * 80 * GB and not found.sampling
    sequence = sizes.key_values * 2 * (256 + 8192)
    assert found.engine_needs == 2 * sizes.parameters + 4 * sizes.vocab * sizes.hidden + 32 * sequence + GB
    few = memory.plan(config("qwen3-8b", sampling__batch=5), 80)
    assert few.engine_needs == found.engine_needs - 27 * sequence  # no more than decode together
    enough = found.engine_needs / (141 * GB)
    assert memory.fits(config("qwen3-8b", sampling__gpu_memory=enough + 0.01), 141)
    assert not memory.fits(config("qwen3-8b", sampling__gpu_memory=enough - 0.01), 141)


def test_the_copy_that_is_written_is_one_tensor_on_a_gpu_and_a_whole_model_on_the_cpu() -> None:
    sizes = tiers.TIERS["qwen3-14b"].architecture
    run = config("qwen3-14b", sampling__engine="paged")
    largest = sizes.vocab * sizes.hidden
    assert memory.plan(run, 80).saving == {"merged copy": largest * 8}
    assert memory.plan(run).saving == {"merged copy": sizes.parameters * 4}
    whole = config("qwen3-14b", model__lora_rank=0)
    assert memory.plan(whole, 80).saving == {"copy": largest * 2}
    assert memory.plan(whole).saving == {"copy": sizes.parameters * 2}
    for run in (configs.replace(whole, {"record.final_model": "float32"}),
                config("qwen3-14b", record__final_model="none")):
        assert not memory.plan(run, 80).saving and not memory.plan(run).saving  # written as it is
    small = config("pocket", sampling__batch=1, update__token_budget=1, update__logprob_chunk=1,
                   sampling__solution_tokens=1, sampling__meta_tokens=1)
    found = memory.plan(small)
    assert found.peak == sum(found.always.values()) + max(
        sum(part.values()) for part in (found.sampling, found.update, found.saving))


def test_grpo_does_not_plan_for_predictions() -> None:
    long = {"sampling__meta_tokens": 512, "sampling__batch": 10**4}
    masa, grpo = (memory.plan(config("smollm2", method=method, **long)) for method in ("masa", "grpo"))
    assert grpo.sampling["keys and values"] < masa.sampling["keys and values"] / 2


@pytest.mark.parametrize(("change", "part"), [
    ({"model__gradient_checkpointing": True}, "activations"), ({"update__token_budget": 1024}, "activations"),
    ({"update__logprob_chunk": 128}, "log-probs"), ({"model__precision": "bfloat16"}, "activations")])
def test_what_saves_memory_makes_the_part_smaller_that_it_is_about(change: dict, part: str) -> None:
    assert memory.plan(config("smollm2", **change)).update[part] < 0.8 * memory.plan(config("smollm2")).update[part]


def test_a_sequence_longer_than_the_token_budget_is_planned_for() -> None:
    short, long = (memory.plan(config(update__token_budget=64, sampling__solution_tokens=length,
                                    sampling__meta_tokens=64)) for length in (1024, 8192))
    assert long.update["activations"] > 4 * short.update["activations"]


@pytest.mark.parametrize("name", tiers.TIERS)
@pytest.mark.parametrize("gpu", memory.CARDS)
def test_a_remedy_makes_a_training_fit_and_every_part_of_it_is_needed(name: str, gpu: int) -> None:
    run = config(name)
    changes = memory.remedy(run, gpu)
    if changes is None:
        assert not memory.fits(run, gpu)
        return
    assert memory.fits(configs.replace(run, changes), gpu)
    assert (changes == {}) == memory.fits(run, gpu)
    for key in changes:
        others = {name: value for name, value in changes.items() if name != key}
        assert not memory.fits(configs.replace(run, others), gpu)


def test_the_defaults_of_qwen3_fit_one_gpu_of_80_gb_up_to_4b_and_larger_ones_one_of_141() -> None:
    assert all(memory.fits(config(name), 80) for name in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"))
    assert all(memory.fits(config(name), 141) for name in ("qwen3-8b", "qwen3-14b"))
    assert not memory.fits(config("qwen3-8b", model__lora_rank=0), 141)


def test_the_text_adds_up_and_says_what_to_change() -> None:
    text = memory.text(config("qwen3-1.7b"), 40)
    assert re.search(r"peak [\d.]+ GB of the 40 GB that such a GPU has: does not fit. It does with --set", text)
    for line in text.splitlines()[1:-1]:
        total, *parts = map(float, re.findall(r"\d+\.\d\d", line))
        assert total == pytest.approx(sum(parts), abs=0.02)
    assert memory.text(config("qwen3-1.7b"), 80).endswith("fits.")
    assert memory.text(config("qwen3-14b", model__lora_rank=0, sampling__solution_tokens=32768), 24).endswith(
        "Take a smaller model or lower the lengths.")


def test_without_a_gpu_the_text_is_about_this_computers_memory() -> None:
    text = memory.text(config("pocket", model__device="cpu"))
    assert re.search(r"peak 0\.\d\d GB of the \d+ GB that this computer has: fits\.$", text)
    huge = config("qwen3-14b", model__device="cpu", model__lora_rank=0, sampling__engine="transformers",
                  sampling__batch=4096)
    assert memory.text(huge).endswith("does not fit. Take a smaller model or lower the lengths.")


def test_a_plan_says_first_which_settings_are_guessed_for_a_model_that_is_no_tier(tmp_path: Path,
                                                                                 capsys: pytest.CaptureFixture) -> None:
    sizes = {"model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32,
             "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
             "max_position_embeddings": 131072}
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf8")
    assert cli.main(["plan", "--model", str(tmp_path), "--gpu", "80GB", "--set", "update.learning_rate=2e-6"]) == 0
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert "is no tier" in first and "model.precision=bfloat16" in first and "learning_rate" not in first
    assert re.match(r"Memory plan of .* \(1,236 million parameters, all weights trained, bfloat16\)", second)
    assert last.endswith("fits.")
    assert cli.main(["plan", "--model", "pocket"]) == 0 and "no tier" not in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}', encoding="utf8")
    assert cli.main(["plan", "--model", str(tmp_path / "other")]) == 1
    told = capsys.readouterr()
    assert "is no tier" in told.out and "is a mamba" in told.err


def test_a_training_that_does_not_fit_is_refused_unless_told_otherwise(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    begun: list[str] = []
    monkeypatch.setattr("masa_lib.training.drive.train",
                        lambda config, out, command: begun.append(config.model.name) or
                        Run(out, config))
    command = ["train", "--out", str(tmp_path / "run"), "--model", "qwen3-14b", "--engine", "transformers",
               "--set", "model.device=cpu", "sampling.batch=4096"]
    assert cli.main(command) == 1
    told = capsys.readouterr()
    assert "does not fit" in told.out and not begun and not (tmp_path / "run").exists()
    assert told.err.startswith("masa: The training is not begun") and "--ignore-plan" in told.err
    assert cli.main([*command, "--ignore-plan"]) == 0 and begun == ["qwen3-14b"]
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--set", "model.device=cpu"]) == 0
    assert begun[1:] == ["pocket"]


def test_the_table_has_every_tier_and_card_in_markdown() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in memory.table().splitlines()]
    assert rows[0] == ["tier", "24 GB", "40 GB", "80 GB", "141 GB"] and set(rows[1]) == {"---"}
    assert [row[0] for row in rows[2:]] == list(tiers.TIERS)
    assert all(len(row) == 5 and all(re.match(r"no$|\d", cell) for cell in row[1:]) for row in rows[2:])


def test_a_folder_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    sizes = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf8")
    found = memory.architecture(str(tmp_path))
    assert (found.layers, found.head_dim, found.tied, found.head_norms) == (2, 16, False, False)
    assert memory.plan(config("pocket", model__name=str(tmp_path))).parameters == found.parameters


def test_a_hub_id_without_a_network_and_another_kind_of_model_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'no-such/model' cannot be read: .*a plan takes a tier \(pocket, ") as caught:
        memory.architecture("no-such/model")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf8")
    with pytest.raises(PlanError, match=r"dense decoders of the Llama and Qwen kind; .* is a mamba"):
        memory.architecture(str(tmp_path))


def test_experts_are_not_planned_as_one_dense_layer(tmp_path: Path) -> None:
    sizes = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 48, "vocab_size": 100,
             "num_experts": 16, "decoder_sparse_step": 1}
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf8")
    with pytest.raises(PlanError, match=r"is a qwen3_moe of 0 million parameters, where its sizes make 0"):
        memory.architecture(str(tmp_path))


def test_the_command_prints_plan_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "qwen3-8b", "--gpu", "80GB"]) == 0
    assert "qwen3-8b (8,191 million parameters, LoRA of rank 32, bfloat16)" in capsys.readouterr().out
    assert cli.main(["plan", "--table"]) == 0
    assert capsys.readouterr().out == memory.table() + "\n"
    with pytest.raises(SystemExit):
        cli.main(["plan", "--gpu", "big"])
    assert "argument --gpu: invalid size value: 'big'" in capsys.readouterr().err
