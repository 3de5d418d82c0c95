"""`masa bench gates`: one table between two ends; what is recorded is not trained again, and a file adds a gate."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from masa_lib import cli, config
from masa_lib.analysis import bench, study
from masa_lib.analysis.compare import compare_runs
from masa_lib.cli import parsing
from masa_lib.gates import registry

ROOT = Path(__file__).resolve().parent.parent
GATE = re.search(r"## A gate\n.*?```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf8"),
                 re.DOTALL)[1]


def plan(*names: str, seeds: str = "0-1", **changes: object) -> study.Study:
    return bench.plan(names, seeds, 2, Path("runs/gates"), {key.replace("__", "."): value
                                                            for key, value in changes.items()})


def test_every_gate_stands_between_the_two_ends_on_the_same_problems_and_updates() -> None:
    runs = plan().runs()
    assert {run.config.method for run in runs} == {"grpo", *registry.GATES}
    shared = {(run.config.steps, run.config.problems, run.config.evaluation, run.config.update) for run in runs}
    assert len(shared) == 1
    assert [arm.name for arm in plan("mopps").arms] == ["grpo", "random", "mopps", "oracle"]
    assert {run.config.seed for run in plan(seeds="3").runs()} == {0, 1, 2}
    assert {run.config.seed for run in plan(seeds="5-6").runs()} == {5, 6}


def test_an_arm_of_a_study_keeps_its_settings_and_a_gate_without_one_takes_those_that_are_given(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.GATES, "mine", registry.GATES["mopps"])
    monkeypatch.setitem(config.METHODS, "mine", "as mopps")
    chosen = {run.config.method: run.config for run in plan("mopps", "mine", seeds="1", gate__places=0.3).runs()}
    assert (chosen["mopps"].gate.places, chosen["mine"].gate.places) == (0.6, 0.3)
    assert config.replace(chosen["mine"], {"method": "mopps", "gate.places": 0.6}) == chosen["mopps"]


def test_what_a_study_has_recorded_is_not_trained_again_unless_its_settings_differ() -> None:
    whole = plan("mopps", "history")
    assert bench.lacking(whole).runs() == []
    assert {bench.recorded(run).parent.name for run in whole.runs()} == {"efficiency", "beliefs"}
    other = study.Planned(whole.out / "mopps-s0", {**whole.arms[2].changes, "seed": 0, "gate.places": 0.5})
    assert bench.recorded(other) is None
    assert bench.recorded(study.Planned(whole.out / "mopps-s99", {**whole.arms[2].changes, "seed": 99})) is None


def test_the_table_of_recorded_gates_is_written_without_any_training(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gates"
    assert cli.main(["bench", "gates", "mopps", "--seeds", "0-1", "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == [bench.TABLE]
    table = (out / bench.TABLE).read_text(encoding="utf8").splitlines()
    assert [line.split("|")[1].strip() for line in table[2:6]] == ["grpo", "random", "mopps", "oracle (privileged)"]
    heads = [cell.strip() for cell in table[0].split("|")[1:-1]]
    rows = pd.DataFrame([[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:6]], columns=heads)
    assert set(rows["seeds"]) == {"2"} and rows["updates"].nunique() == 1
    assert {"written, ratio", "read, ratio", "update, ratio", "all computed, ratio"} <= set(heads)
    mopps = compare_runs([bench.recorded(run) for run in plan("mopps").runs()]).summary["methods"]["mopps"]
    assert rows["accuracy"][2].startswith(f"{mopps['accuracy_final']['mean']:.3f}")
    assert f"Written: {out / bench.TABLE}." in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (["nonsense"], "There is no gate 'nonsense'"), (["--seeds", "a-b"], "such as 0-3"),
    (["--with", "nowhere.py"], "nowhere.py cannot be run"), (["--set", "gate.place=1"], "Did you mean gate.places")])
def test_a_wrong_option_is_refused_in_a_sentence(
        arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(parsing.EXTEND, "")
    if "--set" in arguments:
        monkeypatch.setitem(registry.GATES, "mine", registry.GATES["mopps"])
        monkeypatch.setitem(config.METHODS, "mine", "as mopps")
    assert cli.main(["bench", "gates", *arguments, "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


@pytest.mark.slow
def test_a_gate_in_a_file_of_its_own_is_tried_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "longest.py").write_text(GATE, encoding="utf8")
    done = subprocess.run([sys.executable, "-m", "masa_lib.cli", "bench", "gates", "longest", "--with", "longest.py",
                           "--smoke"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[0].split() == ["gate", "grpo", "random", "longest", "oracle", "(privileged)"]
    assert [path.name for path in tmp_path.iterdir()] == ["longest.py"]


@pytest.mark.slow
def test_a_file_that_masa_extend_names_adds_a_method_to_every_command(tmp_path: Path) -> None:
    (tmp_path / "longest.py").write_text(GATE, encoding="utf8")
    tiny = [f"{key}={value}" for key, value in study.SMOKE.items()]
    known = os.environ | {"PYTHONPATH": str(ROOT), parsing.EXTEND: "longest.py"}
    command = [sys.executable, "-m", "masa_lib.cli", "train", "--out", "run", "--method", "longest", "--set", *tiny]
    done = subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "longest" in (tmp_path / "run" / "config.toml").read_text()
