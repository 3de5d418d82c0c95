"""The packed form of a study: all its runs in a few files, which are read and never written to.

As folders, a study of fifty runs is more than a thousand small files. Packed, it is one table each of metrics,
evaluations (a row an evaluated step), problems (a row an evaluated problem), rollouts, beliefs and readings, one file
each of configs, environments, states and live changes, and a folder of trained models. Every table has the columns
`run` and `step`; which columns a run has, and of which type, stands in the table's own metadata, so that each run
reads as it did from its folder. `packing` writes this form, and `folder.Run.open` reads both.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from masa_lib import crash_safe_files as files
from masa_lib.crash_safe_files import RunError
from masa_lib.errors import brief
from masa_lib.runs import parquet

CONFIGS, ENVIRONMENTS, STATUSES, CHANGES = "configs.toml", "environments.json", "statuses.json", "changes.json"
METRICS, EVALUATIONS, PROBLEMS, ROLLOUTS, BELIEFS, READINGS = TABLES = (
    "metrics", "evaluations", "problems", "rollouts", "beliefs", "readings")
MODELS = "models"
#: where a new packed form lies whole before its files take their places; what is still there is read from there
ARRIVING = ".packing"
#: the entry of a table's metadata with the columns of each run
COLUMNS = b"masa.columns"
#: types of columns that are restored, by pandas' names
TYPE = re.compile(r"(?:u?int|Int|UInt)(?:8|16|32|64)|(?:float|Float)(?:32|64)|bool|boolean|str|object")
#: bytes that a file of a packed study may have, and values that its table may hold
MOST_BYTES, MOST_VALUES = 2**28, 10**8
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A packed table: its rows, first row and number of rows of each run, and each run's columns with their types."""

    rows: pa.Table
    places: Mapping[str, tuple[int, int]]
    columns: Mapping[str, Mapping[str, str]]


class PackedStudy:
    """The packed runs in a study's folder.

    Each file is read once, however many runs are asked for, and again only after it has changed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def runs(self) -> list[str]:
        """The names of the packed runs; none where nothing is packed."""
        path = self._place(CONFIGS)
        return list(_read(path, _configs)) if path.is_file() else []

    def config(self, run: str) -> dict[str, Any]:
        """The nested settings that the config of a run names."""
        return copy.deepcopy(_read(self._place(CONFIGS), _configs)[run])

    def told(self, name: str, run: str, default: Any) -> Any:
        """What one of the JSON files says of a run; `default` where it says nothing of it, or is not there."""
        try:
            return copy.deepcopy(_read(self._place(name), _object).get(run, default))
        except FileNotFoundError:
            return default

    def table(self, kind: str, run: str, steps: Iterable[int] | None = None) -> pd.DataFrame:
        """A run's rows of one of TABLES, of all steps or of some in the order that is asked for."""
        path = self._place(f"{kind}.parquet")
        try:
            table = _read(path, _table)
        except FileNotFoundError:
            return pd.DataFrame()
        columns = table.columns.get(run, {})
        rows = table.rows.slice(*table.places.get(run, (0, 0)))
        if steps is not None:
            rows = pa.concat_tables([rows.slice(0, 0), *(rows.filter(pc.equal(rows["step"], step)) for step in steps)])
        with _broken(path):
            return pd.DataFrame({name: _restored(rows[name], kind) for name, kind in columns.items()})

    def steps(self, kind: str, run: str) -> list[int]:
        """The steps that a run has rows of in one of TABLES."""
        try:
            table = _read(self._place(f"{kind}.parquet"), _table)
        except FileNotFoundError:
            return []
        return sorted(pc.unique(table.rows["step"].slice(*table.places.get(run, (0, 0)))).to_pylist())

    def model(self, run: str) -> Path:
        """The folder of a run's trained model; it is there for some runs alone."""
        return self._place(f"{MODELS}/{run}")

    def _place(self, name: str) -> Path:
        arriving = self.folder / ARRIVING / name
        return arriving if arriving.exists() else self.folder / name


def holds(path: str | Path) -> bool:
    """Whether a path, `<study>/<run>`, names a packed run; nothing has to lie there."""
    path = Path(path)
    return bool(path.name) and path.name in PackedStudy(path.parent).runs


# Reading of files; what they hold is kept as long as they stay what they are.

def _read(path: Path, read: Callable[[Path], T]) -> T:
    with files.reading(path):
        found = path.stat()
    if found.st_size > MOST_BYTES:
        raise RunError(f"{path} has {found.st_size} bytes; a file of a packed study has {MOST_BYTES} at most.")
    return _kept(Path(os.path.abspath(path)), (found.st_ino, found.st_mtime_ns, found.st_size), read)


@functools.lru_cache(maxsize=64)
def _kept(path: Path, state: tuple[int, ...], read: Callable[[Path], T]) -> T:
    with files.reading(path):
        return read(path)


def _configs(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"The configs of packed runs in {path} cannot be read: {brief(str(error))}.") from error
    for name, config in found.items():
        if not (is_name(name) and isinstance(config, dict)):
            raise RunError(f"{path} holds {brief(name)}; it takes a table of settings for each run, and a run's name "
                           "is that of a folder.")
    return found


def is_name(name: str) -> bool:
    """Whether a run may be called so: the name of a folder, which leads nowhere else."""
    return name.isprintable() and name not in ("", ".", "..") and not re.search(r"[/\\]", name) and len(name) < 256


def _object(path: Path) -> dict[str, Any]:
    try:
        found = files.read_json(path)
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {brief(str(error))}.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {brief(found)}; it takes an entry for each run.")
    return found


def _table(path: Path) -> Table:
    with _broken(path), pq.ParquetFile(path) as file:
        about = file.metadata
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        values = sum(group.column(number).num_values for group in groups for number in range(about.num_columns))
        if max(values, about.num_rows) > MOST_VALUES:
            raise RunError(f"{path} holds {max(values, about.num_rows)} values; a table of a packed study has "
                           f"{MOST_VALUES} at most.")
        rows = file.read()
        rows.validate(full=True)
        return Table(rows, _places(path, rows), _columns(path, rows))


@contextlib.contextmanager
def _broken(path: Path) -> Any:
    """Turn what pyarrow and pandas say of a broken file into a RunError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is broken and cannot be read: {brief(str(error))}.") from error


def _places(path: Path, rows: pa.Table) -> dict[str, tuple[int, int]]:
    """Where the rows of each run lie."""
    lacking = [name for name in ("run", "step") if rows.column_names.count(name) != 1]
    if lacking or not pa.types.is_integer(rows.schema.field("step").type) or rows["step"].null_count:
        raise RunError(f"{path} is no table of a packed study: it takes one column `run`, and one column `step` of "
                       f"whole numbers, beside others; it has {brief(rows.column_names)}.")
    lowest, highest = pc.min_max(rows["step"]).as_py().values() if len(rows) else (0, 0)
    if lowest < 0 or highest >= 10**9:
        raise RunError(f"{path} holds the steps {lowest} to {highest}; a step is a whole number from 0, below 1e9.")
    runs = pc.run_end_encode(rows["run"].cast(pa.string()).combine_chunks())
    names, ends = runs.values.to_pylist(), runs.run_ends.to_pylist()
    if len(set(names)) < len(names) or None in names:
        raise RunError(f"{path} is no table of a packed study: the rows of a run do not stand together.")
    return {name: (first, end - first) for name, first, end in zip(names, [0, *ends], ends, strict=False)}


def _columns(path: Path, rows: pa.Table) -> dict[str, dict[str, str]]:
    """The columns of each run and their types."""
    found = files.decode((rows.schema.metadata or {}).get(COLUMNS, b"null"))
    try:
        columns = {run: found["columns"][place] for run, place in found["runs"].items()}
        good = all(rows.column_names.count(name) == 1 and TYPE.fullmatch(kind)
                   for one in found["columns"] for name, kind in one.items())
    except (LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise RunError(f"{path} does not say which columns each run has, as `masa pack` writes it into the metadata.")
    return columns


def _restored(column: pa.ChunkedArray, kind: str) -> pd.Series:
    """A column of a run with the type that it had in the run's own table."""
    if kind == "object":
        return pd.Series(column.to_pylist(), dtype=object)
    if kind == "str" and pa.types.is_null(column.type):
        column = column.cast(pa.string())
    dtype = pd.api.types.pandas_dtype(kind)
    if kind == "bool" and column.null_count:
        raise ValueError("a column of truths has gaps")
    if hasattr(dtype, "__from_arrow__"):
        return pd.Series(dtype.__from_arrow__(column))
    return pd.Series(column.to_numpy()).astype(dtype)


# Writing.

def table_of(frames: Mapping[str, pd.DataFrame]) -> pa.Table:
    """One table of the frames of runs; the steps of their rows stand in a column `step`, or else in the index.

    Raises:
        RunError: columns of one name hold different kinds of values.
    """
    tables, known, runs = [], [], {}
    for run, frame in frames.items():
        columns = {name: str(dtype) for name, dtype in frame.dtypes.items()}
        if wrong := [name for name, kind in columns.items() if not TYPE.fullmatch(kind) or name == "run"]:
            raise RunError(f"The run {run} cannot be packed: its column {wrong[0]!r} is of the type "
                           f"{columns[wrong[0]]}.")
        if columns not in known:
            known.append(columns)
        runs[run] = known.index(columns)
        table = parquet.as_arrow(frame if "step" in frame else frame.rename_axis(index="step").reset_index())
        tables.append(table.replace_schema_metadata(None).add_column(0, "run", pa.array([run] * len(frame))))
    try:
        whole = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise RunError(f"The runs of the study cannot be packed together: {error}") from error
    return whole.replace_schema_metadata({COLUMNS: files.line({"runs": runs, "columns": known})})
