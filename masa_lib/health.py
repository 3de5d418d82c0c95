"""Whether a run still learns, from its metrics alone: what its log, the panel and the report say of one that does not.

A collapsed run goes on as if nothing were wrong: its loss is 0, its status in the end "finished".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from masa_lib.files import logger

#: steps in a row that make a collapse; of the recorded runs none has more than three without a gradient
STEPS = 5
#: nats a token below which a policy says the same whatever it is asked; recorded runs stay above 0.006
ENTROPY = 0.001
#: accuracy from which on a batch without a gradient means that there is nothing left to learn
SOLVED = 0.95


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


class Watch:
    """Warns of a collapse in the log, once each time that it begins."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._said = ""

    def observe(self, row: Mapping[str, Any]) -> None:
        """Take note of a finished step's metrics."""
        self._rows.append({key: row[key] for key in ("step", "loss", "entropy", "accuracy")})
        found = collapse(pd.DataFrame(self._rows))
        if found and found != self._said:
            logger.warning(found)
        self._said = found
        if not found:
            self._rows = self._rows[-STEPS:]
