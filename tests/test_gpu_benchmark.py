"""The benchmark for GPUs, on the CPU with tiny sizes: known to work before a GPU is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "benchmarks/gpu.py", "--model", "pocket", "--small", "--steps", "2", "--set",
           "model.device=cpu", "model.threads=1"]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_the_cpu_and_saves_a_record(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--engines", "transformers", "nothing", "--methods", "masa", "--out", tmp_path,
                           "--json"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)
    record = json.loads(done.stdout)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text(encoding="utf8")) == record
    assert record["hardware"]["name"] and record["git"] and record["versions"]["torch"]
    found, failed = record["pairs"]
    assert (found["method"], found["engine"]) == ("masa", "transformers")
    parts = sum(found[f"seconds_{phase}"] for phase in ("generate", "grade", "update"))
    assert 0 < parts <= found["seconds_total"] * 1.001
    assert 0 < found["mfu"] < 1.5 and found["plan_gb"] > 0 and found["memory_gb"] > 0
    assert found["generate_tokens_s"] > 0 and found["peak_tflops"] > 0
    assert "nothing" in failed["error"] and done.returncode == 1
