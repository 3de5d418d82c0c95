"""An exported run: a folder that others can load, and a card that says what the run recorded."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from small import small
from transformers import AutoModelForCausalLM, AutoTokenizer

from masa_lib import cli, config, evaluation, models
from masa_lib.export import ExportError, export
from masa_lib.runs import Run, RunError
from masa_lib.trainer import train


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
    trained, tokenizer = models.load(run.config.model, folder)
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
    for row in run.evaluations().iloc[[0, -1]].to_dict("records"):
        interval = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        assert f"| {row['step']} | {row['accuracy']:.3f} ({interval}) |" in card
    settings, changed = re.search(r"```toml\n(.*?)```", card, re.DOTALL)[1].split("# from step 2 on\n")
    assert config.replace(config.Config(), config.flatten(tomllib.loads(settings))) == run.config
    assert tomllib.loads(changed) == {"update": {"learning_rate": 1e-5}}
    assert str(run.path.parent) not in card and str(Path.home()) not in card


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
    assert {key: found[key] for key in found if key != "seconds"} == pytest.approx(
        {key: None if expected[key] != expected[key] else expected[key] for key in found if key != "seconds"})
