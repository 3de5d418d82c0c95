"""Whether a run still learns, from its metrics alone: what its log, the panel and the report say of one that does not.

A collapsed run goes on as if nothing were wrong: its loss is 0, its status in the end "finished". So does one whose
engine samples from other probabilities than those that are learned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from masa_lib.crash_safe_files import logger

#: steps in a row that make a collapse; of the recorded runs none has more than three without a gradient
STEPS = 5
#: nats a token below which a policy says the same whatever it is asked; recorded runs stay above 0.006
ENTROPY = 0.001
#: accuracy from which on a batch without a gradient means that there is nothing left to learn
SOLVED = 0.95
#: mean gap of a step's log-probs between engine and trainer that rounding explains, nats a token, by `model.precision`
#: (recorded runs: 5e-7 and 0.016), and steps in a row above it that are said
GAP, GAP_STEPS = {"float32": 0.01, "bfloat16": 0.1}, 3


def collapse(metrics: pd.DataFrame) -> str:
    """One sentence on a run whose last steps, STEPS or more, taught nothing; empty where they did.

    Args:
        metrics: one row a step, with `step`, `loss`, `entropy` (nats a token) and `accuracy`.
    """
    if not {"step", "loss", "entropy"} <= set(metrics.columns):
        return ""
    still, flat = metrics["loss"].eq(0), metrics["entropy"].lt(ENTROPY)
    last = metrics[(still | flat)[::-1].cummin()[::-1].astype(bool)]
    if len(last) < STEPS:
        return ""
    since = f"Since step {last['step'].iloc[0]:.0f}"
    if not still[last.index].all():
        return (f"{since} the run has collapsed: its answers have an entropy below {ENTROPY} nats a token, so groups "
                "no longer differ. Go back to a checkpoint before, with a lower update.learning_rate.")
    if "accuracy" in last and last["accuracy"].mean() >= SOLVED:
        return f"{since} all is solved and nothing left to learn (loss 0): take harder problems."
    return (f"{since} the run has collapsed: no group has a gradient (loss 0, no entropy). Its problems are out of "
            "reach, or it answers all alike; go back to a checkpoint before, with a lower update.learning_rate.")


def drift(metrics: pd.DataFrame, precision: str) -> str:
    """One sentence on the first steps, GAP_STEPS in a row, whose samples were not the policy's; empty without such.

    Steps without a gradient have no gap. Those of several updates do not count: the policy moves between them.

    Args:
        metrics: one row a step, with `step`, `logp_gap` (nats a token) and `updates`.
        precision: `model.precision`.
    """
    if not {"step", "logp_gap", "updates"} <= set(metrics.columns):
        return ""
    rows = metrics[metrics["logp_gap"].notna() & metrics["updates"].le(1)]
    wide = rows["logp_gap"].gt(GAP[precision]).rolling(GAP_STEPS).sum().eq(GAP_STEPS).to_numpy()
    if not wide.any():
        return ""
    found = rows.iloc[wide.argmax() - GAP_STEPS + 1:wide.argmax() + 1]
    return (f"From step {found['step'].iloc[0]:.0f} to {found['step'].iloc[-1]:.0f} the engine's log-probs were "
            f"{found['logp_gap'].mean():.2g} nats a token from the trainer's, and rounding explains "
            f"{GAP[precision]:g}: what was sampled is not what was learned from. Take another sampling.engine "
            "or model.precision.")


def troubles(metrics: pd.DataFrame, precision: str) -> list[str]:
    """All that is to be said of a run, a sentence each; see `collapse` and `drift`."""
    return [said for said in (collapse(metrics), drift(metrics, precision)) if said]


class Watch:
    """Warns in the log: of a collapse once each time that it begins, of a drift once.

    Args:
        precision: `model.precision`.
    """

    def __init__(self, precision: str) -> None:
        self._precision, self._drifted = precision, False
        self._rows: list[dict[str, Any]] = []
        self._said = ""

    def observe(self, row: Mapping[str, Any]) -> None:
        """Take note of a finished step's metrics."""
        self._rows.append({key: row[key] for key in ("step", "loss", "entropy", "accuracy", "logp_gap", "updates")})
        rows = pd.DataFrame(self._rows)
        if not self._drifted and (drifted := drift(rows, self._precision)):
            logger.warning(drifted)
            self._drifted = True
        found = collapse(rows)
        if found and found != self._said:
            logger.warning(found)
        self._said = found
        if not found:
            self._rows = self._rows[-STEPS:]
