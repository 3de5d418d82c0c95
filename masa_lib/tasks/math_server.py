"""The process in which math-verify compares: a line in, a line out, until its own clock or its memory ends it.

It is run as a file and knows nothing of the package, so that it starts in a second from any folder. Nothing that a
model writes is ever evaluated as Python.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable
from typing import TextIO

_SYMPY_LITERAL = re.compile(r"(Integer|Float) \('?([0-9.]+)'? \)")


def serve(requests: Iterable[str], replies: TextIO, cpu_seconds: float, memory_bytes: int) -> None:
    """Answer `[number, predicted, answer]` with `[number, verdict]`, one JSON array a line, after a line `ready`.

    A comparison over the limit of CPU time ends the process. One after which half of the memory has been in use has no
    verdict (null), since the libraries take a lack of memory for a wrong answer.

    Args:
        requests: lines.
        replies: where the lines of the answers go.
        cpu_seconds: of one comparison, by the process's own clock: a busy machine does not shorten it.
        memory_bytes: of the process.
    """
    import sympy.physics.units  # noqa: F401 - simplify imports it late, and it reads names by the road closed here
    from sympy.parsing import sympy_parser

    sympy_parser.eval_expr = read_literal  # sympy's only road from a text to Python's eval
    _is_equal("1 + x", "x + 1")  # what is loaded late is loaded before the clock runs
    print("ready", file=replies, flush=True)
    for request in requests:
        number, predicted, answer = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        same = _is_equal(predicted, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([number, None if _peak_bytes() > memory_bytes / 2 else same]), file=replies, flush=True)


def read_literal(code: str, *_: object) -> object:
    """What sympy would pass to Python's eval to read a number: taken as that number.

    Raises:
        ValueError: it is anything else.
    """
    import sympy

    match = _SYMPY_LITERAL.fullmatch(code.strip())
    if match is None:
        raise ValueError("model text is not evaluated")
    return getattr(sympy, match[1])(match[2])


def _is_equal(predicted: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    gold, found = (parse(f"${text}$", config, parsing_timeout=None) for text in (answer, predicted))
    return bool(verify(gold, found, timeout_seconds=None))


def _peak_bytes() -> int:
    """The most memory that this process has had in use; getrusage's number begins with that of its parent on Linux."""
    import resource

    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", "rb") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(b"VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(cpu_seconds: float, memory_bytes: int) -> None:
    import resource

    logging.disable()
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # Replies leave through a copy of stdout, so that nothing a library prints can pass for one.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin, replies, cpu_seconds, memory_bytes)


if __name__ == "__main__":
    _main(float(sys.argv[1]), int(sys.argv[2]))
