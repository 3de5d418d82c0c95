"""The benchmark beside TRL at its smallest size, and the tables of costs in docs/scaling.md."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from masa_lib.lessons import scaling
from masa_lib.models import step_cost, tiers

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "benchmarks/vs_trl.py", "--smoke", "--updates", "1", "--repeats", "1", "--grid", "1",
           "--json", "--set", "model.device=cpu"]


@pytest.mark.slow
def test_the_benchmark_beside_trl_runs_at_its_smallest_size() -> None:
    done = subprocess.run([*COMMAND, "update.token_budget=256"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["sides"].keys() == {"trl", "ours", "ours, equal micro-batch"}
    for (row,) in record["sides"].values():
        assert row["samples"] == 8 and 8 <= row["tokens"] <= 8 * 32
        assert row["seconds"] == pytest.approx(row["generate"] + row["grade"] + row["update"])
        assert row["samples_s"] == pytest.approx(8 / row["seconds"])
    assert record["trl_setting"] == {"pieces": 1, "continuous": False}
    assert record["ratios"]["samples_s"] == pytest.approx(
        record["sides"]["ours"][0]["samples_s"] / record["sides"]["trl"][0]["samples_s"])
    assert all(0 < share < 1 for share in record["share_of_limit"].values())
    assert 0.01 < record["profile"]["matrix products"] < 1 > record["profile"]["attention"] > 0.01
    assert record["machine"]["flops"] > 1e9 and record["machine"]["bandwidth"] > 1e8


def test_the_scaling_page_shows_the_recorded_ratios() -> None:
    records = sorted((ROOT / "data" / "benchmarks" / "vs_trl").glob("*.json"))
    done = subprocess.run([sys.executable, "benchmarks/vs_trl.py", "--table", *map(str, records)], cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf8")
    assert records and re.findall(r"<!-- trl -->\n(.*?)\n<!-- end -->", page, re.DOTALL) == [done.stdout.strip()]
    for path in records:
        environment = json.loads(path.read_text(encoding="utf8"))["environment"]
        assert not environment["git"]["dirty"] and environment["hardware"]["cpu"]


def test_the_cost_formulas_are_near_what_was_measured() -> None:
    found = scaling.check(ROOT / "data" / "runs" / "baseline")
    assert found["predicted / measured"].between(0.8, 1.25).all() and (found["median error"] < 0.2).all()


def test_the_tables_of_the_scaling_page_are_those_of_the_formulas() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf8")
    for name, table in scaling.tables(ROOT / "data" / "runs" / "baseline").items():
        (found,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
        assert found == table, f"`python -m masa_lib.lessons.scaling` prints the table {name} anew"


def test_costs_grow_as_they_should() -> None:
    sizes, hardware = tiers.TIERS["qwen3-8b"].architecture, step_cost.Hardware()
    load = scaling.METHODS["MASA"]

    def step(**changes: float) -> float:
        return sum(step_cost.phases(sizes, dataclasses.replace(load, **changes), hardware).values())

    assert step() < step(solutions=32) < 2.1 * step() and step() < step(predictions=32)
    assert step(length=8000) > step() > step(cut=0.3)
    assert step(dropped=0.5) > step()  # as many places, more predictions
    one, two = (step_cost.phases(sizes, load, dataclasses.replace(hardware, gpus=gpus)) for gpus in (4, 8))
    assert one["update"] == pytest.approx(2 * two["update"])
    assert two["solutions"] < one["solutions"] < 2 * two["solutions"]  # the weights are read as often
    assert step_cost.update(sizes, 10, 1, True).flops == pytest.approx(step_cost.update(sizes, 10, 1).flops * 4 / 3)
