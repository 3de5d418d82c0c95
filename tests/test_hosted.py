"""Badges and the cell before a notebook's first import: what opens it on Colab and Kaggle, shown on copies."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import badges  # of site/
import pytest
from test_layout import ROOT, repository_files

from masa_lib.lessons import environment

BOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
ADDRESS = "https://github.com/OWNER/NAME"
HOSTS = ["https://colab.research.google.com/github/OWNER/NAME", f"https://kaggle.com/kernels/welcome?src={ADDRESS}"]
#: of the packages that the library asks for, those that the hosted machine of the test lacks
LACKED = ("math-verify", "latex2sympy2_extended", "plotly", "anywidget", "tomli_w", "gguf")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the notebooks and of pyproject.toml, which names no address."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    (tmp_path / "pyproject.toml").write_text(re.sub(r"(?m)^Repository\b.*\n", "", text), encoding="utf8")
    return tmp_path


def name_address(root: Path, address: str) -> None:
    place = root / "pyproject.toml"
    text = place.read_text(encoding="utf8")
    assert text.count("[project.urls]\n") == 1
    place.write_text(text.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}"\n'), encoding="utf8")


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf8"))["cells"]


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (root / "notebooks").rglob("*.ipynb")}


def test_each_badge_opens_a_notebook_that_is_in_the_tree(copy: Path) -> None:
    name_address(copy, ADDRESS)
    badges.write(copy)
    for book in BOOKS:
        name = book.relative_to(ROOT)
        first, *others = cells(copy / name)
        code = ["".join(cell["source"]) for cell in others if cell["cell_type"] == "code"]
        fetch = next(source for source in code if badges.IMPORTS.search(source))
        opened = re.findall(r"\]\((https:[^)]+/blob/main/([^)]+))\)", "".join(first["source"]))
        assert {path for _, path in opened} == {name.as_posix()} and (copy / name).is_file()
        assert [address.split("/blob/")[0] for address, _ in opened] == HOSTS
        assert f'"{ADDRESS}", "masa"' in fetch
        assert f'settle("{name.parent.as_posix()}")' in fetch


def test_badges_are_written_once_and_go_with_the_address(copy: Path) -> None:
    badges.write(copy)
    without = contents(copy)
    assert b"badge" not in b"".join(without.values())
    badges.write(copy)
    assert contents(copy) == without
    empty = (copy / "pyproject.toml").read_bytes()
    name_address(copy, ADDRESS)
    badges.write(copy)
    within = contents(copy)
    badges.write(copy)
    assert contents(copy) == within != without
    (copy / "pyproject.toml").write_bytes(empty)
    badges.write(copy)
    assert contents(copy) == without


def test_an_address_that_no_badge_can_open_is_refused_in_a_sentence(copy: Path) -> None:
    name_address(copy, "https://example.org/masa")
    before = contents(copy)
    with pytest.raises(SystemExit, match=r"set Repository under \[project.urls\]"):
        badges.write(copy)
    assert contents(copy) == before


def test_badges_stay_out_of_pages_and_students_copies() -> None:
    text = "# Title\n\n*You are here:* **00**\n\nWhat it is about.\n\nMore."
    with_badges = badges.titled(text, badges.badges(ADDRESS, "notebooks/a.ipynb"))
    assert with_badges.split("\n\n")[2].startswith("[![Open in Colab]")
    assert badges.without(with_badges) == text
    for script in ("build.py", "lite.py", "student.py"):
        assert "badges.without(" in (ROOT / "site" / script).read_text(encoding="utf8")


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_the_first_cell_does_nothing_where_the_library_is(
        address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ), list(sys.path)
    exec(compile(badges.cell(address, "notebooks"), "the cell", "exec"), {})
    assert not list(tmp_path.iterdir()) and (dict(os.environ), list(sys.path)) == before
    assert capsys.readouterr() == ("", "")


def test_without_an_address_the_first_cell_says_what_to_do_where_the_library_is_not(
        tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", "-c", badges.cell("", "notebooks")], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "give `make lab` in the one that it came from" in done.stderr


def test_what_is_missing_or_too_old_is_installed_and_torch_numpy_and_pandas_are_held(
        monkeypatch: pytest.MonkeyPatch) -> None:
    there = {entry.name: metadata.version(entry.name) for entry in environment.wanted_packages()}
    asked: list[list[str]] = []
    held: list[str] = []

    def run(command: list[str], check: bool) -> None:
        asked.append(command)
        held.extend(Path(command[command.index("-c") + 1]).read_text().split())

    monkeypatch.setattr(environment.subprocess, "run", run)
    monkeypatch.setattr(environment, "version_of", there.get)
    environment.install_missing()
    assert asked == []
    monkeypatch.setattr(environment, "version_of", (there | {"tqdm": "4.0", "gguf": "", "pandas": "2.2.2"}).get)
    environment.install_missing()
    [command] = asked
    assert sorted(line.split(">")[0].split("<")[0] for line in command[command.index("-c") + 2:]) == ["gguf", "tqdm"]
    assert held == [f"torch=={there['torch']}", f"numpy=={there['numpy']}", "pandas==2.2.2"]
    assert [said.split(",")[0] for said in environment.wrong_packages()] == [
        "gguf is missing", "pandas is 2.2.2", "tqdm is 4.0"]


def farm(place: Path, left: set[str]) -> Path:
    """A folder of links to the packages of this environment without some, which pip only reads."""
    dropped = {"__pycache__"}
    for found in metadata.distributions():
        if re.sub(r"[-_.]+", "-", found.name).lower() in left:
            dropped |= {Path(file).parts[0] for file in found.files or []}
    place.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name not in dropped and path.suffix != ".pth" and not path.name.startswith("__editable__"):
            (place / path.name).symlink_to(path)
    return place


def pip(python: Path, *asked: str) -> None:
    """Install, or skip where there is no registry."""
    done = subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *asked],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install here: {done.stderr.strip().splitlines()[-1]}")


AFTER = """
import importlib, json, sys
seen = {}
for name in ("torch", "numpy", "pandas", "masa_lib"):
    module = importlib.import_module(name)
    seen[name] = [module.__version__, module.__file__]
print(json.dumps(seen))
"""
USED = """
import os, subprocess
assert os.path.exists("00_start_here.ipynb")
subprocess.run([sys.executable, "-m", "masa_lib.cli", "models"], check=True)  # as the panels start a training
print(*map(importlib.import_module("importlib.metadata").version, ("tqdm", "plotly")))
"""


@pytest.mark.slow
def test_on_a_machine_with_other_builds_the_first_cell_brings_the_library_and_leaves_them_alone(
        tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for path in repository_files():
        (target := repository / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "as it is"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "hosted"], check=True)
    python = tmp_path / "hosted" / "bin" / "python"
    left = {"masa-lib", "numpy", "pandas", "tqdm", *(name.lower().replace("_", "-") for name in LACKED)}
    linked = farm(tmp_path / "farm", left)
    pip(python, "tqdm==4.60.0", *(f"{entry},!={metadata.version(entry.name)}" for entry in environment.wanted_packages()
                                  if entry.name in ("numpy", "pandas")))
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                               capture_output=True, text=True, check=True).stdout.strip())
    (site / "farm.pth").write_text(f"{linked}\n")
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": known, "capture_output": True, "text": True, "check": False}
    before = subprocess.run([python, "-c", AFTER.replace(', "masa_lib"', "")], **run)
    assert before.returncode == 0, before.stderr[-2000:]
    assert "No module named" in subprocess.run([python, "-c", "import masa_lib"], **run).stderr
    cell = badges.cell(repository.as_uri(), "notebooks")
    done = subprocess.run([python, "-c", f"{cell}\n{AFTER}{USED}"], **run)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert seen.pop("masa_lib")[1] == str(tmp_path / "masa" / "masa_lib" / "__init__.py")
    assert seen == json.loads(before.stdout)
    assert seen["numpy"][0] != metadata.version("numpy") and seen["pandas"][0] != metadata.version("pandas")
    assert "pocket" in done.stdout and "4.60.0" not in done.stdout.splitlines()[-1]
