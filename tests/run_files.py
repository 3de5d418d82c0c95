"""What a test writes into a run's folder, and reads of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]


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
