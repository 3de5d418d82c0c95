"""A run's folder on a full disk, a real one: one sentence, and nothing that was written is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from run_files import content, rollouts_of, value_of, weights
from safetensors.torch import save_file
from small import largest_file

from masa_lib.config import Config
from masa_lib.crash_safe_files import RunError
from masa_lib.runs.folder import Run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A new run that keeps two checkpoints."""
    return Run.create(tmp_path / "run", Config(seed=7), "masa train")


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
