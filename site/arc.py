"""Write into the first cell of each notebook where its reader is: `python site/arc.py`.

One line of links below the title, the notebook's own name in bold; run again, it changes nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
#: the course in its order: files of `notebooks/`, and what a reader calls them
ARC = {
    "00_start_here": "00 start",
    "01_do_models_know_themselves": "01 know thyself",
    "02_the_reward_lab": "02 reward lab",
    "03_grpo_from_scratch": "03 GRPO",
    "04_train_masa": "04 train it live",
    "05_a_real_model": "05 a real model",
    "06_doing_less": "06 doing less",
    "07_did_it_help": "07 did it help",
    "08_reading_the_paper_critically": "08 the paper",
    "appendix_a_files_and_resuming": "A files, resuming",
    "appendix_b_scale_out": "B scale out",
}
#: how the line begins, so that it is found again
BEGINS = "*You are here:*"


def line(stem: str) -> str:
    """The line of a notebook, in Markdown."""
    return f"{BEGINS} " + " · ".join(f"**{name}**" if other == stem else f"[{name}]({other}.ipynb)"
                                     for other, name in ARC.items() if (NOTEBOOKS / f"{other}.ipynb").exists())


def write(path: Path) -> None:
    """Put the line below the title of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf8"))
    first = notebook["cells"][0]
    title, *rest = re.sub(rf"\n*^{re.escape(BEGINS)}.*$", "", "".join(first["source"]), flags=re.MULTILINE).split("\n")
    text = "\n".join([title, "", line(path.stem), *([] if rest and not rest[0] else [""]), *rest])
    first["source"] = text.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


if __name__ == "__main__":
    for stem in ARC:
        if (NOTEBOOKS / f"{stem}.ipynb").exists():
            write(NOTEBOOKS / f"{stem}.ipynb")
