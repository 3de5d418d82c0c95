"""Print the versions of what pyproject.toml names and of what that pulls in, for constraints.txt.

They are read from the environment that runs this (`python .ci/constraints.py > constraints.txt`), so that what was
tested is what is held. `setuptools` is left to pip, a release of torch for one kind of hardware (`2.13.0+cpu`) is its
plain one, and `vllm` for CUDA is not looked into.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# The versions that were tested: of what pyproject.toml names and of what that pulls in, on Linux with Python 3.11 and
# vLLM's CPU build. `make install` and continuous integration take them; `.ci/constraints.py` writes this file.
"""
#: not held: what builds packages, and this one
LOOSE = {"setuptools", "pip", "wheel", "masa-lib"}


def wanted() -> list[Requirement]:
    """What pyproject.toml names, all extras but that for CUDA."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "vllm" for line in lines]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def installed() -> dict[str, str]:
    """Package to version: those named, and what they need here, as far as it is installed."""
    found: dict[str, str] = {}
    queue, seen = wanted(), set()
    while queue:
        entry = queue.pop()
        name, extras = canonicalize_name(entry.name), frozenset(entry.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            package = distribution(entry.name)
        except PackageNotFoundError:  # left out of vLLM's, see the Makefile
            continue
        found[name] = package.version.partition("+")[0]
        queue += [need for line in package.requires or [] if (need := Requirement(line)).marker is None
                  or any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras})]
    return {name: version for name, version in sorted(found.items()) if name not in LOOSE}


if __name__ == "__main__":
    print(HEAD + "\n".join(f"{name}=={version}" for name, version in installed().items()))
