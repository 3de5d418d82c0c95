"""How long the training of notebook 04 takes until held-out beliefs follow the truth, in steps and seconds.

For each seed the settings of the notebook's own cell are trained in a process of its own, as the panel does it, and
ended with the step after which r, the correlation of held-out beliefs and pass rates, has been above `--r` for `--for`
readings in a row. Counted is what the reader waits for: from the start of the process, with loading, evaluations and
readings. Clock seconds mean something on an idle machine alone, so the load of the machine is told with them; processor
seconds depend on it less, but grow with it, too. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from masa_lib import ROOT
from masa_lib.lessons.widgets import training_records
from masa_lib.models import tiers
from masa_lib.runs import live_control
from masa_lib.runs.provenance import environment
from masa_lib.runs.records import READINGS

NOTEBOOK = ROOT / "notebooks" / "04_train_masa.ipynb"


def settings(steps: int, seed: int) -> dict[str, Any]:
    """What notebook 04 trains, as its cell has it, with so many steps and this seed."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
    source = next(text for text in ("".join(cell["source"]) for cell in cells) if "\nSETTINGS = {" in text)
    [found] = [node.value for node in ast.parse(source).body
               if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SETTINGS"]
    return eval(ast.unparse(found), {"STEPS": steps}) | {"seed": seed}  # our own notebook's table


def processor(process: psutil.Process) -> float:
    """Seconds of processors that a process and its children have used."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def train(wanted: Mapping[str, Any], level: float, readings: int) -> pd.DataFrame:
    """Train until r has been above the level for so many readings, or to the end; r and seconds after each step."""
    out, times = Path(tempfile.mkdtemp()) / "run", {}
    begun = time.perf_counter()
    process = live_control.start(out, wanted)
    watched = psutil.Process(process.pid)

    def enough(state: str, step: int) -> bool:
        done = (out / READINGS).read_bytes().count(b"\n") if (out / READINGS).exists() else 0
        if not done or done in times:
            return False
        times[done] = {"seconds": time.perf_counter() - begun, "processor": processor(watched)}
        known = training_records.knowledge(training_records.read(out))["r"].loc[1:]
        return len(known) >= readings and bool((known.tail(readings) > level).all())

    live_control.wait(out, enough, process)
    process.terminate()
    process.wait()
    return training_records.knowledge(training_records.read(out)).join(pd.DataFrame(times).T)


def reached(rows: pd.DataFrame, level: float, readings: int) -> dict[str, float]:
    """The first of so many steps in a row with r above the level; nothing where there is none."""
    above = (rows["r"] > level).loc[1:].rolling(readings).sum() == readings
    if not above.any():
        return {}
    step = above.idxmax() - readings + 1
    timed = rows.loc[step:].dropna(subset="seconds").iloc[0]  # of a step too quick to be seen, the next one's
    return {"step": int(step), **timed[["r", "seconds", "processor"]].astype(float).round(2).to_dict()}


def main() -> None:
    """Train each seed and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="at most")
    parser.add_argument("--r", type=float, default=0.6)
    parser.add_argument("--for", dest="readings", type=int, default=3, help="steps in a row above it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    for seed in range(options.seeds):
        rows = train(settings(options.steps, seed), options.r, options.readings)
        found[seed] = reached(rows, options.r, options.readings) | {"load": round(os.getloadavg()[0], 1)}
        if not options.json:
            print(f"seed {seed}: {found[seed]}", flush=True)
    if options.json:
        told = environment(tiers.config(settings(options.steps, 0)), "python benchmarks/alignment.py "
                           + " ".join(sys.argv[1:]))
        print(json.dumps({**vars(options), "environment": told, "seeds": found}))


if __name__ == "__main__":
    main()
