"""What a class needs: copies without answers, and notebooks put back without a loss."""

from __future__ import annotations

import copy
import fcntl
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("*.ipynb"))


def script(name: str) -> ModuleType:
    """A script of `site/` as a module; dataclasses look their module up."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


student, reset = script("student"), script("reset")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The student's notebooks by name."""
    return {path.name: json.loads(path.read_text(encoding="utf8"))
            for path in student.write(tmp_path_factory.mktemp("student"))}


def markdown(book: dict[str, Any]) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")


def code(book: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def test_every_lesson_has_a_students_copy_and_no_solution_has(copies: dict[str, dict[str, Any]]) -> None:
    assert sorted(copies) == [path.name for path in LESSONS]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_students_copy_has_all_code_and_neither_outputs_nor_answers(
        path: Path, copies: dict[str, dict[str, Any]]) -> None:
    book = copies[path.name]
    nbformat.validate(copy.deepcopy(book))
    assert code(book) == code(json.loads(path.read_text(encoding="utf8")))
    assert [cell["id"] for cell in book["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    assert not re.search(r"<details|</details|\(solutions/", markdown(book))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_links_of_a_students_copy_lead_to_other_copies_and_into_the_repository(path: Path) -> None:
    out = ROOT / "build" / "student"
    links = re.findall(r"\]\(([^)#\s]+)", markdown(student.student_copy(json.loads(path.read_text("utf8")), out)))
    assert len(links) > 5
    assert [link for link in links if not link.startswith("http") and not (NOTEBOOKS / link).exists()
            and not (out / link).resolve().exists()] == []


def test_what_is_folded_goes_and_what_stands_around_it_stays(tmp_path: Path) -> None:
    text = ("1. How many?\n\n<details><summary>Answer</summary>\nEight, <details>as said</details> twice</details>\n\n"
            "2. Why? See [00](00_start_here.ipynb), [docs](../docs/scaling.md) and [answers](solutions/00.ipynb).")
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": text.splitlines(keepends=True)},
             {"cell_type": "markdown", "id": "b", "metadata": {}, "source": ["<details>\nAll of it.\n</details>"]}]
    [left] = student.student_copy({"cells": cells}, student.ROOT / "build" / "student")["cells"]
    assert "".join(left["source"]) == ("1. How many?\n\n\n2. Why? See [00](00_start_here.ipynb), "
                                       "[docs](../../docs/scaling.md) and the teacher's copy.")


@pytest.fixture
def played(tmp_path: Path) -> Path:
    """A repository in which one notebook was changed, one deleted, one added, and two runs were written."""
    write(tmp_path, {"notebooks/a.ipynb": "as committed", "notebooks/solutions/a.ipynb": "answers",
                     "notebooks/b.ipynb": "untouched", "README.md": "text"})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x")
    write(tmp_path, {"notebooks/a.ipynb": "my answers", "notebooks/mine.ipynb": "my own", "README.md": "my text",
                     "notebooks/.ipynb_checkpoints/a.ipynb": "", "runs/notebook-04/config.toml": "played",
                     "runs/notebook-04/.lock": "", "runs/laptop/config.toml": "trained", "runs/reward-lab.toml": "x"})
    (tmp_path / "notebooks/solutions/a.ipynb").unlink()
    return tmp_path


def write(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def git(root: Path, *command: str) -> None:
    subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)


def press_reset(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "site" / "reset.py", root]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_reset_says_what_it_does_restores_notebooks_and_keeps_all_that_was_changed(played: Path) -> None:
    done = press_reset(played)
    assert done.returncode == 0, done.stderr
    [kept] = (played / "kept").iterdir()
    for said in (f"copy notebooks/a.ipynb to kept/{kept.name}/ and restore it",
                 f"move runs/notebook-04 to kept/{kept.name}/", "delete notebooks/.ipynb_checkpoints"):
        assert said in done.stdout
    left = {path.relative_to(played).as_posix(): path.read_text() for path in played.rglob("*")
            if path.is_file() and ".git" not in path.parts}
    mine = f"kept/{kept.name}"
    assert left == {"notebooks/a.ipynb": "as committed", "notebooks/b.ipynb": "untouched", "README.md": "my text",
                    "notebooks/solutions/a.ipynb": "answers", "notebooks/mine.ipynb": "my own",
                    "runs/laptop/config.toml": "trained", f"{mine}/notebooks/a.ipynb": "my answers",
                    f"{mine}/runs/notebook-04/config.toml": "played", f"{mine}/runs/notebook-04/.lock": "",
                    f"{mine}/runs/reward-lab.toml": "x"}
    assert "Nothing to do" in press_reset(played).stdout


def test_a_reset_touches_nothing_while_a_run_is_held(played: Path) -> None:
    with (played / "runs/notebook-04/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = press_reset(played)
    assert done.returncode == 1
    assert "runs/notebook-04 is still being trained" in done.stderr
    assert (played / "notebooks/a.ipynb").read_text() == "my answers"
    assert not (played / "kept").exists()


def test_a_reset_without_git_says_so_and_touches_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"notebooks/a.ipynb": "x", "runs/notebook-04/config.toml": "x"})
    done = press_reset(tmp_path)
    assert done.returncode == 1
    assert "git does not work here" in done.stderr
    assert (tmp_path / "runs/notebook-04/config.toml").exists()


@pytest.mark.parametrize("target", ["student", "reset"])
def test_make_has_the_target(target: str) -> None:
    said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"site/{target}.py" in said
