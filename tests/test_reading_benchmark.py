"""The benchmark of readings counts what it says it counts."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_what_a_reading_adds_to_the_solutions_is_the_other_candidates_and_the_forced_beginnings():
    found = runpy.run_path(str(ROOT / "benchmarks" / "reading.py"))["run"](argparse.Namespace(
        model="pocket", engine="transformers", precision="float32", candidates=4, admitted=1, threads=0, repeats=1))
    tokens = {name: part["tokens"] for name, part in found["parts"].items()}
    assert all(part["seconds"] > 0 for part in found["parts"].values())
    assert tokens["reading"] < tokens["predictions"] * 0.3
    added = tokens["reading and solutions"] - tokens["solutions"]
    assert tokens["reading"] / 2 < added < tokens["reading"]
    assert found["tokens_reading_to_predictions"] == pytest.approx(tokens["reading"] / tokens["predictions"])
    assert found["tokens_added_to_solutions"] == pytest.approx(added / tokens["solutions"])
