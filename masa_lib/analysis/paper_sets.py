"""What the answers to the paper's sets come to, beside what the paper printed.

Deliberately no judgement of a model by a number alone: published ones stand beside it, and how little few problems say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from masa_lib.analysis import intervals, text_tables
from masa_lib.analysis.compare import PAPER
from masa_lib.config import Config
from masa_lib.models.tiers import resolve
from masa_lib.tasks.data_sets import DATA_SETS, Harness

#: the published model that stands beside one of another size
LARGEST = "Qwen3-14B-Base"
#: the sets that the paper was evaluated on, by our name
PUBLISHED = {name: entry for name, entry in DATA_SETS.items() if entry.paper}
EVALPLUS = "evalplus"


def score(name: str, harness: Harness, found: Sequence[Sequence[Mapping[str, Any]]], config: Config) -> dict[str, Any]:
    """What the passes of a set come to.

    Args:
        name: of the set, or of the task.
        harness: of the set.
        found: the passes of each of its tasks.
        config: of the model.

    Returns:
        Set, problems, passes (the fewest of its tasks), accuracy with its 95 % interval over problems (0 to 1), the
        published accuracies of the nearest model (None where there are none), and in what the set is another one.
    """
    rates = [rate for rows in found for rate in np.mean([row["right"] for row in rows], axis=0)]
    mean, low, high = intervals.share_interval(rates)
    name = PUBLISHED[name].paper if name in PUBLISHED else name
    return {"set": name, "problems": len(rates), "samples": min(map(len, found)), "accuracy": mean,
            "accuracy_low": low, "accuracy_high": high, **published(name, Path(resolve(config.model.name)).name),
            "unlike": harness.unlike}


def published(benchmark: str, model: str, folder: Path = PAPER) -> dict[str, Any]:
    """Accuracies (0 to 1) that version 1 of the paper prints of a set: of this model, or else of the largest."""
    nothing = {"grpo": None, "masa": None, "published": None}
    if not (folder / "results.csv").exists():  # the installed package comes without
        return nothing
    rows = pd.read_csv(folder / "results.csv").query(
        "version == 'v1' and table in ('Table 1', 'Table 2') and metric == 'pass@1' and benchmark == @benchmark")
    base = model if model in set(rows["base_model"]) else LARGEST
    values = rows[rows["base_model"] == base].set_index("method")["value"]
    return {"grpo": values["GRPO"] / 100, "masa": values["MASA"] / 100, "published": base} if len(values) else nothing


def text(rows: Sequence[Mapping[str, Any]], named: bool = True) -> str:
    """The scores as a Markdown table in percent, and what is to be known of them.

    Args:
        rows: of `score`.
        named: whether the user named the sets; else it is said which ones were left out.
    """
    head = ["set", "problems x samples", "accuracy, %", "95 % interval", "published GRPO", "published MASA", "of"]
    cells = [[row["set"], f"{row['problems']} x {row['samples']}", _percent(row["accuracy"]),
              f"{_percent(row['accuracy_low'])} to {_percent(row['accuracy_high'])}", _percent(row["grpo"]),
              _percent(row["masa"]), row["published"] or "-"] for row in rows]
    unlike = [f"{row['set']}: {row['unlike']}." for row in rows if row["unlike"]]
    notes = filter(None, [_settles_little(rows), *unlike, *([] if named else _left_out())])
    return "\n\n".join(filter(None, [text_tables.markdown([head, *cells]), "\n".join(notes)]))


def _settles_little(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where chance over problems is larger than what the published models differ by."""
    found = [f"{row['set']} ({row['problems']} problems, {width:.1f} points wide; they differ by {apart:.1f})"
             for row in rows if row["grpo"] is not None
             and (width := 100 * (row["accuracy_high"] - row["accuracy_low"]))
             > (apart := 100 * abs(row["masa"] - row["grpo"]))]
    return ("Few problems settle little: the interval is wider than what the two published models differ by on "
            f"{', '.join(found)}. It says how other problems of the kind would come out, nothing of other trainings."
            if found else "")


def _left_out() -> list[str]:
    entries = PUBLISHED.values()
    ours = ", ".join(entry.paper for entry in entries if entry.hub and not entry.harness)
    none = ", ".join(entry.paper for name, entry in PUBLISHED.items()
                     if not entry.hub and not entry.harness and name != EVALPLUS)
    code = ", ".join(entry.paper for entry in entries if entry.harness and entry.harness.runs_code)
    return [f"Not here but by `masa eval --problems`: {ours}. lm-evaluation-harness has no task of {none}.",
            f"{code} and EvalPlus execute code that the model has written: those with --run-code, in a container that "
            "may be lost; what EvalPlus has found there is read by --evalplus."]


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f}"
