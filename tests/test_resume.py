"""A killed run goes on and ends with the numbers of one that nobody disturbed: real processes, real kills."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small import LIVES, assert_same_run, largest_file, small, timeless

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.gates import baselines
from masa_lib.runs.folder import Run
from masa_lib.runs.stopping import STEP_DROPPED, Stop
from masa_lib.training.drive import resume, train
from masa_lib.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
CONFIG = small(LIVES)
CHANGE = {"update.learning_rate": 1e-3, "reward.difficulty_base": 0.2, "sampling.solutions": 5}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nobody disturbed."""
    return train(CONFIG, tmp_path_factory.mktemp("reference") / "run", "masa train")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same with a config swapped after step 3, as a notebook does."""
    run = Run.create(tmp_path_factory.mktemp("changed") / "run", CONFIG, "masa train")
    trainer = Trainer(CONFIG, run)
    for result in trainer:
        if result.step == 3:
            trainer.config = configs.replace(trainer.config, CHANGE)
    run.set_status("finished")
    return run


def masa(*arguments: object) -> subprocess.Popen:
    """A command in a process of its own, with one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "masa_lib.cli", *map(str, arguments)], cwd=ROOT, env=environment,
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def begin(out: Path, config: Config = CONFIG) -> subprocess.Popen:
    """`masa train` with a config from a file."""
    configs.save(config, out.with_suffix(".toml"))
    return masa("train", "--config", out.with_suffix(".toml"), "--out", out)


def wait_until(process: subprocess.Popen, condition: Callable[..., bool], *arguments: object) -> None:
    """Until the condition holds or the process ends, which it must not do with an error."""
    while process.poll() is None and not condition(*arguments):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    assert process.poll() in (None, 0), process.communicate()[1]


def kill(process: subprocess.Popen) -> None:
    process.kill()  # SIGKILL
    process.communicate()


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def at_work(run: Path, process: subprocess.Popen) -> bool:
    """Whether this process holds the run."""
    lock, config = run / ".lock", run / "config.toml"
    return config.exists() and lock.exists() and lock.read_text() == str(process.pid)


def test_a_run_killed_at_a_random_moment_ends_as_if_nothing_had_happened(reference: Run, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", random.Random(7).randint(3, 5)
    process = begin(out)
    try:
        wait_until(process, lambda: lines(out / "metrics.jsonl") >= steps)
        with pytest.raises(RunError, match=f"in use by process {process.pid}. Wait for it or stop it"):
            resume(out)
    finally:
        kill(process)
    assert Run.open(out).status["state"] == "running" and Run.open(out).latest_checkpoint()[0] in range(2, 7)
    assert_same_run(resume(out), reference)


def test_a_run_killed_before_its_first_checkpoint_starts_over(reference: Run, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG, "masa train")
    next(Trainer(CONFIG, run))
    assert run.latest_checkpoint() is None and len(run.metrics()) == 1
    assert_same_run(resume(run.path), reference)


@pytest.mark.parametrize("steps", [3, 5])
def test_a_change_made_live_is_replayed_after_the_checkpoint_before_or_behind_it(
        changed: Run, reference: Run, tmp_path: Path, steps: int) -> None:
    run = Run.create(tmp_path / "run", CONFIG, "masa train")
    trainer = Trainer(CONFIG, run)
    for result in trainer:
        if result.step == 3:
            trainer.config = configs.replace(trainer.config, CHANGE)
        if result.step == steps:
            break  # as if killed here: the last checkpoint is the one of step 2 or 4
    resumed = resume(run.path)
    assert_same_run(resumed, changed)
    assert resumed.changes() == changed.changes() == [{"step": 4, "changes": CHANGE}]
    rates = resumed.metrics()["learning_rate"].tolist()
    assert rates == [3e-4] * 3 + [1e-3] * 4 != reference.metrics()["learning_rate"].tolist()


@pytest.mark.parametrize(("method", "changes"), [
    ("masa-efficient", {"gate.start": 2, "gate.threshold": 0.6, "gate.recheck": 0.5, "gate.lost": 1.0,
                        "cap.cut": 1.0}),
    ("greso", {"problems.pool": 8}), ("oracle", {})])
def test_gates_go_on_with_what_they_remember(
        method: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "SAMPLES", 2), monkeypatch.setattr(baselines, "REFRESH", 4)
    config = configs.replace(CONFIG, {"steps": 6, "evaluation.every": 0, "method": method, **changes})
    run = Run.create(tmp_path / "run", config, "masa train")
    for result in Trainer(config, run):
        if result.step == 5:
            break  # as if killed here: the last checkpoint is the one of step 4
    undisturbed = train(config, tmp_path / "undisturbed", "masa train")
    assert_same_run(resume(run.path), undisturbed)
    rows = undisturbed.metrics()
    assert rows["dropped"].sum() > 0
    if method == "masa-efficient":
        state = json.loads((undisturbed.path / "checkpoints" / "step-000004" / "state.json").read_text())
        assert len(state["gates"][method]["window"]) == 4


def test_steps_added_live_are_trained_by_resume(reference: Run, tmp_path: Path) -> None:
    short = configs.replace(CONFIG, {"steps": 4})
    run = train(short, tmp_path / "run", "masa train")
    run.append_change(5, {"steps": 7})
    resumed = resume(run.path)
    assert resumed.status == {"state": "finished", "step": 7, "message": ""}
    assert resumed.metrics()["loss"].tolist() == reference.metrics()["loss"].tolist()


def test_a_disk_full_at_a_checkpoint_is_a_sentence_and_the_run_goes_on_from_the_one_before(
        reference: Run, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG, "masa train")
    trainer = Trainer(CONFIG, run)
    next(trainer), next(trainer)
    with largest_file(500_000), pytest.raises(RunError, match=r"The disk is full: .*step-000003") as caught:
        resume(run.path)
    assert run.status == {"state": "failed", "step": 3, "message": str(caught.value)}
    assert run.latest_checkpoint()[0] == 2 and len(run.metrics()) == 3  # step 3 is the best so far
    assert_same_run(resume(run.path), reference)


def test_resume_of_a_finished_run_only_says_so(reference: Run) -> None:
    files = {file: file.read_bytes() for file in reference.path.rglob("*") if file.is_file() and file.name != ".lock"}
    assert resume(reference.path).status["state"] == "finished"
    assert all(file.read_bytes() == content for file, content in files.items())


def test_a_finished_record_without_its_checkpoints_is_never_started_over(reference: Run, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(reference.path, tmp_path / "run"))
    shutil.rmtree(run.path / "checkpoints")
    before = {file: file.read_bytes() for file in run.path.rglob("*.jsonl")}
    assert resume(run.path).status["state"] == "finished"
    run.append_change(run.status["step"] + 1, {"steps": CONFIG.steps + 2})
    with pytest.raises(RunError, match="no checkpoints left"):
        resume(run.path)
    assert all(file.read_bytes() == content for file, content in before.items() if "changes" not in file.name)


def test_a_run_killed_after_its_last_checkpoint_is_finished_by_resume(reference: Run, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(reference.path, tmp_path / "run"))
    run.set_status("running")
    shutil.rmtree(run.path / "model")
    assert_same_run(resume(run.path), reference)
    assert (run.path / "model" / "model.safetensors").exists()


# Signals.

@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_ends_the_training_with_a_checkpoint_of_its_last_step(
        reference: Run, tmp_path: Path, number: int, code: int) -> None:
    process = begin(tmp_path / "run")
    wait_until(process, lambda: lines(tmp_path / "run" / "metrics.jsonl") >= 3)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == code
    run = Run.open(tmp_path / "run")
    step = len(run.metrics())
    assert run.latest_checkpoint()[0] == step in range(3, 8)
    assert run.status == {"state": "stopped", "step": step,
                          "message": f"Stopped after step {step}, which is checkpointed."}
    assert f"{run.status['message']} `masa resume {run.path}` continues" in said
    assert_same_run(resume(run.path), reference)


@pytest.mark.slow
def test_a_closed_terminal_ends_the_training_with_a_checkpoint_of_its_last_step(reference: Run, tmp_path: Path) -> None:
    configs.save(CONFIG, tmp_path / "run.toml")
    command = ["-m", "masa_lib.cli", "train", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")]
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, *command], os.environ | {"PYTHONPATH": str(ROOT)})
    while lines(tmp_path / "run" / "metrics.jsonl") < 3:
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 4096)  # fails where the training has ended
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    run = Run.open(tmp_path / "run")
    step = len(run.metrics())
    assert run.latest_checkpoint()[0] == step in range(3, 8) and run.status["state"] == "stopped"
    assert_same_run(resume(run.path), reference)


@pytest.mark.parametrize("method", ["masa", "masa-efficient", "masa-read", "mopps", "dapo", "probe", "anchor"])
def test_a_signal_drops_rollouts_and_the_step_is_done_again_as_if_nothing_had_been(
        method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small({"method": method, "steps": 3, "gate.start": 1, "evaluation.final_samples": 1})
    undisturbed, trainer = Trainer(config), Trainer(config)
    expected = [timeless(result.metrics) for result in undisturbed]
    assert timeless(next(trainer).metrics) == expected[0]
    sample = trainer.engine.generate

    def disturbed(*arguments: object) -> object:
        sample(*arguments)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the signal was not heard")

    with monkeypatch.context() as patched, trainer.stop, pytest.raises(StopIteration):
        patched.setattr(trainer.engine, "generate", disturbed)
        next(trainer)
    assert trainer.step == 1 and trainer.stop.signal == signal.SIGINT
    trainer.stop = Stop()
    assert [timeless(result.metrics) for result in trainer] == expected[1:]


def test_a_second_signal_drops_the_step_and_the_last_checkpoint_stands(reference: Run, tmp_path: Path) -> None:
    process = begin(tmp_path / "run")
    wait_until(process, lambda: lines(tmp_path / "run" / "metrics.jsonl") >= 3)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    run = Run.open(tmp_path / "run")
    assert run.status["state"] == "stopped"
    if process.returncode != 128 + signal.SIGINT:  # the second one's exception was lost in a destructor of the update
        assert process.returncode == STEP_DROPPED == 75 and "dropped" in run.status["message"]
    assert f"`masa resume {run.path}` continues" in said and "Traceback" not in said
    assert run.latest_checkpoint()[0] >= 2 and not list(run.path.glob("*/*.tmp"))
    assert_same_run(resume(run.path), reference)


@pytest.mark.slow
def test_a_signal_drops_an_evaluation_which_is_repeated_before_the_next_step(tmp_path: Path) -> None:
    config = configs.replace(CONFIG, {"steps": 3, "evaluation.every": 2, "evaluation.samples": 400,
                                      "record.checkpoint_every": 50, "record.keep_best": False})
    process = begin(tmp_path / "run", config)
    wait_until(process, lambda: lines(tmp_path / "run" / "metrics.jsonl") >= 2)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    run = Run.open(tmp_path / "run")
    assert run.latest_checkpoint()[0] == len(run.metrics()) == 2 and run.evaluations()["step"].tolist() == [0]
    resumed = resume(run.path)
    assert resumed.evaluations()["step"].tolist() == [0, 2, 3]
    assert_same_run(resumed, train(config, tmp_path / "undisturbed", "masa train"))


@pytest.mark.slow
def test_a_stop_before_the_first_step_leaves_a_run_that_starts_over(tmp_path: Path) -> None:
    config = configs.replace(CONFIG, {"steps": 1, "evaluation.final_samples": 400, "record.trackers": "tensorboard"})
    process = begin(tmp_path / "run", config)
    wait_until(process, lambda: (tmp_path / "run" / "tensorboard").exists())
    process.send_signal(signal.SIGINT)
    assert "Stopped before the first step." in process.communicate()[1] and process.returncode == 130
    run = Run.open(tmp_path / "run")
    assert run.latest_checkpoint() is None and run.evaluations().empty
    assert resume(run.path).status["state"] == "finished"


def killed_often(out: Path, seed: int, kills: int, seconds: float, change: bool, config: Config = CONFIG) -> Run:
    """A run whose every life is killed within `seconds` of its beginning, so many times; then finished.

    A life that reaches the end before its kill is followed by the same run from the beginning.
    """
    rng, left, chain, process = random.Random(seed), kills, 0, None
    run = out / f"chain-{chain}"
    while left:
        process = masa("resume", run) if (run / "config.toml").exists() else begin(run, config)
        try:
            wait_until(process, at_work, run, process)
            if change and not (run / "changes.jsonl").exists():
                Run.open(run).append_change(4, CHANGE)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, seconds))
        finally:
            kill(process)
        if process.returncode == 0:
            chain += 1
            run = out / f"chain-{chain}"
        else:
            left -= 1
    return resume(run) if (run / "config.toml").exists() else train(config, run, "masa train")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_a_dozen_times_at_random_moments_ends_as_if_nothing_had_happened(
        reference: Run, tmp_path: Path, seed: int) -> None:
    assert_same_run(killed_often(tmp_path, seed, 12, seconds_of(reference) / 2, change=False), reference)


@pytest.mark.slow
def test_a_run_with_a_live_change_killed_a_dozen_times_ends_as_if_nothing_had_happened(
        changed: Run, tmp_path: Path) -> None:
    assert_same_run(killed_often(tmp_path, 2, 12, seconds_of(changed) / 2, change=True), changed)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_run_with_the_vllm_engine_killed_twenty_times_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    config = configs.replace(CONFIG, {"sampling.engine": "vllm"})
    process = begin(tmp_path / "reference", config)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    undisturbed = Run.open(tmp_path / "reference")
    assert_same_run(killed_often(tmp_path, 4, 20, seconds_of(undisturbed), False, config), undisturbed)


def seconds_of(run: Run) -> float:
    """How long the run's steps and evaluations took, with two more for loading."""
    return 2 + run.metrics()["seconds_total"].sum() + run.evaluations()["seconds"].sum()


# Kill at a file operation: an audit hook counts those inside the run's folder and kills the process at the n-th.
KILL_AT = """
import itertools, os, signal, sys
count, run, *arguments = sys.argv[1:]
seen = itertools.count(1)

def hook(event, details):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"):
        if run in str(details[0]) and next(seen) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

from masa_lib.cli import main
sys.addaudithook(hook)
sys.exit(main(arguments))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_file_operations_ends_as_if_nothing_had_happened(reference: Run, tmp_path: Path) -> None:
    out, rng, deaths = tmp_path / "run", random.Random(3), 0
    configs.save(CONFIG, tmp_path / "c.toml")
    while True:
        arguments = (["resume", out] if (out / "config.toml").exists()
                     else ["train", "--config", tmp_path / "c.toml", "--out", out])
        died = subprocess.run([sys.executable, "-c", KILL_AT, str(rng.randint(1, 150)), *map(str, [out, *arguments])],
                              cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode
        assert died in (0, -9)
        deaths += died != 0
        if died == 0 and deaths >= 8:
            break
        if died == 0:
            out = tmp_path / f"run-{deaths}"
    assert_same_run(Run.open(out), reference)
