"""What runs on records runs where torch is not installed: its imports are made with torch and transformers blocked."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: notebooks that run on records alone
ON_RECORDS = ("02_the_reward_lab", "06_doing_less", "07_did_it_help", "08_reading_the_paper_critically")
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "vllm"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Python without torch, in a process of its own."""
    return subprocess.run([sys.executable, "-c", BLOCKED + code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def imports_of(path: Path) -> str:
    """Every import of a notebook's code cells, wherever in a cell it stands."""
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    trees = [ast.parse("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    return "\n".join(ast.unparse(node) for tree in trees for node in ast.walk(tree)
                     if isinstance(node, ast.Import | ast.ImportFrom))


def test_the_hook_blocks_torch() -> None:
    assert "torch is blocked" in run("import torch").stderr


@pytest.mark.parametrize("name", [f"{folder}{name}" for name in ON_RECORDS for folder in ("", "solutions/")])
def test_a_notebook_on_records_imports_no_torch(name: str) -> None:
    found = run(imports_of(ROOT / "notebooks" / f"{name}.ipynb"))
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RECORDS)
def test_every_cell_of_a_notebook_on_records_runs_without_torch(name: str) -> None:
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = run("from IPython.display import display\n" + code)  # which a kernel has from the beginning
    assert found.returncode == 0, found.stderr[-2000:]
