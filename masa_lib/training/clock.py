"""What a step took: seconds by phase, the cores that others used meanwhile, and memory; a bar while one runs."""

from __future__ import annotations

import os
import sys
import time

import psutil
import torch

from masa_lib import config as configs
from masa_lib.config import Config
from masa_lib.runs.folder import Run
from masa_lib.training.rollout_bar import RolloutBar

#: seconds of a step's rollouts before a bar shows them
PATIENCE = 5


def memory_mb() -> float:
    """Peak memory so far, MB: of the GPU where there is one, of this process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20  # pragma: no cover
    import resource  # Windows has none, and trains nothing

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _others() -> float:
    """Seconds that the cores have worked for other processes than this one."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system - sum(os.times()[:4])


class Clock:
    """Seconds by phase, and the cores that other processes used meanwhile: seconds count where those are few."""

    def __init__(self) -> None:
        self._start = self._last = self._began = time.perf_counter()
        self._others = _others()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase that began with the last one's end."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # pragma: no cover
        now = time.perf_counter()
        self._laps[f"seconds_{phase}"] = now - self._last
        self._last = now

    def leave_out(self, seconds: float) -> None:
        """Do not count so many seconds of the phase that runs."""
        self._start += seconds
        self._last += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase and in all."""
        others = (_others() - self._others) / (time.perf_counter() - self._began)
        return {**self._laps, "seconds_total": self._last - self._start, "cores_others": max(others, 0.0)}


def rollout_bar(config: Config, step: int, run: Run | None) -> RolloutBar:
    """A bar of a step's rollouts, where they take longer than PATIENCE and somebody looks; a gate may end it early."""
    sampling = config.sampling
    each = sampling.solutions + (sampling.predictions if configs.samples_predictions(config) else 0)
    return RolloutBar(sampling.problems * each, f"step {step}", PATIENCE, run.path if run else None, step)
