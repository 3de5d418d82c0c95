"""The notebooks that need no torch as a JupyterLite, which runs them in the browser: `make lite`.

`python site/lite.py FOLDER WHEELS` writes what JupyterLite shows: notebooks, library, records. WHEELS is a folder of
pure wheels that the site brings along. Packages with compiled code (numpy, pandas, pyarrow, scipy, pydantic-core) come
from Pyodide's own distribution, by default from its CDN when a notebook starts: see docs/browser.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import badges  # beside this file
import nbformat

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ("02_the_reward_lab", "06_doing_less", "07_did_it_help", "08_reading_the_paper_critically")
#: what the library imports without torch; the first are Pyodide's, the last are wheels of the site
PACKAGES = ("numpy", "pandas", "pyarrow", "scipy", "pydantic", "tqdm", "plotly", "ipywidgets", "anywidget", "tomli_w")
#: weights, which need torch, and what only a run of one's own writes
LEFT_OUT = shutil.ignore_patterns("*.safetensors", "__pycache__", "*.pyc")
FIRST = f"""# Only in the browser: fetch what the notebook imports, and find the library. The first time takes a minute.
import os, piplite, sys
await piplite.install({list(PACKAGES)})
sys.path.insert(0, os.path.abspath(".."))
os.environ["PLOTLY_RENDERER"] = "plotly_mimetype\""""


def contents(folder: Path) -> None:
    """Write the files that JupyterLite shows: as in the repository, without weights."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("masa_lib", "data", "studies", "docs/pictures"):
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    for part in ("", "solutions"):
        for name in BOOKS:
            write_book(ROOT / "notebooks" / part / f"{name}.ipynb", folder / "notebooks" / part / f"{name}.ipynb",
                       ".." if not part else "../..")


def write_book(source: Path, place: Path, root: str) -> None:
    """A notebook for the browser: a cell before its first import fetches what it imports; outputs are left out."""
    book = nbformat.read(source, 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    book.cells[0].source = badges.without(book.cells[0].source)
    badges.put(book, FIRST.replace('"..")', f'"{root}")'))
    book.metadata.kernelspec = {"name": "python", "display_name": "Python (Pyodide)", "language": "python"}
    place.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.from_dict(book), place)


def build(out: Path, wheels: Path, pyodide: str = "") -> None:
    """Build the site.

    Args:
        out: folder of the site.
        wheels: folder of pure wheels.
        pyodide: a distribution of Pyodide to bring along, the file or the address of a .tar.bz2; empty: its CDN.
    """
    work = out.with_name(f"{out.name}-work")
    if pyodide and Path(pyodide).exists():
        pyodide = str(Path(pyodide).resolve())
    contents(work / "contents")
    command = [sys.executable, "-m", "jupyterlite_core", "build", f"--lite-dir={work}", f"--output-dir={out}",
               f"--contents={work / 'contents'}", f"--piplite-wheels={wheels}"]
    subprocess.run([*command, *([f"--pyodide={pyodide}"] if pyodide else [])], cwd=work, check=True)


if __name__ == "__main__":
    build(*(Path(folder).resolve() for folder in sys.argv[1:3]), *sys.argv[3:])
