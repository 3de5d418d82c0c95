r"""Is the answer in the last complete `\boxed{}` right? By value, from any thread, bounded in time and memory.

Numbers, letters and words are compared here, in microseconds. The rest goes to math-verify, in a worker process with a
limit on CPU time and memory that is started when first needed and replaced when it dies; texts that could only make it
die are refused before. Nothing a model writes is ever evaluated as Python.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TextIO

from masa_lib.errors import MasaError

MAX_ANSWER_LENGTH = 1_000  # characters; a longer box holds no answer
MAX_BOXES = 50  # boxes tried from the last one backwards
CPU_SECONDS = 2.0  # of one comparison in the worker
WALL_SECONDS = 60.0  # a worker that is silent for so long is replaced, however busy the machine
MEMORY_BYTES = 2 * 1024**3  # address space of the worker

_BOX_MARK = re.compile(r"\\.|[{}]", re.DOTALL)
# Thin spaces, \left and \right, spaces that do not part two numbers, the braces of 1{,}000.
_NOISE = re.compile(r"\\[!,;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])"
                    r"|(?<![0-9])\s|\s(?![0-9])|(?<=[0-9])\{,\}(?=[0-9])")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_FRACTION = re.compile(r"([+-]?)(?:\\[dt]?frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}|([0-9]+)/([+-]?[0-9]+))")
_LETTER = re.compile(r"\(?([A-Ea-e])(?:[).:].*)?", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*")
# A power on a power of a number, a power or factorial of five digits, a factorial of a factorial: nobody boxes these.
_EXPLOSIVE = re.compile(r"(?:\^|\*\*)[\s{(]*-?(?:[0-9.]+[\s})]*(?:\^|\*\*)|[0-9]{5})|(?:[0-9]{5}|!)[\s})]*!")
# The commas of 1,000; fractions in an answer; an operation behind a number, or on it; a power of ten, still a number.
_GROUP_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_FRACTIONS = re.compile(r"\\[dt]?frac(?:\{-?[0-9]+\}\{-?[0-9]+\}|[0-9]{2})|[0-9]+/-?[0-9]+")
_OPERATION = re.compile(r"[0-9)}][-+*!\N{MULTIPLICATION SIGN}\N{DIVISION SIGN}]|\\(?:times|cdot|ast|div|sqrt)(?![a-z])")
_POWER_OF_TEN = re.compile(r"-?(?:[0-9.]+(?:\*|\\times|\\cdot))?10\^\{?-?[0-9]+\}?")
_SYMPY_LITERAL = re.compile(r"(Integer|Float) \('?([0-9.]+)'? \)")
_MAX_DEPTH = 12
_MAX_FRACTIONS = 20


class GradingError(MasaError, RuntimeError):
    """The grading worker cannot be started: grades would all be silently wrong."""


def extract_answer(text: str) -> str | None:
    r"""The content of the last complete `\boxed{}`, or None where there is none of at most `MAX_ANSWER_LENGTH`."""
    end = len(text)
    for _ in range(MAX_BOXES):
        end = text.rfind("\\boxed", 0, end)
        if end < 0:
            return None
        start = end + len("\\boxed")
        while text.startswith(" ", start):
            start += 1
        if text.startswith("{", start) and (content := _content(text, start + 1)) is not None:
            return content
    return None


def grade(text: str, answer: str, *, percentage_slack: bool = False) -> bool:
    r"""Whether a solution's boxed answer equals the problem's answer by value.

    Plain numbers are equal as numbers (a decimal to 6 places, as in math-verify), A to E as letters, words as words;
    the rest is what math-verify says. An answer that exceeds the limits is wrong, and so is one that leaves a number to
    be computed: math-verify takes `96 * 74` for 7104, and a model that is paid for that learns to copy the problem.

    Args:
        text: the whole solution.
        answer: the problem's answer.
        percentage_slack: as the authors' code: plain numbers within 1e-4 of each other are equal, also after
            multiplying or dividing by 100, and what is left to compute is computed.

    Raises:
        GradingError: math-verify is needed and cannot be started.
    """
    predicted = extract_answer(text)
    return predicted is not None and _equal(predicted, answer, percentage_slack)


def grade_many(texts: Sequence[str], answers: Sequence[str], *, percentage_slack: bool = False) -> list[bool]:
    """`grade` for pairs of solution and answer, in order."""
    return [grade(text, answer, percentage_slack=percentage_slack)
            for text, answer in zip(texts, answers, strict=True)]


def _content(text: str, start: int) -> str | None:
    depth = 1
    for mark in _BOX_MARK.finditer(text, start, start + MAX_ANSWER_LENGTH + 1):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start:mark.start()].strip()
    return None


@functools.lru_cache(maxsize=20_000)
def _equal(predicted: str, answer: str, percentage_slack: bool) -> bool:
    """Letters, words and numbers at once; the worker only for what is left."""
    predicted, answer = _plain(predicted), _plain(answer)
    if re.fullmatch("[A-E]", answer):
        letter = _LETTER.fullmatch(predicted)
        return letter is not None and letter[1].upper() == answer
    if _WORDS.fullmatch(answer):
        return predicted.casefold() == answer.casefold()
    predicted, answer = _compact(predicted), _compact(answer)
    left, right = _number(predicted), _number(answer)
    if right is not None and not percentage_slack and _is_unfinished(predicted, right):
        return False
    if left is not None and right is not None:
        return _close(left, right) if percentage_slack else _same_number(left, right, "." in predicted + answer)
    if predicted == answer or not predicted:
        return bool(predicted)
    return _is_tame(predicted) and _is_tame(answer) and _WORKER.compare(predicted, answer)


def _is_unfinished(predicted: str, number: Fraction) -> bool:
    """Whether the answer, behind its last equals sign, leaves this number to be computed."""
    last = _GROUP_COMMA.sub("", predicted.rpartition("=")[2])
    rest, fractions = _FRACTIONS.subn("", last)
    several = fractions > 1 or len(re.findall(r"[0-9]+(?:\.[0-9]*)?", rest)) > 1
    divided = number.denominator == 1 and _FRACTION.fullmatch(last) is not None
    return divided or ((several or _OPERATION.search(rest) is not None) and not _POWER_OF_TEN.fullmatch(last))


def _plain(text: str) -> str:
    """Without dollar signs, text commands and a full stop at the end; spaces between words stay."""
    text = _TEXT_COMMAND.sub(r"\1", text.replace("$", "").replace("\N{MINUS SIGN}", "-"))
    return " ".join(text.split()).removesuffix(".")


def _compact(text: str) -> str:
    text = _NOISE.sub("", text)
    return text.replace(",", "") if _GROUPED.fullmatch(text) else text


def _number(text: str) -> Fraction | None:
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = int(match[2] or match[4]), int(match[3] or match[5])
    return Fraction(-above if match[1] == "-" else above, below) if below else None


def _same_number(left: Fraction, right: Fraction, decimal: bool) -> bool:
    return left == right or (decimal and round(left, 6) == round(right, 6))


def _close(left: Fraction, right: Fraction) -> bool:
    """The released comparison, in exact arithmetic: relative tolerance 1e-4, and a slack of 100 either way."""
    return any(abs(left - target) <= max(abs(left), abs(target)) / 10_000
               for target in (right / 100, right, right * 100))


def _is_tame(text: str) -> bool:
    """Whether math-verify can be expected to finish: no towers of powers, huge factorials or deep nesting."""
    if len(text) > MAX_ANSWER_LENGTH or _EXPLOSIVE.search(text) or text.count("frac") > _MAX_FRACTIONS:
        return False
    depth = deepest = 0
    for mark in text:
        depth += (mark in "{([") - (mark in "})]")
        deepest = max(deepest, depth)
    return deepest <= _MAX_DEPTH


class _Worker:
    """The one math-verify process, shared by all threads of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def compare(self, predicted: str, answer: str) -> bool:
        """What math-verify says; False where it runs into a limit."""
        with self.lock:
            if self.process is None:
                self._start()
            try:
                print(json.dumps([predicted, answer]), file=self.process.stdin, flush=True)
                reply = self._reply()
            except OSError:
                reply = ""
            if not reply:
                self.close()
            return reply == "true"

    def _start(self) -> None:
        # As a file, not as a module: it needs nothing of the package, whatever the working directory is. -P keeps the
        # package's folder off the worker's path. Its own session keeps a Ctrl-C meant for the notebook away from it.
        self.process = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, start_new_session=True)
        if self._reply() != "ready":
            self.close()
            raise GradingError("The grading worker did not start, so answers cannot be compared. Check that "
                               f"math-verify is installed: {sys.executable} -c 'import math_verify'")

    def _reply(self) -> str:
        ready, _, _ = select.select([self.process.stdout], [], [], WALL_SECONDS)
        return self.process.stdout.readline().strip() if ready else ""

    def close(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            process.wait()

    def forget(self) -> None:
        """Leave the process to the parent: two processes reading one pipe would swap their replies."""
        if self.process is not None:
            self.process.returncode = 0  # otherwise Popen warns that it is still running
            with open(os.devnull, "r+b") as nowhere:  # a half-written request must not reach the parent's pipe
                for pipe in (self.process.stdin, self.process.stdout):
                    os.dup2(nowhere.fileno(), pipe.fileno())
                    pipe.close()
        self.__init__()


_WORKER = _Worker()
atexit.register(_WORKER.close)
os.register_at_fork(after_in_child=_WORKER.forget)


def _serve(requests: Iterable[str], replies: TextIO) -> None:
    """The worker's loop: one JSON pair a line in, one word a line out. A comparison over the limit ends the process."""
    import sympy.physics.units  # noqa: F401 - simplify imports it late, and it reads names by the road closed here
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.parsing import sympy_parser

    sympy_parser.eval_expr = _read_literal  # sympy's only road from a text to Python's eval
    config = [LatexExtractionConfig()]
    print("ready", file=replies, flush=True)
    for request in requests:
        predicted, answer = (f"${text}$" for text in json.loads(request))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        gold = parse(answer, config, parsing_timeout=None)
        same = verify(gold, parse(predicted, config, parsing_timeout=None), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if same else "false", file=replies, flush=True)


def _read_literal(code: str, *_: object) -> object:
    """What sympy would pass to Python's eval to read a number: taken as that number; anything else is refused."""
    import sympy

    match = _SYMPY_LITERAL.fullmatch(code.strip())
    if match is None:
        raise ValueError("model text is not evaluated")
    return getattr(sympy, match[1])(match[2])


def _main() -> None:
    logging.disable()
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # Replies leave through a copy of stdout, so that nothing a library prints can pass for one.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(sys.stdin, replies)


if __name__ == "__main__":
    _main()
