"""What a notebook asks of the computer before it begins, and of its reader, in sentences that say what to do.

`SMOKE` is the one switch that shrinks a notebook's live work (`MASA_SMOKE=1`), for automatic checks.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from masa_lib import tiers

SMOKE = os.environ.get("MASA_SMOKE") == "1"
#: GB of free memory that the notebooks want
MEMORY = 2.0


def environment_check() -> list[str]:
    """What this computer has and what to do where something is missing, a sentence each."""
    import psutil
    import torch

    free, wrong = psutil.virtual_memory().available / 2**30, wrong_packages()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    said = [f"Python {platform.python_version()}, {versions}: "
            + (f"{'; '.join(wrong)}. `make install` gives the right ones." if wrong else "the versions wanted."),
            "A GPU is there and will be used." if torch.cuda.is_available() else
            "No GPU is there. The pocket model needs none; larger models do.",
            f"{psutil.cpu_count()} CPU cores, {free:.1f} GB of memory free: "
            + ("enough." if free >= MEMORY else f"less than {MEMORY:g} GB; close other programs first.")]
    for what, place, remedy in (("The pocket model", "pocket", "`masa pocket build --out data/pocket` makes it"),
                                ("The recorded study", "runs/baseline", "a fresh clone of the repository has it")):
        there = any((tiers.DATA / place).rglob("config.*"))
        said.append(f"{what} is there (data/{place})." if there else f"{what} is missing (data/{place}): {remedy}.")
    return said


def wrong_packages() -> list[str]:
    """The packages whose version this library does not take, or the library itself where it is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("masa-lib") or []
    except metadata.PackageNotFoundError:
        return ["masa-lib is not installed"]
    wanted = [entry for line in lines if not (entry := Requirement(line)).marker]
    return [f"{entry.name} is {metadata.version(entry.name)}, wanted {entry.specifier}" for entry in wanted
            if not entry.specifier.contains(metadata.version(entry.name), prereleases=True)]


@dataclasses.dataclass(frozen=True)
class Exercise:
    """The numbers that are the right answer, and the sentences that known mistakes earn."""

    right: tuple[float, ...]
    mistakes: tuple[tuple[tuple[float, ...], str], ...] = ()
    tolerance: float = 2e-3


def check(exercise: str, answer: Any) -> str:
    """Whether an answer is right, in a sentence; of a known mistake, what it is.

    Args:
        exercise: a key of EXERCISES.
        answer: a number, a list or a tensor; None where the reader has not answered yet.
    """
    wanted = EXERCISES[exercise]
    if answer is None or answer is Ellipsis:
        return f"{exercise}: no answer yet. Put yours in place of None and run the cell again."
    try:
        given = tuple(_numbers(answer))
    except (TypeError, ValueError, RuntimeError):
        return f"{exercise}: numbers are wanted, not {type(answer).__name__}."
    if len(given) != len(wanted.right):
        return f"{exercise}: {len(wanted.right)} numbers are wanted, not {len(given)}."
    if _near(given, wanted.right, wanted.tolerance):
        return f"{exercise}: right."
    known = [said for numbers, said in wanted.mistakes if _near(given, numbers, wanted.tolerance)]
    return f"{exercise}: not yet. " + (known or ["Look at the formula again, one token at a time."])[0]


def _numbers(answer: Any) -> Iterable[float]:
    """The numbers of nested lists or of a tensor, row by row."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, list | tuple):
        return [float(answer)]
    return [number for entry in answer for number in _numbers(entry)]


def _near(given: tuple[float, ...], wanted: tuple[float, ...], tolerance: float) -> bool:
    return all(abs(one - other) <= tolerance for one, other in zip(given, wanted, strict=True))


#: by name; a developer's test computes those of notebook 03 again with TRL's loss, those of 07 from the printed tables
EXERCISES: dict[str, Exercise] = {
    "advantages": Exercise((1.5, -0.5, -0.5, -0.5), (
        ((0.75, -0.25, -0.25, -0.25), "These are centred; now divide by the standard deviation."),
        ((1.732, -0.577, -0.577, -0.577), "That standard deviation divides by G; the sample's divides by G - 1."),
        ((2.0, 0.0, 0.0, 0.0), "The mean has to come off first."))),
    "ratios": Exercise((1.5, 0.7, 1.1, 0.6, 12.0), (
        ((0.405, -0.357, 0.095, -0.511, 2.485), "This is the logarithm of the ratio."),
        ((0.667, 1.429, 0.909, 1.667, 0.083), "Upside down: the new probability stands on top."))),
    "token losses": Exercise((-1.92, -1.05, 0.55, 0.4, 6.0), (
        ((-2.25, -1.05, 0.55, 0.3, 6.0), "Nothing is clipped here."),
        ((-1.92, -1.2, 0.55, 0.4, 0.64), "Everything is clipped here; of the two losses, the larger one counts."),
        ((1.92, 1.05, -0.55, -0.4, -6.0), "This is what is to be made large; a loss is made small."),
        ((-2.25, -1.2, 0.55, 0.3, 0.64), "Of the two losses, the larger one counts."))),
    "pulls": Exercise((0.0, -1.05, 0.55, 0.0, 6.0), (
        ((-2.25, -1.05, 0.55, 0.3, 6.0), "Where the clipped loss counts, the log-prob is no longer in it."),
        ((-1.92, -1.05, 0.55, 0.4, 6.0), "This is the loss; for clipped tokens it does not move with the log-prob."))),
    "token mean": Exercise((0.796,), (((1.36625,), "This is the mean over sequences."),
                                      ((3.98,), "This is the sum; divide by the number of tokens."),
                                      ((0.995,), "Divide by the tokens, not by the sequences."))),
    "sequence mean": Exercise((1.36625,), (((0.796,), "This is the mean over tokens."),
                                           ((5.465,), "This is the sum over sequences."))),
    "first update": Exercise((-0.3, -0.3, 0.1, 0.1, 0.1), (
        ((0.0,) * 5, "The ratio is 1, but it still moves with the log-prob: its slope is 1, too."),
        ((-1.5, -1.5, 0.5, 0.5, 0.5), "One more thing: the loss is a mean over five tokens."),
        ((0.3, 0.3, -0.1, -0.1, -0.1), "The loss falls where a good token gets more likely: mind the sign."))),
    "flat group": Exercise((0.398,), (((0.796,), "The tokens of the flat group still count among the tokens."),)),
    "dual clip": Exercise((5.0,), (((6.0,), "This is the loss without a bound."),
                                   ((10.0,), "The bound is c times the size of the advantage."))),
    "gain in points": Exercise((4.28,), (((19.3,), "This is the relative gain, in percent of the old score."),
                                         ((19.2967,), "This is the relative gain, in percent of the old score.")),
                               0.01),
    "mean of gains": Exercise((1.65,), (((1.437,), "This is the gain of the means; take each gain first."),
                                        ((0.93,), "These are points."),), 0.01),
    "average of 4B": Exercise((16.46,), (((13.04,), "This is the printed number."),
                                         ((6.995,), "These are points; relative to the old mean is asked."),), 0.02),
}
