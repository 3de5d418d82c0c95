"""The two streams in a table of rollouts (`rollouts.COLUMNS`): solutions and predictions."""

from __future__ import annotations

import pandas as pd

STREAMS = ("solution", "meta")


def solutions_of(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the solutions."""
    return table[table["stream"] == "solution"]


def predictions_of(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the predictions that were sampled."""
    return table[table["stream"] == "meta"]


def rewarded(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the solutions that take part in the update."""
    return table[(table["stream"] == "solution") & table["reward"].notna()]
