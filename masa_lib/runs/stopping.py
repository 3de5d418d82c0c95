"""Stopping a training from outside: a first signal lets an update finish, a second one drops it.

Rollouts and evaluations can be done again, so that the first signal drops them at once.
Signals reach a process's main thread alone; a training in another thread hears none and is stopped by whoever started
that thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

#: exit code of a training whose update was dropped (EX_TEMPFAIL: try again); 128 + signal: it was finished
STEP_DROPPED = 75
#: SIGHUP (there is none on Windows): the terminal was closed, or the connection to it was lost
HANGUP = getattr(signal, "SIGHUP", None)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A training was stopped before its end; `exit_code` is what its command leaves with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stop:
    """Whether a stop was asked for; as a context it listens to SIGNALS (one that is ignored stays so).

    `signal` is the number of the first one, 0 before it.
    """

    def __init__(self) -> None:
        self.signal, self._again, self._repeatable, self._before = 0, False, False, {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS
                            if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of work that can be repeated later: a first signal drops it at once, and None comes back.

        Raises:
            Stopped: at a second signal.
        """
        self._repeatable = True  # before `signal` is read: a signal in between is raised
        try:
            found = None if self.signal else work()
            if self._again:  # a signal's exception is lost where it meets a destructor
                raise _at_once()
            return None if self.signal else found
        except Stopped:
            if self._again:
                raise
            return None
        finally:
            self._repeatable = False

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Work that must not be cut in two: a first signal waits for its end, a second one cuts it all the same.

        Where this stop listens already, it does so; elsewhere, as in a notebook's cell, the signal is given again
        behind the work.
        """
        if self._before:
            yield
            return
        with Stop() as own:
            yield
        if own.signal:
            os.kill(os.getpid(), own.signal)

    def ask(self) -> None:
        """Stop as at a first SIGTERM; a signal that comes later drops the running step."""
        self.signal = self.signal or signal.SIGTERM

    def _receive(self, number: int, frame: Any) -> None:
        if number == HANGUP:
            _leave_a_closed_terminal()
            if self.signal:
                return  # of one closed terminal the kernel and the shell both tell
        self._again, self.signal = bool(self.signal), self.signal or number
        if self._again or self._repeatable:
            raise _at_once()
        with contextlib.suppress(OSError):  # print may not be re-entered
            os.write(2, b"\nStopping after this update; a second signal drops it.\n")


def _at_once() -> Stopped:
    return Stopped("Stopped at once: what came after the last checkpoint is dropped.", STEP_DROPPED)


def _leave_a_closed_terminal() -> None:
    """Let output to a terminal that is gone go nowhere: the progress bar's next line would end the training."""
    for stream in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(stream).st_mode):  # a terminal that is gone is no longer known for one
                os.write(stream, b"\n")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
