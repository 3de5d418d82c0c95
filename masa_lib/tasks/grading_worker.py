"""math-verify in a process of its own, so that no text a model writes can hang, crash or fill the process that grades.

A pool of the standard library would import the caller's main module again in its worker, and break scripts without a
guard; a pipe needs no more lines. What ends the process on its way (a kill, a lack of memory, a stop) says nothing of
the answer: the question is asked once more, in a new process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

from masa_lib.errors import MasaError

CPU_SECONDS = 2.0  # of one comparison, by the process's own clock: a busy machine does not shorten it
WALL_SECONDS = 60.0  # a process that has not worked for so long, by the same clock, is replaced
MEMORY_BYTES = 2 * 1024**3  # address space of the process

_SERVER = Path(__file__).with_name("math_server.py")


class GradingError(MasaError, RuntimeError):
    """The grading worker cannot be started: grades would all be silently wrong."""


class Worker:
    """The one math-verify process, shared by all threads of this process; started when first asked.

    `limits` counts the questions without an answer.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = self.limits = self.ended = 0

    def compare(self, predicted: str, answer: str) -> bool | None:
        """What math-verify says of two formulas; None where a limit keeps it from saying anything.

        Raises:
            GradingError: the process cannot be started.
        """
        with self.lock:
            verdict = self._ask(predicted, answer)
            if verdict is None and self.ended != -signal.SIGPROF:  # a second clock of its own would say the same
                verdict = self._ask(predicted, answer)
            if verdict is None:
                self._count(predicted)
            return verdict

    def close(self) -> None:
        """End the process, if there is one; `ended` is its exit status."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            self.ended = process.wait()

    def forget(self) -> None:
        """Leave the process to the parent after a fork: two processes that read one pipe would swap their replies."""
        if self.process is not None:
            self.process.returncode = 0  # otherwise Popen warns that it is still running
            self.process.stdin.close()
            self.process.stdout.close()
        self.__init__()

    def _ask(self, predicted: str, answer: str) -> bool | None:
        """One question to a process that is open. Whatever interrupts it closes it: a late reply meets no question."""
        verdict = None
        try:
            if self.process is None:
                self._start()
            self.asked += 1
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.write(json.dumps([self.asked, predicted, answer]).encode() + b"\n")
                number, verdict = json.loads(self._reply() or "[0, null]")
                verdict = verdict if number == self.asked else None
            return verdict
        finally:
            if verdict is None:
                self.close()

    def _start(self) -> None:
        # -P keeps our folder off its path; its own session keeps a Ctrl-C meant for the notebook away from it.
        self.process = subprocess.Popen([sys.executable, "-P", _SERVER, str(CPU_SECONDS), str(MEMORY_BYTES)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        bufsize=0, start_new_session=True)
        if self._reply() != b"ready\n":
            raise GradingError("The grading worker did not start, so answers cannot be compared. Check that "
                               f"math-verify is installed: {sys.executable} -c 'import math_verify'")

    def _reply(self) -> bytes:
        """The next line; empty when the process has ended, or stands still."""
        worked = -1.0
        while not select.select([self.process.stdout], [], [], WALL_SECONDS)[0]:
            before, worked = worked, _cpu_seconds(self.process.pid)
            if worked <= before:
                return b""
        return self.process.stdout.readline()

    def _count(self, predicted: str) -> None:
        self.limits += 1
        if self.limits == 1:
            logging.getLogger(__name__).warning(
                "An answer counts as wrong because comparing it ran into a limit (%.3g s of CPU time, %.3g GiB): "
                "%.80r. Further ones are counted in silence.", CPU_SECONDS, MEMORY_BYTES / 1024**3, predicted)


def _cpu_seconds(pid: int) -> float:
    import psutil

    with contextlib.suppress(psutil.Error):
        return sum(psutil.Process(pid).cpu_times()[:2])
    return -1.0
