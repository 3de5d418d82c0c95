"""Data frames as Parquet files: written whole, read with their lists as lists, and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from masa_lib import crash_safe_files as files
from masa_lib.crash_safe_files import RunError
from masa_lib.errors import brief


def write(path: Path, table: pd.DataFrame) -> None:
    """Write a data frame as Parquet (zstd); see `as_arrow`."""
    path.parent.mkdir(exist_ok=True)
    arrow = as_arrow(table)
    files.replace(path, lambda temporary: pq.write_table(arrow, temporary, compression="zstd"))


def as_arrow(table: pd.DataFrame) -> pa.Table:
    """A data frame as pyarrow has it. Half of a surrogate pair, which Parquet cannot hold, is escaped."""
    try:
        return pa.Table.from_pandas(table, preserve_index=False)
    except UnicodeEncodeError:  # JSON lets a model write one into a notion
        escaped = {name: column.map(_escape) for name, column in table.items() if column.dtype == object}
        return pa.Table.from_pandas(table.assign(**escaped), preserve_index=False)


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf8", "backslashreplace").decode("utf8")
    return [_escape(entry) for entry in value] if isinstance(value, list | tuple) else value


def read(paths: list[Path]) -> pd.DataFrame:
    """The rows of several Parquet files, lists as Python lists.

    Raises:
        RunError: a file is missing or broken.
    """
    try:
        table = pa.concat_tables([_read(path) for path in paths], promote_options="permissive")
    except pa.ArrowException as error:
        raise RunError(f"The tables in {paths[0].parent} do not fit together: {error}") from error
    if len(set(table.column_names)) < table.num_columns:
        raise RunError(f"A table in {paths[0].parent} has a column twice; its columns are {brief(table.column_names)}.")
    frame = table.to_pandas()
    for field in table.schema:
        if pa.types.is_list(field.type):
            frame[field.name] = pd.Series(table[field.name].to_pylist(), index=frame.index, dtype=object)
    return frame


def check_columns(table: pd.DataFrame, what: str, *, numbers: Sequence[str] = (), texts: Sequence[str] = (),
                  lists: Sequence[str] = ()) -> None:
    """Refuse a table that lacks a column, or has another kind of value in it; numbers and lists may be missing.

    Args:
        table: as it was read.
        what: how the sentence calls it.
        numbers: columns of numbers.
        texts: columns of texts.
        lists: columns of lists of numbers.

    Raises:
        RunError: names the column.
    """
    kinds = {"a number": (numbers, _is_number), "a text": (texts, lambda value: isinstance(value, str)),
             "a list of numbers": (lists, lambda value: isinstance(value, list) and all(map(_is_number, value)))}
    for kind, (names, fits) in kinds.items():
        for name in names:
            if name not in table:
                raise RunError(f"{what} has no column {name!r}; it has {brief(list(table))}.")
            if kind == "a number" and pd.api.types.is_numeric_dtype(table[name]):
                continue
            if wrong := [value for value in table[name]
                         if not (fits(value) or (kind != "a text" and _is_missing(value)))]:
                raise RunError(f"{what} has {brief(wrong[0])} in its column {name!r}, which takes {kind}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise RunError(f"{path} is missing. Restore it, or ask only for the steps that are there.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{path} is broken and cannot be read: {error}") from error
