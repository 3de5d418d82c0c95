"""Copies of the notebooks for a class, without outputs, folded answers and solutions: `python site/student.py FOLDER`.

A copy begins where its reader begins: predictions, quiz and exercises are open, and links lead to what is there. It has
the notebooks as they lie in the folder; what differs from the committed ones is named, as a teacher's own answers are
in them. The standard library alone is needed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import badges  # beside this file

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
FOLDED = re.compile(r"<details\b(?:(?!<details\b).)*?</details>[ \t]*\n?", re.DOTALL | re.IGNORECASE)
SOLUTION = re.compile(r"\[[^\]]*\]\((?:\./)?solutions/[^)]*\)")
ABOVE = re.compile(r"\]\((\.\./[^)#\s]+)")
#: what stands where a link to the solutions stood
INSTEAD = "the teacher's copy"


def unfolded(text: str) -> str:
    """A text without what is folded in it, the innermost first, and without links to the solutions."""
    while FOLDED.search(text):
        text = FOLDED.sub("", text)
    return SOLUTION.sub(INSTEAD, text).strip("\n")


def student_copy(book: dict[str, Any], out: Path) -> dict[str, Any]:
    """A notebook without outputs and answers, its links as seen from the folder `out`."""
    def led(match: re.Match[str]) -> str:
        return "](" + Path(os.path.relpath(NOTEBOOKS / match[1], out)).as_posix()

    cells = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell = cell | {"outputs": [], "execution_count": None}
        elif not (text := ABOVE.sub(led, unfolded(badges.without(text)))).strip():  # badges open the teacher's
            continue
        cells.append(cell | {"source": text.splitlines(keepends=True)})
    return book | {"cells": cells}


def changed(folder: Path = ROOT) -> list[str]:
    """The notebooks that differ from the committed ones, as paths from the repository's top; none without git."""
    listed = subprocess.run(["git", "diff", "--name-only", "--relative", "HEAD", "--", "notebooks/*.ipynb"], cwd=folder,
                            capture_output=True, text=True, check=False)
    return listed.stdout.splitlines()


def write(out: Path) -> Iterator[Path]:
    """Write the copies of all lessons into a folder, over those of last time; gives each path as it is written."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        book = student_copy(json.loads(path.read_text(encoding="utf8")), out.resolve())
        (out / path.name).write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
        yield out / path.name


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "student"
    written = list(write(folder))
    print(f"{len(written)} notebooks without outputs and answers are in {folder}.")
    for name in changed():
        if not name.startswith("notebooks/solutions/"):
            print(f"{name} is not as it was committed: its copy has your changes, and your answers if you gave any.")
