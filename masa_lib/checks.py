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


def pays_pass_rate_alone(settings: Mapping[str, Any]) -> str:
    """Check an exercise of 04: settings by which a running training pays predictions for the pass rate alone."""
    from masa_lib import config as configs
    from masa_lib import control

    fixed = [key for key in settings if not key.startswith(control.LIVE)]
    if fixed:
        return f"Not yet: a running training would refuse {fixed[0]}."
    try:
        reward = configs.replace(tiers.config(), settings).reward
    except configs.ConfigError as error:
        return f"Not yet: {error}"
    if reward.length_weight or reward.notion_weight:
        return "Not yet: something else than the pass rate is still paid."
    return "Right: the pass rate alone is paid, and a running training would take these settings."


def prediction_share(share: float) -> str:
    """Check an exercise of 04: the share of its sampled tokens that a recorded run spent on predictions."""
    from masa_lib.runs import Run

    metrics = Run.open(tiers.DATA / "runs" / "baseline" / "masa-s0").metrics()
    tokens = metrics[["tokens_meta", "tokens_solution"]].sum()
    right = abs(share - tokens["tokens_meta"] / tokens.sum()) < 0.005
    return f"Right: {share:.3f}." if right else f"Not yet: {share:.3f}. It is tokens_meta over all that is sampled."
