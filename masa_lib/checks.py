"""What a notebook asks of the computer before it begins, in sentences that say what to do.

`SMOKE` is the one switch that shrinks a notebook's live work (`MASA_SMOKE=1`), for automatic checks.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from masa_lib import tiers

SMOKE = os.environ.get("MASA_SMOKE") == "1"
#: panels show a picture of themselves where no reader can turn their knobs: `make notebooks` sets it
STATIC = os.environ.get("MASA_STATIC") == "1"
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


def gate_exercise(tuned: Any, fresh: Any, settings: Mapping[str, Any], phase: str = "last third") -> str:
    """Whether a setting of gate and cap beats the recommended one: more tokens saved, net, at no more signal lost.

    Args:
        tuned: `replay.Groups` of the runs that the reader looked at.
        fresh: those of runs that the reader did not look at; they decide.
        settings: by dotted key (`gate_trials.KEYS`); what is left out has the library's default.
        phase: of `replay.PHASES`.

    Raises:
        ConfigError: an unknown setting, or a value that is not allowed.
    """
    from masa_lib import config, gate_trials

    def rows(groups: Any) -> list[Any]:
        recommended = {key: config.get(config.Config(), key) for key in gate_trials.KEYS}
        return [gate_trials.account(groups, config.replace(groups.config, recommended | dict(changes))).loc[phase]
                for changes in (settings, {})]

    said, beaten = [], {}
    for name, groups in (("Tuned on", tuned), ("Other runs", fresh)):
        mine, theirs = rows(groups)
        beaten[name] = (mine["tokens_saved"] > theirs["tokens_saved"]
                        and mine["signal_lost"] <= theirs["signal_lost"])
        said.append(f"{name}: you save {mine['tokens_saved']:+.1%} of the tokens, net, and lose "
                    f"{mine['signal_lost']:.1%} of the signal; the recommended setting {theirs['tokens_saved']:+.1%} "
                    f"and {theirs['signal_lost']:.1%}.")
    verdict = {(True, True): "Beaten, also on runs that you did not tune on.",
               (True, False): "Beaten only where you tuned: that was luck, or too little room; leave a margin.",
               (False, True): "Not beaten where you tuned; that it wins elsewhere is luck.",
               (False, False): "Not beaten: save more without losing more signal than the recommended setting."}
    return "\n".join([*said, verdict[tuple(beaten.values())]])
