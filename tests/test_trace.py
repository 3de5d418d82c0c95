"""Which rooms a training step enters, as benchmarks/trace_step.py prints them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: the method, who samples and learns, and what these stand on; `analysis` for one correlation
ROOMS = {"method", "engines", "training", "gates", "tasks", "models", "config.py", "analysis"}


def test_a_step_stays_in_the_rooms_that_a_reader_of_the_method_opens() -> None:
    printed = subprocess.run([sys.executable, ROOT / "benchmarks" / "trace_step.py", "--method", "masa"], text=True,
                             capture_output=True, check=True).stdout.splitlines()
    files = {line.split()[0]: int(line.split()[2]) for line in printed[1:-1]}
    assert {name.split("/")[0] for name in files} <= ROOMS
    assert {"method/rollouts.py", "method/objective.py", "training/trainer.py", "training/learner.py"} <= set(files)
    inside = sum(lines for name, lines in files.items() if name.split("/")[0] in ("method", "engines", "training"))
    assert inside > 0.7 * sum(files.values())
