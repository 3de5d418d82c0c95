"""What runs on records runs where torch is not installed, and on Windows: imports are made with what lacks blocked."""

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
#: psutil itself asks for `resource` on Linux alone, so it comes before
BLOCKED = """
import os, psutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "vllm"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("register_at_fork", "pread", "pwrite", "fork"):
    delattr(os, name)
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


@pytest.mark.parametrize(("name", "said"), [("torch", "torch is blocked"), ("fcntl", "import of fcntl halted"),
                                            ("resource", "import of resource halted")])
def test_the_hook_blocks(name: str, said: str) -> None:
    assert said in run(f"import {name}").stderr


def test_a_training_on_windows_is_refused_in_a_sentence_and_its_record_is_read() -> None:
    code = """
from pathlib import Path
from masa_lib import DATA, crash_safe_files, errors
from masa_lib.runs import live_control
from masa_lib.runs.folder import Run
run = Run.open(DATA / "runs" / "baseline" / "masa-s0")
print(len(run.metrics()), live_control.holder(run.path))
try:
    with crash_safe_files.lock(Path("never"), "x"):
        pass
except errors.PlatformError as error:
    print(error)
"""
    said = run(code)
    assert said.returncode == 0, said.stderr[-2000:]
    read, refused = said.stdout.splitlines()
    assert read.endswith(" None") and int(read.split()[0]) > 0
    assert refused.startswith("masa_lib runs on Linux and macOS, and on Windows inside WSL")
    assert not (ROOT / "never").exists()


@pytest.mark.parametrize("name", [f"{folder}{name}" for name in ON_RECORDS for folder in ("", "solutions/")])
def test_a_notebook_on_records_imports_neither_torch_nor_what_windows_lacks(name: str) -> None:
    found = run(imports_of(ROOT / "notebooks" / f"{name}.ipynb"))
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RECORDS)
def test_every_cell_of_a_notebook_on_records_runs_without_torch(name: str) -> None:
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = run("from IPython.display import display\n" + code)  # which a kernel has from the beginning
    assert found.returncode == 0, found.stderr[-2000:]
