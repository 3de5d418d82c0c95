"""What a notebook asks of the computer before it begins, in sentences that say what to do.

`SMOKE` is the one switch that shrinks a notebook's live work (`MASA_SMOKE=1`), for automatic checks. The standard
library alone is imported: on a hosted machine the rest is installed from here.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from masa_lib import DATA, ROOT

SMOKE = os.environ.get("MASA_SMOKE") == "1"
#: panels show a picture of themselves where no reader can turn their knobs: `make notebooks` sets it
STATIC = os.environ.get("MASA_STATIC") == "1"
#: GB of free memory that the notebooks want
MEMORY = 2.0
#: what a hosted machine has in builds of its own, and has often loaded: never installed or changed
KEPT = ("torch", "numpy", "pandas")


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
        there = any((DATA / place).rglob("config*.*"))
        said.append(f"{what} is there (data/{place})." if there else f"{what} is missing (data/{place}): {remedy}.")
    return said + hosted_advice()


def wanted_packages() -> list[Any]:
    """What this library asks for, as requirements: of its installation, or of the repository that it is used from."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # pip brings one of its own
        from pip._vendor.packaging.requirements import Requirement

    project = ROOT / "pyproject.toml"
    try:
        lines = metadata.requires("masa-lib") or []
    except metadata.PackageNotFoundError:
        lines = tomllib.loads(project.read_text(encoding="utf8"))["project"]["dependencies"] if project.exists() else []
    return [entry for line in lines if not (entry := Requirement(line)).marker]


def version_of(package: str) -> str:
    """The installed version; empty where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def wrong_packages() -> list[str]:
    """The packages that are missing or whose version this library does not take."""
    return [f"{entry.name} is {version_of(entry.name) or 'missing'}, wanted {entry.specifier}"
            for entry in wanted_packages() if not _fits(entry)] or ([] if wanted_packages() else
                                                                    ["masa-lib is not installed"])


def _fits(wanted: Any) -> bool:
    """Whether a requirement is met."""
    version = version_of(wanted.name)
    return bool(version) and wanted.specifier.contains(version, prereleases=True)


def settle(folder: str) -> None:
    """Make a repository that a notebook has fetched its home: install what is missing, and work in a folder of it."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    install_missing()
    os.chdir(ROOT / folder)
    for said in wrong_packages():
        print(f"{said}: this may do, or install it and restart the kernel.")


def install_missing() -> None:
    """Install the packages that are missing or do not fit, but KEPT, and none that would change one of KEPT."""
    asked = [str(entry) for entry in wanted_packages() if entry.name not in KEPT and not _fits(entry)]
    if not asked:
        return
    with tempfile.TemporaryDirectory() as place:
        held = Path(place) / "held.txt"
        held.write_text("".join(f"{name}=={version}\n" for name in KEPT if (version := version_of(name))))
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", str(held), *asked], check=True)
    importlib.invalidate_caches()


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
