"""Studies: real runs in processes of their own, real kills; files that are wrong are refused in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small import SETTINGS, timeless

from masa_lib import cli, config
from masa_lib import crash_safe_files as files
from masa_lib.analysis import study
from masa_lib.cli import parsing
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run
from masa_lib.training.drive import train

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "studies").glob("*.toml"))
#: for the studies that want another engine and weights made before
ELSEWHERE = ["--set", "model.name=pocket", "model.weights=", "model.device=auto", "sampling.engine=transformers"]
TINY = SETTINGS | {"steps": 5, "sampling.problems": 3, "evaluation.final_problems": 2, "record.checkpoint_every": 1}
HEAD = "title = 'Tiny'\nout = 'records'\nseeds = 2\nhours = 0.1\njobs = 2\n"
ARMS = "[arms.grpo]\nabout = 'solutions alone'\n[arms.masa]\nabout = 'predictions, too'\n"


def write(folder: Path, changes: dict[str, object] | None = None, arms: str = ARMS, head: str = HEAD) -> Path:
    """A study file with tiny settings."""
    lines = [f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
             for key, value in (TINY | (changes or {})).items()]
    (folder / "tiny.toml").write_text("\n".join([head, "[settings]", *lines, arms]), encoding="utf8")
    return folder / "tiny.toml"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first run of the tiny study, as `masa train` makes it, with its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    planned = study.load(write(folder)).runs()[0]
    return train(planned.config, folder / "grpo-s0", "masa train").path


@pytest.fixture
def one(place: Path, record: Path) -> Path:
    """A study of one run that is finished but not compact."""
    shutil.copytree(record, place / "records" / "grpo-s0")
    return write(place, head=HEAD.replace("seeds = 2", "seeds = 1"), arms=ARMS.split("[arms.masa]")[0])


def begin(*arguments: object) -> subprocess.Popen:
    """`masa study` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "masa_lib.cli", "study", *map(str, arguments)],
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Until the condition holds; the process must not end before."""
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None, process.communicate()[1]


def has_steps(*runs: Path) -> bool:
    return all((run / "metrics.jsonl").exists() for run in runs)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_whose_runner_and_one_run_are_killed_goes_on_and_is_then_left_alone(
        place: Path, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, first, other = write(place), place / "records" / "grpo-s0", place / "records" / "masa-s0"
    process = begin(file)
    try:
        wait_until(process, lambda: has_steps(first, other))
    finally:
        process.kill()
        process.communicate()
    os.kill(int((first / ".lock").read_text()), signal.SIGKILL)  # the other one goes on without its runner
    assert cli.main(["study", str(file)]) == 0
    table = capsys.readouterr().out
    assert table.count("finished") == 4 and "new" not in table
    assert {path.name for path in (place / "records").glob("*-s*")} == {"grpo-s0", "grpo-s1", "masa-s0", "masa-s1"}
    runs = [Run.open(place / "records" / name) for name in ("grpo-s0", "masa-s0", "grpo-s1", "masa-s1")]
    assert [run.status["step"] for run in runs] == [5, 5, 5, 5]
    assert [(run.path / "model").exists() for run in runs] == [True, True, False, False]
    assert not any((run.path / "checkpoints").exists() for run in runs)
    assert not any((run.path / "train.log").exists() for run in runs)
    expected = Run.open(record)
    for read in (Run.metrics, Run.evaluations):
        assert ([timeless(row) for row in read(runs[0]).to_dict("records")]
                == [timeless(row) for row in read(expected).to_dict("records")])
    lives = {run.path.name: [life["command"].split()[1] for life in run.environment.get("lives", [])] for run in runs}
    assert lives["grpo-s0"] == ["resume"] and not lives["grpo-s1"]
    assert runs[3].config == config.replace(study.load(file).runs()[1].config, {"seed": 1})
    before = snapshot(place)
    assert cli.main(["study", str(file)]) == 0
    assert snapshot(place) == before


def test_a_signal_stops_all_runs_after_their_steps_and_checkpoints_them(place: Path) -> None:
    file = write(place, {"steps": 100000, "record.checkpoint_every": 100000})
    runs = place / "records" / "grpo-s0", place / "records" / "masa-s0"
    process = begin(file)
    try:
        wait_until(process, lambda: has_steps(*runs))
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert "Stopped: 0 of 4 runs are finished. The same command goes on." in said and "Traceback" not in said
    for run in map(Run.open, runs):
        assert run.status["state"] == "stopped"
        assert run.latest_checkpoint()[0] == run.status["step"] == len(run.metrics())


@pytest.mark.slow
def test_a_signal_does_not_wait_for_long_rollouts(place: Path) -> None:
    process = begin(write(place, {"sampling.problems": 3000}))
    runs = place / "records" / "grpo-s0", place / "records" / "masa-s0"
    try:
        wait_until(process, lambda: all((run / "evaluations.jsonl").exists() for run in runs))
        process.send_signal(signal.SIGINT)
        process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert [Run.open(run).status["step"] for run in runs] == [0, 0]


def test_a_run_that_fails_is_named_with_its_last_line_and_does_not_hold_up_the_others(
        place: Path, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(record, place / "records" / "grpo-s0")
    broken = "[arms.broken]\nabout = 'no such model'\nmethod = 'grpo'\nsettings.model.name = 'no/model/here'\n"
    file = write(place, arms=broken + ARMS.split("[arms.masa]")[0], head=HEAD.replace("jobs = 2", "jobs = 1"))
    assert cli.main(["study", str(file), "--seeds", "0"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("masa: 1 of 2 runs are finished, but broken-s0 failed with exit code 1: masa: ")
    assert "no/model/here" in said and "train.log in a run's folder" in said
    assert not (place / "records" / "grpo-s0" / "checkpoints").exists()


def test_a_dry_run_shows_every_run_seed_by_seed_and_changes_nothing(
        place: Path, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(record, place / "records" / "grpo-s0")
    shutil.copytree(record, place / "records" / "masa-s0")
    Run.open(place / "records" / "grpo-s0").set_status("running")
    changed = config.replace(Run.open(record).config, {"method": "masa"})
    config.save(changed, place / "records" / "masa-s0" / "config.toml")
    file, before = write(place), None
    for _ in range(2):  # looking for a process at a run leaves a lock file behind
        assert cli.main(["study", str(file), "--dry-run"]) == 0
        assert before in (None, snapshot(place))
        before = snapshot(place)
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert lines[0].split() == ["run", "state", "steps", "planned", "seconds"]
    assert [line.split()[:4] for line in lines[1:5]] == [
        ["grpo-s0", "killed", "5", "5"], ["masa-s0", "finished", "5", "5"], ["grpo-s1", "new", "0", "5"],
        ["masa-s1", "new", "0", "5"]]


def test_a_run_with_other_settings_than_the_study_says_is_refused(
        one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = one.read_text(encoding="utf8")
    one.write_text(text.replace("learning_rate = 0.0003", "learning_rate = 1e-5"), encoding="utf8")
    assert cli.main(["study", str(one)]) == 1
    said = capsys.readouterr().err
    assert "update.learning_rate is 0.0003, the study's 1e-05" in said and said.count("\n") == 1
    assert (one.parent / "records" / "grpo-s0" / "checkpoints").exists()


def test_a_study_has_one_runner_at_a_time(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.lock(Path("records/.lock"), "x"):
        assert cli.main(["study", str(one)]) == 1
    assert "The study records is in use by" in capsys.readouterr().err


WRONG = [
    ("title = ", "cannot be read"),
    (HEAD, "does not say its arms; the keys are title"),
    (HEAD + "colour = 'red'\n" + ARMS, "'colour'; the keys are title"),
    (HEAD.replace("title = 'Tiny'", "title = 5") + ARMS, "title is 5; it should be a valid string"),
    (HEAD.replace("jobs = 2", "jobs = 0") + ARMS, "jobs is 0; it should be greater than or equal to 1"),
    (HEAD.replace("jobs = 2", "jobs = true") + ARMS, "jobs is True"),
    (HEAD.replace("jobs = 2", "threads = -1") + ARMS, "model.threads is -1"),
    (HEAD.replace("seeds = 2", "seeds = '5-3'") + ARMS, "a span such as 0-3"),
    (HEAD.replace("seeds = 2", "seeds = 1000000000000") + ARMS, "of 10000 at most"),
    (HEAD.replace("seeds = 2", "seeds = '0-999999999999'") + ARMS, "of 10000 at most"),
    (HEAD + "[arms]\n", "arms is {}; Dictionary should have at least 1 item"),
    (HEAD + "[arms]\ngrpo = 5\n", "arm grpo is 5; it should be a valid dictionary"),
    (HEAD + "[arms.grpo]\n", "arm grpo does not say its about"),
    (HEAD + "[arms.grpo]\nabout = ''\ncolour = 1\n", "the keys are about"),
    (HEAD + "[arms.'../../x']\nabout = ''\nmethod = 'grpo'\n", "the name is '../../x'; a name takes letters"),
    (HEAD + "[arms.'a/x']\nabout = ''\n[arms.'b/x']\nabout = ''\n", "the name is 'a/x'"),
    (HEAD + "[arms.'..']\nabout = ''\n", "the name is '..'"),
    (HEAD + "[arms.'grpo\\n']\nabout = ''\n", "the name is "),
    (HEAD + "[arms.'mäßig']\nabout = ''\n", "the name is "),
    (HEAD + "[arms.ppo]\nabout = ''\n", "arm ppo: method is 'ppo'; it takes one of grpo, masa"),
    (HEAD + "[settings]\nseed = 3\n" + ARMS, "seed is no entry of settings"),
    (HEAD + "[settings]\nreward.dificulty_base = 3\n" + ARMS, "Did you mean reward.difficulty_base"),
    (HEAD + "[arms.grpo]\nabout = ''\nsettings.sampling.solutions = 1\n", "sampling.solutions is 1"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_wrong_study_file_is_refused_in_one_sentence(
        text: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "wrong.toml").write_text(text, encoding="utf8")
    assert cli.main(["study", "wrong.toml"]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "wrong.toml" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(("arguments", "said"), [
    (["--only", "ppo"], "the arms of this study are grpo, masa"), (["--seeds", "a-b"], "such as 0-3"),
    (["--seeds", "7"], "No arm has a seed"), (["--jobs", "0"], "at least 1"), (["--set", "steps=1"], "--smoke"),
    (["--smoke", "--set", "steps"], "KEY=VALUE")])
def test_a_wrong_option_is_refused_in_one_sentence(
        arguments: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", str(write(place)), *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


def test_arms_have_seeds_of_their_own_and_settings_over_the_shared_ones(place: Path) -> None:
    arms = ("[arms.a]\nabout = 'x'\nmethod = 'grpo'\nseeds = 3\n"
            "[arms.b]\nabout = 'y'\nmethod = 'masa'\nseeds = '1-2'\nsettings = {update = {learning_rate = 1e-5}}\n")
    found = study.load(write(place, arms=arms))
    assert [run.path.name for run in found.runs()] == ["a-s0", "a-s1", "b-s1", "a-s2", "b-s2"]
    assert [run.config.update.learning_rate for run in found.runs()] == [3e-4, 3e-4, 1e-5, 3e-4, 1e-5]
    chosen = found.select(["b", "a"], "2-9", 1)
    assert [run.path.name for run in chosen.runs()] == ["a-s2", "b-s2"]
    assert chosen.hours == pytest.approx(0.1 * 2 / 5 * 2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_valid_and_a_command_can_say_the_same(path: Path) -> None:
    found = study.load(path)
    assert found.out == Path("data/runs") / path.stem and found.title
    for planned in dataclasses.replace(found, out=Path("elsewhere")).runs():
        command = ["train", "--set", *config.assignments(planned.changes)]
        assert parsing.config_from(parsing.build_parser().parse_args(command)) == planned.config


def test_the_study_of_rivals_has_the_seeds_and_visits_that_it_needs() -> None:
    found = study.load(ROOT / "studies" / "efficiency.toml")
    seeds = {arm.name: len(arm.seeds) for arm in found.arms}
    assert min(seeds[name] for name in ("grpo", "mopps", "masa-efficient")) >= 8
    assert min(seeds.values()) >= 4
    for run in found.runs():
        pool = run.config.problems.pool
        assert pool == 0 if "-fresh-s" in run.path.name else run.config.steps * run.config.sampling.problems >= 4 * pool


def test_the_arms_that_read_are_trained_as_those_that_they_are_compared_with() -> None:
    reference = next(arm for arm in study.load(ROOT / "studies" / "efficiency.toml").arms if arm.name == "grpo")
    own = ("belief.", "prediction.", "problems.pool", "record.final_model")
    for arm in study.load(ROOT / "studies" / "beliefs.toml").arms:
        changes = {key: value for key, value in arm.changes.items() if not key.startswith(own)}
        assert changes == {key: value for key, value in reference.changes.items() if not key.startswith(own)} | {
            "method": arm.changes["method"]}


def test_the_arms_timed_alone_are_those_of_the_study_of_rivals_with_other_seeds() -> None:
    rivals = {arm.name: arm for arm in study.load(ROOT / "studies" / "efficiency.toml").arms}
    for arm in study.load(ROOT / "studies" / "seconds.toml").arms:
        other = rivals[arm.name]
        assert (arm.changes | {"record.final_model": ""}) == (other.changes | {"record.final_model": ""})
        assert not set(arm.seeds) & set(other.seeds)


def test_the_baseline_study_describes_its_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {study.progress(run)["state"] for run in study.load("studies/baseline.toml").runs()} == {"finished"}


def test_a_recorded_run_that_differs_is_an_error_of_its_own(one: Path) -> None:
    planned = study.load(one).runs()[0]
    with pytest.raises(RunError, match="its method is 'grpo', the study's 'masa'"):
        study.progress(dataclasses.replace(planned, changes={**planned.changes, "method": "masa"}))


@pytest.mark.parametrize("path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem != "replay"), id=path.stem)
                                  for path in FILES])
def test_a_smoke_run_tries_every_arm_and_leaves_nothing_behind(
        path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ELSEWHERE if study.load(path).arms[0].changes.get("model.name") else []
    assert cli.main(["study", str(path), "--smoke", *changes]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count(" finished ") == len(study.load(path).arms)
    assert not list(place.iterdir())
