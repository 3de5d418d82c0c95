"""Files that outlive a killed process, a full disk and a second writer: what a run's folder is made of.

A file is either replaced whole (written beside, fsync, rename) or grows by one line that is flushed before the call
returns. Whole folders stand in `crash_safe_folders`; what a file means is the business of `runs`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from masa_lib.errors import MasaError, check_system

#: around a row; a file system that lost its power may leave NULs where a row was
BLANK = b"\0 \t\r\n"
#: levels of JSON that a file of a run may nest, and bytes that are read from the end of a file at first
DEEPEST, BLOCK = 64, 2**13
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
    except MasaError:
        raise
    except Exception as error:
        full = _is_full(error, path)
        if not full and not isinstance(error, OSError):
            raise
        what = "The disk is full" if full else f"Writing failed ({getattr(error, 'strerror', None) or error})"
        raise RunError(f"{what}: {path} could not be written. Nothing written before is lost; "
                       f"{'free space' if full else 'put that right'} and {advice}.") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a read that the system refuses into a RunError; a file that is not there is left to the caller."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}). Nothing was changed; give this user the "
                       "right to read it, or put it right.") from error


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
        PlatformError: the system has no such locks; what is recorded can be read there all the same.
    """
    check_system()
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
            holder = holder if holder.isdigit() else ""
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
if hasattr(os, "register_at_fork"):  # Windows forks nothing
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


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is no JSON in UTF-8, or nests deeper than DEEPEST.
    """
    return decode(path.read_bytes())


def decode(text: bytes) -> Any:
    """What a JSON text holds; a ValueError if it is none, or nests so deep that Python could not write it again."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if text.count(b"[") + text.count(b"{") > DEEPEST and not _shallow(found):
        raise ValueError("it nests too deep")
    return found


def _shallow(value: Any, left: int = DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left > 0 and all(_shallow(entry, left - 1) for entry in inner)


def _row(text: bytes) -> dict[str, Any] | None:
    try:
        row = decode(text.strip(BLANK))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of lines; none if there is no file. A torn last line is left out with a note.

    Raises:
        RunError: another line is not a JSON object, or the file may not be read.
    """
    text = b""
    with contextlib.suppress(FileNotFoundError), reading(path):
        text = path.read_bytes()
    rows = [_row(line) for line in text.split(b"\n") if line.strip(BLANK)]
    if rows and rows[-1] is None:
        logger.warning("The last line of %s is torn, as by a process killed while it wrote, and is left out.", path)
        rows.pop()
    if None in rows:
        lines = enumerate(text.split(b"\n"), 1)
        number = next(number for number, line in lines if line.strip(BLANK) and _row(line) is None)
        raise RunError(f"Line {number} of {path} is not a JSON object. Repair or remove that line; nothing was "
                       "changed.")
    return rows


class Lines:
    """A file of lines that another process adds to: every look reads only what is new.

    Attributes:
        read: bytes read so far, over all looks.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, 0
        self._end, self._last = 0, b""  # where what is known ends, and its last line

    def look(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file was written anew since the last look, and the rows that are new (all of them, if it was).

        A line counts once it has ended; what is torn is left to the next look.

        Raises:
            RunError: a line before the last is not a JSON object, or the file may not be read.
        """
        text = self._from(self._end - len(self._last))
        anew = not text.startswith(self._last)
        if anew:
            self._end, self._last, text = 0, b"", self._from(0)
        lines = text[len(self._last):].split(b"\n")[:-1]
        rows = [_row(line) if line.strip(BLANK) else {} for line in lines]
        if rows and rows[-1] is None:
            rows.pop(), lines.pop()
        if None in rows:
            raise RunError(f"A line of {self.path}, from byte {self._end} on, is not a JSON object. Repair or remove "
                           "that line; nothing was changed.")
        self._end += sum(len(line) + 1 for line in lines)
        self._last = lines[-1] + b"\n" if lines else self._last
        return anew, [row for row in rows if row]

    def _from(self, place: int) -> bytes:
        text = b""
        with contextlib.suppress(FileNotFoundError), reading(self.path), self.path.open("rb") as file:
            file.seek(place)
            text = file.read()
        self.read += len(text)
        return text


def _tail(file: BinaryIO, end: int) -> tuple[int, bytes]:
    """Where the last line before a byte begins that is not empty, and its bytes up to there."""
    start, text = end, b""
    while start and b"\n" not in text.rstrip(b"\n"):
        start = max(end - 2 * max(end - start, BLOCK // 2), 0)
        file.seek(start)
        text = file.read(end - start)
    start += text.rstrip(b"\n").rfind(b"\n") + 1
    return start, text[len(text) - (end - start):]


def last_row(path: Path) -> dict[str, Any] | None:
    """The last row of a file of lines, of which only the end is read; None without one. A torn line is passed over.

    Raises:
        RunError: the line before a torn one is not a JSON object, or the file may not be read.
    """
    text = b""
    with contextlib.suppress(FileNotFoundError), reading(path), path.open("rb") as file:
        start, text, torn = *_tail(file, file.seek(0, os.SEEK_END)), False
        while start and (not text.strip(BLANK) or (_row(text) is None and not torn)):
            torn = torn or bool(text.strip(BLANK))
            start, text = _tail(file, start)
        if text.strip(BLANK) and _row(text) is None:
            raise RunError(f"The last lines of {path} are no JSON objects. Repair or remove them; nothing was changed.")
    return _row(text)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, in the place of a torn last line if there is one; a row that cannot be written whole is taken back.

    Only the end of the file is read: at the 20,000th step, too.
    """
    text = line(row)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        start, last = _tail(file, end)
        if last.strip() and _row(last) is None:
            end, last = start, b""
        if last and not last.endswith(b"\n"):
            text = b"\n" + text
        try:
            os.ftruncate(file.fileno(), end)
            file.seek(end)
            while text:
                text = text[file.write(text):]
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), end)
            raise
