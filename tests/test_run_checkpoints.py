"""What a run can go on from, under real kills: checkpoints, the best of them, and the way back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from run_files import rollouts_of, start, value_of, weights

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A new run that keeps two checkpoints."""
    return Run.create(tmp_path / "run", Config(seed=7), "masa train")


def test_the_newest_checkpoints_are_kept_by_the_setting_in_force(run: Run) -> None:
    run.append_change(100, {"record.checkpoints_kept": 1})
    for step in (25, 50, 75):
        assert run.save_checkpoint(step, weights(step)) == run.path / "checkpoints" / f"step-{step:06d}"
    assert sorted(os.listdir(run.path / "checkpoints")) == ["step-000050", "step-000075"]
    run.save_checkpoint(1_000_000, weights(1))
    assert os.listdir(run.path / "checkpoints") == ["step-1000000"]
    assert run.latest_checkpoint() == (1_000_000, run.path / "checkpoints" / "step-1000000")


def test_a_checkpoint_of_the_same_step_is_replaced(run: Run) -> None:
    run.save_checkpoint(5, weights(1))
    run.save_checkpoint(5, weights(2))
    assert value_of(run.latest_checkpoint()[1]) == 2


def test_a_broken_checkpoint_is_skipped_with_its_fault_for_the_one_before(
        run: Run, caplog: pytest.LogCaptureFixture) -> None:
    breaks = {
        "model/weights.bin is missing": lambda folder: (folder / "model" / "weights.bin").unlink(),
        "model/weights.bin has 10 bytes instead of 5000":
            lambda folder: (folder / "model" / "weights.bin").write_bytes(bytes(10)),
        "the content of model/weights.bin has changed":
            lambda folder: (folder / "model" / "weights.bin").write_bytes(bytes(5000)),
        "cannot be read": lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    }
    run.save_checkpoint(25, weights(25))
    for fault, damage in breaks.items():
        damage(run.save_checkpoint(50, weights(50)))
        caplog.clear()
        assert run.latest_checkpoint() == (25, run.path / "checkpoints" / "step-000025")
        assert "step-000050 is broken and left out" in caplog.text and fault in caplog.text


def test_where_every_checkpoint_is_broken_nothing_starts_over(run: Run) -> None:
    (run.save_checkpoint(25, weights(25)) / "state.json").unlink()
    with pytest.raises(RunError, match=r"No checkpoint .* is whole \(step 25: state.json is missing\).*untouched"):
        run.latest_checkpoint()


def test_a_writer_that_fails_leaves_the_checkpoint_before_and_its_own_error(run: Run) -> None:
    def write(folder: Path) -> None:
        weights(50)(folder)
        raise ZeroDivisionError("mine")

    run.save_checkpoint(25, weights(25))
    with pytest.raises(ZeroDivisionError, match="mine"):
        run.save_checkpoint(50, write)
    assert os.listdir(run.path / "checkpoints") == ["step-000025"]
    assert run.latest_checkpoint()[0] == 25


def evaluated(run: Run, step: int, accuracy: float) -> None:
    run.write_evaluation(step, {"accuracy": accuracy}, pd.DataFrame({"n": [1]}))
    run.save_checkpoint(step, weights(step))


def held(run: Run) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(run.path / "checkpoints"))


def test_the_best_checkpoint_outlives_the_newer_ones_until_a_better_one_comes(run: Run) -> None:
    run.write_evaluation(0, {"accuracy": 0.99}, pd.DataFrame({"n": [1]}))  # before training there is no checkpoint
    with pytest.raises(RunError, match="take the last"):
        run.weights("best")
    for step, accuracy, best in ((1, 0.5, 1), (2, 0.4, 1), (3, 0.5, 1), (4, 0.1, 1), (5, 0.6, 5), (6, 0.2, 5)):
        evaluated(run, step, accuracy)
        assert run.best_step() == best and run.weights("best")[0] == best == value_of(run.weights("best")[1])
        assert held(run) == sorted({best, step, max(step - 1, 1)})
        assert run.weights()[0] == run.weights("last")[0] == step


def test_rewinding_drops_the_best_checkpoint_only_where_it_is_newer(run: Run) -> None:
    for step, accuracy in ((1, 0.5), (2, 0.4), (3, 0.1), (4, 0.9)):
        evaluated(run, step, accuracy)
    assert held(run) == [3, 4]
    run.rewind(3)
    assert run.best_step() == 1 and run.weights("best")[0] == 3  # what is left of what was kept
    evaluated(run, 4, 0.05)
    assert run.weights("best")[0] == 3 and run.weights("last")[0] == 4


def test_without_keep_best_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configs.replace(Config(), {"record.keep_best": False}), "masa train")
    for step, accuracy in ((1, 0.9), (2, 0.4), (3, 0.1)):
        evaluated(run, step, accuracy)
    assert held(run) == [2, 3]


def test_a_broken_best_checkpoint_gives_way_to_the_next_best(run: Run) -> None:
    for step, accuracy in ((1, 0.9), (2, 0.4), (3, 0.1)):
        evaluated(run, step, accuracy)
    (run.path / "checkpoints" / "step-000001" / "state.json").unlink()
    assert run.weights("best")[0] == 2


def test_the_weights_of_a_run_without_checkpoints_are_its_trained_model_or_a_sentence(run: Run) -> None:
    with pytest.raises(RunError, match="neither a checkpoint nor a trained model yet; go on with it with `masa resume"):
        run.weights()
    run.append_metrics({"step": 9})
    run.save_model(weights(9))
    run.set_status("finished")
    assert run.weights() == (9, run.path / "model")

WRITER = """
import signal, sys
from masa_lib.runs.folder import Run
def write(folder):
    (folder / "state.json").write_text("{}")
    with (folder / "weights.bin").open("wb") as file:
        file.write(bytes(2000))
        file.flush()
        print("half", flush=True)
        signal.pause()
run = Run.open(sys.argv[1])
with run.lock():
    run.save_checkpoint(50, write)
"""


def test_a_process_killed_while_it_writes_a_checkpoint_leaves_the_one_before(run: Run) -> None:
    run.save_checkpoint(25, weights(25))
    writer = start(WRITER, run.path)
    try:
        assert writer.stdout.readline() == "half\n"
    finally:
        writer.kill()
        writer.communicate()
    assert (run.path / "checkpoints" / "step-000050.tmp" / "weights.bin").stat().st_size == 2000
    assert run.latest_checkpoint() == (25, run.path / "checkpoints" / "step-000025")
    run.rewind(25)
    assert os.listdir(run.path / "checkpoints") == ["step-000025"]


# Kill at every file operation: an audit hook in a forked child counts them and kills it at the n-th.
KILLS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from masa_lib import config
from masa_lib.runs.folder import Run

def kill_at(n, path):
    seen = itertools.count()
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"):
            if (path in str(arguments[0]) or isinstance(arguments[0], int)) and next(seen) == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def write(folder):
    (folder / "state.json").write_text('{"value": 6}')

def records(run):
    return {str(file.relative_to(run.path)): file.read_bytes() for file in run.path.rglob("*")
            if file.is_file() and file.name != ".lock"}

def killed(operation, check):
    for n in itertools.count():
        path = Path(sys.argv[1]).with_name("copy")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sys.argv[1], path)
        run = Run.open(path)
        child = os.fork()
        if child == 0:
            kill_at(n, str(path))
            operation(run)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        check(run, finished=os.WIFEXITED(status))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return n

def save(run):
    run.save_checkpoint(6, write)

def check_save(run, finished):
    step, folder = run.latest_checkpoint()
    assert step == 6 or (step == 4 and not finished), (step, finished)
    assert (folder / "state.json").read_text() == '{"value": %d}' % step

def rewind(run):
    run.rewind(2)

def check_rewind(run, finished):
    step, _ = run.latest_checkpoint()
    assert set(range(1, step + 1)) <= set(run.metrics()["step"])
    assert set(run.rollout_steps()) <= {int(file.stem[5:]) for file in run.path.glob("rollouts/*")}
    run.rewind(2)
    expected.setdefault("records", records(run))
    assert records(run) == expected["records"] and run.metrics()["step"].tolist() == [1, 2]

def append(run):
    run.append_metrics({"step": 7})

def check_append(run, finished):
    assert run.metrics()["step"].tolist() in [list(range(1, 7)), list(range(1, 8))][finished:]

expected = {}
print(killed(save, check_save), killed(rewind, check_rewind), killed(append, check_append))
"""


def test_a_kill_at_any_file_operation_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configs.replace(Config(), {"record.checkpoints_kept": 2}), "masa train")
    for step in range(1, 7):
        run.write_rollouts(step, rollouts_of(step))
        run.append_metrics({"step": step, "accuracy": step / 8})
        if step in (2, 4):
            run.write_evaluation(step, {"accuracy": step / 8}, pd.DataFrame({"n": [1]}))
            run.save_checkpoint(step, lambda folder, step=step: (folder / "state.json").write_text(
                json.dumps({"value": step})) and None)
    run.append_change(5, {"update.learning_rate": 1e-5})
    process = start(KILLS, run.path)
    output, _ = process.communicate()
    assert process.returncode == 0
    saves, rewinds, appends = map(int, output.split())
    assert saves > 10 and rewinds > 15 and appends >= 2


def test_rewind_drops_what_is_newer_and_keeps_the_changes(run: Run) -> None:
    run.write_evaluation(0, {"accuracy": 0.1}, pd.DataFrame({"n": [1]}))
    for step in range(1, 5):
        run.write_rollouts(step, rollouts_of(step))
        run.append_metrics({"step": step, "loss": step / 3})
        run.write_evaluation(step, {"accuracy": step / 8}, pd.DataFrame({"n": [1]}))
        run.save_checkpoint(step, weights(step))
    run.append_change(4, {"update.learning_rate": 1e-5})
    (run.path / "rollouts" / "step-000009.parquet").write_bytes(b"written, and killed before its line")
    kept = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    run.rewind(3)
    assert (run.path / "metrics.jsonl").read_bytes() == b"".join(kept)
    assert run.rollout_steps() == [1, 2, 3] == sorted(set(run.rollouts()["step"]))
    assert run.evaluations()["step"].tolist() == [0, 1, 2, 3]
    assert not list(run.path.glob("*/step-00000[49]*"))
    assert run.latest_checkpoint()[0] == 3 and len(run.changes()) == 1
    run.rewind(-1)
    assert run.metrics().empty and run.evaluations().empty and run.latest_checkpoint() is None
    assert len(run.changes()) == 1
