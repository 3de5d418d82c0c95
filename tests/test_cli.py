"""The commands: wrong values are refused early and in one sentence; every command does what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from masa_lib import cli, config
from masa_lib.cli import parsing
from masa_lib.models import tiers

ROOT = Path(__file__).resolve().parent.parent
#: a run of seconds
TINY = ["--steps", "2", "--set", "sampling.problems=2", "sampling.solutions=4", "sampling.predictions=4",
        "problems.pool=24", "evaluation.every=1", "evaluation.problems=4", "evaluation.samples=2",
        "evaluation.final_problems=6", "evaluation.final_samples=4", "evaluation.predictions=2",
        "record.checkpoint_every=1", "record.rollouts_every=1", "model.threads=1"]


def masa(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "masa_lib.cli", *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


WRONG = [
    (["train", "--set", "sampling.solutions=1"], "at least 2"),
    (["train", "--method", "ppo"], "grpo, masa"),
    (["train", "--set", "update.learning_rate=-0.001"], "above 0"),
    (["train", "--steps", "0"], "at least 1"),
    (["train", "--steps", "many"], "a whole number"),
    (["train", "--seed", "-1"], "at least 0"),
    (["train", "--engine", "abacus"], "transformers"),
    (["train", "--set", "reward.dificulty_base=0.1"], "reward.difficulty_base"),
    (["train", "--set", "steps"], "KEY=VALUE"),
    (["train", "--config", "no-such-file.toml"], "no-such-file.toml"),
    (["train", "--colour", "red"], "--colour"),
    (["eval", "--set", "evaluation.final_samples=0"], "at least 1"),
    (["fly"], "fly"),
    ([], "COMMAND"),
]


@pytest.mark.parametrize(("arguments", "allowed"), WRONG)
def test_a_wrong_value_is_refused_in_one_sentence_that_says_what_is_allowed(
        arguments: list[str], allowed: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code(arguments)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert allowed in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err


def exit_code(arguments: Sequence[str]) -> int | str | None:
    """The code that the process would leave with."""
    try:
        return cli.main(arguments)
    except SystemExit as left:
        return left.code


def test_a_wrong_value_is_refused_before_torch_is_loaded() -> None:
    code = ("import sys; from masa_lib.cli import main; left = main(['train', '--set', 'sampling.solutions=1']); "
            "print(left, [name for name in ('torch', 'pandas', 'transformers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


def test_the_short_options_override_the_file_and_set_overrides_both(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("method = 'grpo'\nsteps = 7\nseed = 3\n[update]\nlearning_rate = 0.002\n", encoding="utf8")
    options = parsing.build_parser().parse_args(
        ["train", "--config", str(file), "--steps", "9", "--model", "here", "--problems", "gsm8k", "--set", "seed=5",
         "reward.difficulty_base=0.02", "--set", "update.normalise_std=false"])
    settings = parsing.config_from(options)
    assert (settings.method, settings.steps, settings.seed) == ("grpo", 9, 5)
    assert (settings.model.name, settings.problems.source) == ("here", "gsm8k")
    assert settings.update.learning_rate == 0.002
    assert settings.reward.difficulty_base == 0.02
    assert settings.update.normalise_std is False


def test_defaults_are_those_of_the_models_tier_and_every_option_overrides_them(tmp_path: Path) -> None:
    def settings(*options: str) -> config.Config:
        return parsing.config_from(parsing.build_parser().parse_args(["train", *options]))

    assert settings() == settings("--model", "pocket") == tiers.config()
    assert settings("--model", "pocket").update.learning_rate == tiers.TIERS["pocket"].settings["update.learning_rate"]
    assert settings("--model", "no-tier") == config.replace(config.Config(), {"model.name": "no-tier"})
    (tmp_path / "c.toml").write_text("[update]\nlearning_rate = 0.5\nclip_low = 0.1\n", encoding="utf8")
    changed = settings("--config", str(tmp_path / "c.toml"), "--set", "update.clip_low=0.3")
    assert (changed.update.learning_rate, changed.update.clip_low) == (0.5, 0.3)
    assert changed.reward == tiers.config().reward


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert [key for key in config.settings() if key not in text] == []


def test_models_lists_every_tier(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("pocket", "smollm2", "qwen3-0.6b", "qwen3-14b"))


def test_problems_lists_the_sources_and_shows_examples_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["problems"]) == 0
    printed = capsys.readouterr().out
    assert "gsm8k" in printed
    assert "None" not in printed
    assert cli.main(["problems", "pocket", "--count", "3"]) == 0
    assert capsys.readouterr().out.count("answer: ") == 3


def test_an_unknown_problem_source_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["problems", "no-such-source"]) == 1
    printed = capsys.readouterr().err
    assert "no-such-source" in printed
    assert printed.count("\n") == 1


def test_commands_on_a_folder_without_a_run_say_so_in_one_sentence(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["resume"], ["compare"], ["eval", "--run"]):
        assert cli.main([*arguments, str(tmp_path / "nothing")]) == 1
        printed = capsys.readouterr()
        assert "nothing" in printed.err
        assert printed.err.count("\n") == 1


def test_an_unknown_model_is_one_sentence_and_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", "--model", str(tmp_path / "no-model"), "--out", str(out), *TINY]) == 1
    assert "no-model" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny finished run of each method, made as a user makes them."""
    folder = tmp_path_factory.mktemp("runs")
    for method in config.METHODS:
        assert cli.main(["train", "--method", method, "--out", str(folder / f"{method}-s0"), *TINY]) == 0
    return folder


def test_train_writes_a_run_with_its_command(runs: Path) -> None:
    run = runs / "masa-s0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert json.loads((run / "environment.json").read_text(encoding="utf8"))["command"].startswith("masa train")
    assert config.load(run / "config.toml").sampling.problems == 2


def test_train_refuses_a_folder_that_holds_a_run_and_names_resume(
        runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (runs / "masa-s0" / "metrics.jsonl").read_bytes()
    assert cli.main(["train", "--out", str(runs / "masa-s0"), *TINY]) == 2
    assert f"masa resume {runs / 'masa-s0'}" in capsys.readouterr().err
    assert (runs / "masa-s0" / "metrics.jsonl").read_bytes() == before


def test_resume_of_a_finished_run_changes_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (runs / "grpo-s0" / "metrics.jsonl").read_bytes()
    assert cli.main(["resume", str(runs / "grpo-s0")]) == 0
    assert "masa compare" in capsys.readouterr().out
    assert (runs / "grpo-s0" / "metrics.jsonl").read_bytes() == before


def test_compare_prints_a_table_and_writes_a_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "grpo" in printed
    assert "masa" in printed
    assert "<svg" in (runs / "report.html").read_text(encoding="utf8")


def test_compare_json_is_one_object_and_writes_no_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "report.html").unlink(missing_ok=True)
    assert cli.main(["compare", "--json", str(runs / "grpo-s0"), str(runs / "masa-s0")]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert set(methods) == {"grpo", "masa"}
    assert methods["masa"]["seeds"] == 1
    assert not (runs / "report.html").exists()


def test_eval_measures_a_runs_newest_checkpoint(
        runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--run", str(runs / "masa-s0"), "--json", "--out", str(tmp_path / "kept")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 <= summary["accuracy"] <= 1
    assert (summary["problems"], summary["samples"]) == (6, 4)
    table = pd.read_parquet(tmp_path / "kept" / "evaluation.parquet")
    assert summary["accuracy"] == pytest.approx((table["c"] / table["n"]).mean())


def test_eval_takes_all_problems_of_a_file_that_the_run_was_not_trained_on(
        runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "Left to right: 1 + 1", "answer": "2"}\n', encoding="utf8")
    assert cli.main(["eval", "--run", str(runs / "grpo-s0"), "--problems", str(file),
                     "--set", "evaluation.final_problems=1", "evaluation.predictions=0"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["problems"] == "1"


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "long run"
    arguments = [*TINY, "--out", str(out), "--set", "steps=100000", "evaluation.every=0"]
    with (tmp_path / "stderr").open("w", encoding="utf8") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "masa_lib.cli", "train", *arguments], cwd=tmp_path,
                                   env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            while not (out / "metrics.jsonl").exists() and process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
            process.send_signal(signal.SIGINT)
            code = process.wait(120)
        finally:
            process.kill()
    printed = (tmp_path / "stderr").read_text(encoding="utf8")
    assert code == 130, printed
    assert f"masa resume '{out}'" in printed
    assert "Traceback" not in printed


def test_without_out_a_run_is_named_after_model_method_and_seed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--method", "grpo", "--seed", "4", *TINY, "--set", "steps=1"]) == 0
    assert (tmp_path / "runs" / "pocket-grpo-s4" / "config.toml").is_file()


def test_a_reader_that_closes_the_pipe_ends_a_command_without_a_traceback() -> None:
    code = "import sys; from masa_lib import cli; input(); sys.exit(cli.main(['models']))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write(b"\n")  # nobody reads from here on
        process.stdin.close()
        assert (process.wait(), process.stderr.read()) == (cli.EXIT_PIPE, b"")


def test_eval_of_a_run_says_which_step_and_checkpoint_it_is(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--set", "evaluation.final_problems=1", "evaluation.predictions=0"]
    assert cli.main(["eval", "--run", str(runs / "grpo-s0"), *few]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (printed["run"], printed["weights"], printed["step"]) == ("grpo-s0", "step-000002", "2")
    assert cli.main(["eval", "--set", "evaluation.final_samples=2", *few]) == 0
    assert "step" not in capsys.readouterr().out


def test_the_bar_of_a_training_begins_with_its_steps_and_shows_no_nan(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--method", "grpo", "--out", str(tmp_path / "run"), *TINY]) == 0
    printed = capsys.readouterr().err
    assert "nan" not in printed and "accuracy=" in printed
    assert printed.index("evaluate") < printed.index(f"{tmp_path / 'run'}:")


def test_a_terminal_of_ascii_alone_shows_every_command(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"problem": "3 \u00d7 4 = \u25a1", "answer": "12"}), encoding="utf8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for arguments in (["problems", str(file), "--split", "train"], ["problems", str(file), "--split", "evaluation"]):
        done = subprocess.run([sys.executable, "-m", "masa_lib.cli", *arguments], cwd=ROOT, env=environment,
                              capture_output=True, check=False)
        assert b"Traceback" not in done.stderr and done.stdout.isascii() and done.stderr.isascii()
        assert done.returncode or b"3 \\xd7 4 = \\u25a1" in done.stdout


@pytest.mark.parametrize("missing", ["fcntl", "resource"])
def test_a_system_without_unix_modules_is_one_sentence(missing: str) -> None:
    code = (f"import sys; sys.modules[{missing!r}] = None; from masa_lib import cli; "
            "sys.exit(cli.main(['train', '--model', 'pocket']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"masa: masa_lib runs on Linux and macOS, and on Windows inside WSL; this Python has no " \
                          f"module {missing}.\n"


def test_sigterm_to_lab_ends_jupyterlab(tmp_path: Path) -> None:
    listening = tmp_path / "runtime"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(listening),
                                "JUPYTER_CONFIG_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-m", "masa_lib.cli", "lab", "--no-browser", "--allow-root",
                                "--port=0"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        while not list(listening.glob("jpserver-*.json")):
            assert process.poll() is None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        assert [file.name for file in listening.glob("jpserver-*.json")] == [f"jpserver-{process.pid}.json"]
        process.terminate()
        process.wait(60)
        assert not list(listening.glob("jpserver-*.json"))
    finally:
        process.kill()


def test_lab_starts_jupyterlab_with_the_options_it_is_given() -> None:
    done = masa("lab", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("4.")


def test_lab_without_jupyterlab_names_the_extra(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jupyterlab" else find(name))
    assert cli.main(["lab"]) == 1
    assert "the extra `lab`" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("command", ["probe", "warmup"])
@pytest.mark.parametrize(("arguments", "says"), [
    (["--count", "0"], "must be at least 1"),
    (["--model", "no-such-model"], "neither a tier"),
    (["--problems", "no-such-source"], "There is no source of problems")])
def test_a_command_that_writes_a_folder_says_in_one_sentence_what_is_wrong(
        command: str, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--out", str(tmp_path / "out"), *arguments]) == 1
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
