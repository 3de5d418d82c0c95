"""Files that outlive a killed process, a full disk and a second writer: what a run's folder is made of.

A file is either replaced whole (written beside, fsync, rename) or grows by one line that is flushed before the call
returns; a folder is sealed with a manifest of sizes and digests. What a file means is the business of `runs`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from masa_lib.errors import MasaError

MANIFEST = "manifest.json"
#: around a row; a file system that lost its power may leave NULs where a row was
BLANK = b"\0 \t\r\n"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger("masa")
_locks: set[int] = set()  # open descriptors of held locks


class RunError(MasaError, RuntimeError):
    """A run's folder cannot be used as asked; the message says what is wrong with it and what to do."""


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn a write that fails into a RunError; `advice` says what to do once there is space again."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        full = _is_full(error, path)
        if not full and not isinstance(error, OSError):
            raise
        what = "The disk is full" if full else f"Writing failed ({getattr(error, 'strerror', None) or error})"
        raise RunError(f"{what}: {path} could not be written. Nothing written before is lost; "
                       f"{'free space' if full else 'put that right'} and {advice}.") from error


def _is_full(error: BaseException | None, path: Path) -> bool:
    """Whether a full disk is behind an error; libraries that write by themselves hide its number."""
    if not isinstance(error, OSError):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if shutil.disk_usage(folder).free < 2**16:
            return True
    while error is not None:
        if getattr(error, "errno", None) in FULL_DISK or any(os.strerror(n) in str(error) for n in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which names the process; the system frees it when the process dies, however it dies.

    Raises:
        RunError: it is held, by another process or by another holder in this one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode()
            who = "this very process" if holder == str(os.getpid()) else f"process {holder or 'unknown'}"
            raise RunError(f"{what} is in use by {who}. Wait for it or stop it: it has one writer at a time.") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        _unlock(descriptor)


def _unlock(descriptor: int) -> None:
    if descriptor in _locks:
        _locks.remove(descriptor)
        os.close(descriptor)


# A forked worker would otherwise keep the lock of a killed parent for as long as it lives.
os.register_at_fork(after_in_child=lambda: [_unlock(descriptor) for descriptor in tuple(_locks)])


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, and put it in the place of `path` once it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def share(folder: Path) -> None:
    """Give a folder and all in it the rights that the umask leaves; some libraries write what only its owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def seal(folder: Path) -> None:
    """Add a manifest (file name to bytes and SHA-256), share it, and wait until everything is on the disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {file.relative_to(folder).as_posix(): [file.stat().st_size, digest(file)] for file in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")
    share(folder)
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def fault(folder: Path) -> str:
    """What is wrong with a sealed folder; empty when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        for name, (size, expected) in manifest.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (held := (folder / name).stat().st_size) != size:
                return f"{name} has {held} bytes instead of {size}"
            if digest(folder / name) != expected:
                return f"the content of {name} has changed"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return ""


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_plain(row), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text.strip(BLANK))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of lines; none if there is no file. A torn last line is left out with a note.

    Raises:
        RunError: another line is not a JSON object.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = [(number, _row(text)) for number, text in enumerate(lines, 1) if text.strip(BLANK)]
    if rows and rows[-1][1] is None:
        logger.warning("The last line of %s is torn, as by a process killed while it wrote, and is left out.", path)
        rows.pop()
    for number, row in rows:
        if row is None:
            raise RunError(f"Line {number} of {path} is not a JSON object. Repair or remove that line; nothing was "
                           "changed.")
    return [row for _, row in rows]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, in the place of a torn last line if there is one; a row that cannot be written whole is taken back."""
    text = line(row)
    data = path.read_bytes() if path.exists() else b""
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    if data.strip() and _row(data[start:]) is None:
        data = data[:start]
    if data and not data.endswith(b"\n"):
        text = b"\n" + text
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, len(data))
        written = 0
        while written < len(text):
            written += os.pwrite(descriptor, text[written:], len(data) + written)
        os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, len(data))
        raise
    finally:
        os.close(descriptor)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a data frame as Parquet (zstd). Half of a surrogate pair, which Parquet cannot hold, is escaped."""
    path.parent.mkdir(exist_ok=True)
    try:
        arrow = pa.Table.from_pandas(table, preserve_index=False)
    except UnicodeEncodeError:  # JSON lets a model write one into a notion
        escaped = {name: column.map(_escape) for name, column in table.items() if column.dtype == object}
        arrow = pa.Table.from_pandas(table.assign(**escaped), preserve_index=False)
    replace(path, lambda temporary: pq.write_table(arrow, temporary, compression="zstd"))


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf8", "backslashreplace").decode("utf8")
    return [_escape(entry) for entry in value] if isinstance(value, list | tuple) else value


def read_tables(paths: list[Path]) -> pd.DataFrame:
    """The rows of several Parquet files, lists as Python lists.

    Raises:
        RunError: a file is missing or broken.
    """
    try:
        table = pa.concat_tables([_read_table(path) for path in paths], promote_options="permissive")
    except pa.ArrowException as error:
        raise RunError(f"The tables in {paths[0].parent} do not fit together: {error}") from error
    frame = table.to_pandas()
    for field in table.schema:
        if pa.types.is_list(field.type):
            frame[field.name] = pd.Series(table[field.name].to_pylist(), index=frame.index, dtype=object)
    return frame


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise RunError(f"{path} is missing. Restore it, or ask only for the steps that are there.") from None
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} is broken and cannot be read: {error}") from error
