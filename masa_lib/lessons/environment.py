"""What a notebook asks of the computer before it begins, in sentences that say what to do.

`SMOKE` is the one switch that shrinks a notebook's live work (`MASA_SMOKE=1`), for automatic checks.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata

from masa_lib.models import tiers

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
                                ("The recorded study", "runs/baseline", "a fresh clone of the repository has it"),
                                ("The record of beliefs", "runs/beliefs", "a fresh clone of the repository has it")):
        there = any((tiers.DATA / place).rglob("config*.*"))
        said.append(f"{what} is there (data/{place})." if there else f"{what} is missing (data/{place}): {remedy}.")
    return said + hosted_advice()


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


def hosted_advice() -> list[str]:
    """What to know on Colab or Kaggle, a sentence each; nothing elsewhere."""
    if "COLAB_RELEASE_TAG" in os.environ:
        return ["This is Colab: run `from google.colab import output; output.enable_custom_widget_manager()` once, or "
                "panels stay empty.",
                "Its page answers a slider only when no cell is running, and its files go when the session ends: copy "
                "runs/ elsewhere."]
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return ["This is Kaggle: switch on the Internet in the notebook's settings to install, and a GPU for more than "
                "the pocket model.",
                "Its page answers a slider only when no cell is running, and it keeps the working folder alone."]
    return []
