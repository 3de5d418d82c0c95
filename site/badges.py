"""Write into each notebook what opens it on a hosted machine: `make badges`. Run again, it changes nothing.

Two badges under the title, for Colab and Kaggle, where pyproject.toml names the repository's address ([project.urls],
Repository); while it does not there are none. And a cell that fetches the library where it is not there, before the
first import, or under the title where nothing is imported. The standard library alone is needed.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import arc  # beside this file

ROOT = Path(__file__).resolve().parent.parent
#: of the cell before the first import; JupyterLite's build puts its own source into it
ID = "fetch"
COLAB = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/{}/blob/main/{})")
KAGGLE = ("[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
          "(https://kaggle.com/kernels/welcome?src=https://github.com/{}/blob/main/{})")
BADGES = re.compile(r"\n*^\[!\[Open in Colab\].*$", re.MULTILINE)
#: both hosts open notebooks of GitHub
GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?")
IMPORTS = re.compile(r"^(?:import|from) ", re.MULTILINE)
HEAD = """\
# Where masa_lib is not there, as on Colab and Kaggle: fetch it, and install what it lacks but never torch.
from importlib.util import find_spec

if find_spec("masa_lib") is None:
"""
FETCH = HEAD + """\
    import os
    import subprocess
    import sys

    if not os.path.exists("masa"):
        subprocess.run(["git", "clone", "-q", "--depth=1", "{address}", "masa"], check=True)
    sys.path.insert(0, os.path.abspath("masa"))
    from masa_lib.lessons import environment

    environment.settle("{folder}")
"""
UNKNOWN = HEAD + """\
    raise ModuleNotFoundError("masa_lib is not there, and this copy of the notebook names no repository to fetch it "
                              "from: give `make lab` in the one that it came from, and open it there.")
"""


def address(root: Path = ROOT) -> str:
    """The repository's address in pyproject.toml; empty while it names none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf8"))["project"]
    return project.get("urls", {}).get("Repository", "")


def badges(where: str, path: str) -> str:
    """The badges of a notebook, in Markdown; none without an address.

    Args:
        where: the repository's address.
        path: of the notebook in it.
    """
    if not where:
        return ""
    found = GITHUB.fullmatch(where)
    if not found:
        raise SystemExit(f"Colab and Kaggle open notebooks of GitHub, and the address is {where}: set Repository under "
                         "[project.urls] in pyproject.toml to https://github.com/OWNER/NAME, or take it out.")
    return " ".join(badge.format(found[1], path) for badge in (COLAB, KAGGLE))


def without(text: str) -> str:
    """A notebook's first text without badges."""
    return BADGES.sub("", text)


def titled(text: str, line: str) -> str:
    """A notebook's first text with these badges under its title, and under the line that says where its reader is."""
    parts = without(text).split("\n\n")
    place = 1 + (len(parts) > 1 and parts[1].startswith(arc.BEGINS))
    return "\n\n".join([*parts[:place], *([line] if line else []), *parts[place:]])


def cell(where: str, folder: str) -> str:
    """The source of the cell before the first import.

    Args:
        where: the repository's address; empty: the cell says what to do.
        folder: of the notebook in it.
    """
    return (FETCH.format(address=where, folder=folder) if where else UNKNOWN).rstrip("\n")


def put(book: dict[str, Any], source: str) -> None:
    """Make this the source of the cell before a notebook's first import, and count the cells from there on."""
    cells = [entry for entry in book["cells"] if entry["id"] != ID]
    executed = all(entry["execution_count"] for entry in cells if entry["cell_type"] == "code")
    place = next((place for place, entry in enumerate(cells)
                  if entry["cell_type"] == "code" and IMPORTS.search("".join(entry["source"]))), 1)
    cells.insert(place, {"cell_type": "code", "execution_count": None, "id": ID, "metadata": {}, "outputs": [],
                     "source": source.splitlines(keepends=True)})
    for number, entry in enumerate((entry for entry in cells if entry["cell_type"] == "code"), 1):
        for counted in (entry, *(shown for shown in entry["outputs"] if "execution_count" in shown)):
            counted["execution_count"] = number if executed else None
    book["cells"] = cells


def write(root: Path = ROOT) -> None:
    """Write the badges and this cell of all notebooks of a repository."""
    where = address(root)
    for path in sorted((root / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        book, name = json.loads(path.read_text(encoding="utf8")), path.relative_to(root)
        first = book["cells"][0]
        first["source"] = titled("".join(first["source"]), badges(where, name.as_posix())).splitlines(keepends=True)
        put(book, cell(where, name.parent.as_posix()))
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


if __name__ == "__main__":
    write()
    print(f"The notebooks open from {address()}." if address() else
          "No badges: pyproject.toml names no Repository under [project.urls]. A cell of each notebook says so.")
