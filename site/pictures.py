"""Write docs/pictures: of each notebook one figure, as it stands in its executed file: `python site/pictures.py`."""

from __future__ import annotations

import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: by notebook the cell whose figure is shown
CELLS = {"00_start_here": "pushes", "01_do_models_know_themselves": "scatter", "02_the_reward_lab": "update-asks",
         "03_grpo_from_scratch": "curve", "04_train_masa": "before0405", "05_a_real_model": "figure0406",
         "06_doing_less": "arms", "07_did_it_help": "curve", "08_reading_the_paper_critically": "outcome-figure",
         "appendix_b_scale_out": "methods-figure"}


def picture(stem: str) -> bytes:
    """The PNG of a notebook's figure."""
    cells = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf8"))["cells"]
    outputs = next(cell["outputs"] for cell in cells if cell["id"] == CELLS[stem])
    return base64.b64decode(next(output["data"]["image/png"] for output in outputs
                                 if "image/png" in output.get("data", {})))


if __name__ == "__main__":
    for stem in CELLS:
        (ROOT / "docs" / "pictures" / f"{stem}.png").write_bytes(picture(stem))
