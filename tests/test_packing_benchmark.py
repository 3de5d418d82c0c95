"""The benchmark of packing counts what it says it counts."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "packing.py"))


def test_tokens_of_a_micro_batch_are_counted_packed_and_padded() -> None:
    samples = [BENCHMARK["Sample"](prompt, (1,) * length, (0.0,) * length, 1.0, 1.0)
               for prompt, length in (((1, 2), 3), ((1, 2), 5), ((1, 2, 3, 4), 2))]
    found = BENCHMARK["tokens"](samples, 10**6)
    assert found == {"packed": 6 + 7, "shared": 2 * 4 + 3 * 4, "repeated": 4 + 6 + 5, "whole": 3 * 6}


def test_a_recorded_step_is_computed_packed_and_whole() -> None:
    found = BENCHMARK["run"](argparse.Namespace(run=str(ROOT / "data/runs/baseline/grpo-s0"), samples=4, repeats=1,
                                                threads=1))
    assert found["sequences"] == 4 and len(found["turns"]) == 1
    assert found["ratio"] == pytest.approx(found["turns"][0]["whole"] / found["turns"][0]["packed"])
    assert 0 < found["padding_whole"] < 1 and 0 < found["padding_shared"] < 1


def test_the_table_of_the_scaling_page_is_that_of_the_records() -> None:
    records = [json.loads(path.read_text(encoding="utf8"))
               for path in sorted((ROOT / "data" / "benchmarks" / "packing").glob("*.json"))]
    assert records and f"<!-- packing -->\n{BENCHMARK['table'](records)}\n<!-- end -->" in (
        ROOT / "docs" / "scaling.md").read_text(encoding="utf8")
