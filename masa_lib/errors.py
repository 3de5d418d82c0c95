"""What the library refuses, where it runs, and how a refusal quotes the value that it is about."""

from __future__ import annotations

import importlib.util
import reprlib

#: modules of Python that Windows does not have
UNIX = ("fcntl", "resource")


class MasaError(Exception):
    """The base of the library's own errors: one sentence that says what is wrong and what to do.

    Whatever else is raised is a defect, and keeps its traceback.
    """


#: what torch, CUDA's libraries and the C library say where memory is short; other errors name memory, too
SHORTAGES = ("out of memory", "not enough memory", "allocate memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the many that say that memory has run out."""
    return isinstance(error, MemoryError) or (  # torch's own is a RuntimeError
        isinstance(error, RuntimeError) and any(words in str(error) for words in SHORTAGES))


class PlatformError(MasaError):
    """The operating system is none of those that the library runs on."""


def check_system() -> None:
    """Refuse a system without locks on files and limits on processes.

    Raises:
        PlatformError: names what is missing.
    """
    missing = [name for name in UNIX if importlib.util.find_spec(name) is None]
    if missing:
        raise PlatformError(f"masa_lib runs on Linux and macOS, and on Windows inside WSL; this Python has no module "
                          f"{' and no module '.join(missing)}.")


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out an integer of thousands of digits."""
        return super().repr_int(x, level) if abs(x) < 10**1000 else f"<an integer of {x.bit_length()} bits>"


#: `repr` of a value of any depth and length, in at most a line or two
brief = _Brief().repr
