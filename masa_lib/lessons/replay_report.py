"""What `masa replay` prints of a recorded run: which gate, cap and share of re-checks its own predictions recommend.

The numbers are those of `replay`; here are the choice among them, the sentences and the tables.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from masa_lib import crash_safe_files as files
from masa_lib.analysis import text_tables
from masa_lib.config import Config
from masa_lib.lessons.replay import (
    LEAST,
    PHASES,
    RECALL,
    Groups,
    ReplayError,
    best_caps,
    best_gates,
    ceiling,
    every_cap,
    every_gate,
    read_groups,
    recheck_curve,
    recommend,
)
from masa_lib.runs.folder import Run

#: columns of the printed tables and how they are shown
FORMATS = {"predictions": "d", "rule": "", "threshold": ".3f", "aggregate": "", "multiplier": ".2f", "recheck": ".2f",
           "dropped": ".2f", "precision": ".2f", "recall": ".2f", "signal_lost": ".2f", "tokens_saved": "+.3f",
           "meta_share": ".2f", "gain": ".2f", "right_cut": ".3f", "stopped": ".2f", "precision_low": ".2f",
           "precision_high": ".2f", "recall_low": ".2f", "recall_high": ".2f", "unmeasured": ".2f"}


def replay(path: str | Path, as_json: bool = False) -> str:
    """Replay a run: what the terminal shows.

    Args:
        path: of the run.
        as_json: give one JSON object, the settings recommended in each phase, instead of text.

    Raises:
        RunError, ReplayError: the run cannot be read, or has no groups to replay or to drop.
    """
    groups = read_groups(path)
    gates, stops, phase = every_gate(groups), every_cap(groups), PHASES[2]
    chosen = {name: recommend(gates, name) for name in PHASES}
    if (last := chosen[phase]) is None:
        raise ReplayError(f"No gate drops half of the groups without a signal in the last third of the run {path}: "
                          "nothing was predicted, or every group has a signal.")
    count, config = int(last["predictions"]), groups.config
    capped = best_caps(stops, phase, count, config.cap.cut)
    checks = recheck_curve(groups, last["rule"], last["threshold"], count)
    if as_json:
        return files.line({"groups": len(groups.steps_P), "caps": capped.to_dict("records"), "gates": {
            name: None if row is None else row.to_dict() for name, row in chosen.items()}}).decode().strip()
    about = _about(path, groups)
    verdicts = [*(_verdict(name, row) for name, row in chosen.items() if row is not None), *_limit(path, config)]
    said = [about, *verdicts, *_stops(capped, config), *_sureness(checks)]
    return "\n\n".join(["\n".join(textwrap.fill(part, 110) for part in said),
                        *(f"{head}\n{_text(table)}" for head, table in (
                            (f"The gate by M, {phase}:", best_gates(gates, phase)),
                            (f"The cap at M = {count}, {phase}:", capped),
                            (f"The re-checks at M = {count}, {phase}:", checks)) if len(table))])


def _about(path: str | Path, groups: Groups) -> str:
    flat = groups.phases_FP @ ~groups.signal_P / groups.phases_FP.sum(axis=1)
    return (f"{Path(path).name}: {len(groups.steps_P)} groups of {len(np.unique(groups.steps_P))} recorded steps, G = "
            f"{groups.right_PG.shape[1]}, M = {groups.rates_PM.shape[1]}. Share without a signal: "
            + ", ".join(f"{name} {share:.2f}" for name, share in zip(PHASES, flat, strict=True)) + ".")


def _verdict(phase: str, row: pd.Series) -> str:
    reached = ("the least that reaches precision 0.9 at recall 0.5 is" if row["good"] else
               f"nothing reaches precision 0.9 at recall 0.5 with {LEAST} groups dropped; nearest is")
    return (f"{phase}: {reached} M = {row['predictions']}, rule {row['rule']} below {row['threshold']:.3g}. It drops "
            f"{row['dropped']:.2f} of the groups ({row['groups_dropped']:.0f}), precision {row['precision']:.2f}, "
            f"recall {row['recall']:.2f}; it loses {row['signal_lost']:.2f} of the signal and saves "
            f"{row['tokens_saved']:+.3f} of the solution tokens, predictions paid ({row['meta_share']:.2f}); "
            f"{row['gain']:.2f} times the signal per token.")


def _limit(path: str | Path, config: Config) -> list[str]:
    """What an oracle could do after training, where the last evaluation has solutions enough to tell."""
    run, solutions = Run.open(path), config.sampling.solutions
    steps = run.evaluations()["step"]
    table = run.evaluation_table(int(steps.iloc[-1])) if len(steps) else pd.DataFrame({"n": [0]})
    if table["n"].min() <= solutions:
        return []
    found = ceiling(table, solutions)
    best = found[found["recall"] >= RECALL]
    reach = "less than half of those without a signal"
    if len(best):
        row = best.loc[best["precision"].idxmax()]
        reach = f"with precision {row['precision']:.2f} at recall {row['recall']:.2f}"
    return [f"Held-out problems after training: who knows {table['n'].min() - solutions} other solutions of a problem "
            f"drops groups of {solutions} {reach}; the rest is luck."]


def _stops(capped: pd.DataFrame, config: Config) -> list[str]:
    found = [f"{row.multiplier:g} x the {row.aggregate} saves {row.tokens_saved:.3f} of the solution tokens and stops "
             f"{row.stopped:.2f} of the solutions" for row in capped.itertuples()]
    return [f"Caps that cut at most {config.cap.cut:g} of the right solutions: {'; '.join(found) or 'none'}."]


def _sureness(checks: pd.DataFrame) -> list[str]:
    return ["In one window, by the share that is re-checked, precision comes out as " + ", ".join(
        f"{row.precision:.2f} ({row.precision_low:.2f} to {row.precision_high:.2f}) at {row.recheck:g}"
        for row in checks.itertuples()) + "."]


def _text(table: pd.DataFrame) -> str:
    """The columns of FORMATS that a table has, as aligned text."""
    names = [name for name in FORMATS if name in table]
    return text_tables.aligned([[name.replace("_", " ") for name in names], *(
        [format(value, FORMATS[name]) for name, value in zip(names, row, strict=True)]
        for row in table[names].itertuples(index=False))])
