"""What the library refuses, and how a refusal quotes the value that it is about."""

from __future__ import annotations

import reprlib


class MasaError(Exception):
    """The base of the library's own errors: one sentence that says what is wrong and what to do.

    Whatever else is raised is a defect, and keeps its traceback.
    """


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out an integer of thousands of digits."""
        return super().repr_int(x, level) if abs(x) < 10**1000 else f"<an integer of {x.bit_length()} bits>"


#: `repr` of a value of any depth and length, in at most a line or two
brief = _Brief().repr
