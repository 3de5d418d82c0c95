"""The package as an installation puts it somewhere, without the checkout around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import SETTINGS
from test_layout import ROOT, repository_files

pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation copies, made from the files of the repository alone."""
    place = tmp_path_factory.mktemp("installed")
    for path in repository_files():
        name = path.relative_to(ROOT)
        if name.parts[0] in ("masa_lib", "data", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
            target = place / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (place / "source" / "data" / "runs" / ".packing").mkdir()
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(place / "site")],
                   cwd=place / "source", check=True)
    shutil.rmtree(place / "source")
    return place / "site"


def run(site: Path, place: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=place, env=os.environ | {"PYTHONPATH": str(site)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_installed_package_brings_its_data_and_keeps_its_hands_off_itself(installed: Path, tmp_path: Path) -> None:
    code = "import masa_lib; from masa_lib.lessons import model_choice as m; print(masa_lib.DATA, m.PLACE, sep='\\n')"
    assert run(installed, tmp_path, "-c", code).split() == [
        str(installed / "masa_lib" / "data"), str(tmp_path / "runs" / "model.txt")]
    kept, ours = ({str(path.relative_to(root)) for path in (root / "data").rglob("*") if path.is_file()}
                  for root in (installed / "masa_lib", ROOT))
    assert kept <= ours and {"data/pocket/model.safetensors", "data/runs/baseline/metrics.parquet"} <= kept
    assert not (installed / "masa_lib" / "data" / "runs" / ".packing").exists()


@pytest.mark.slow
def test_an_installed_package_trains_anywhere_and_compares_with_a_recorded_run(installed: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "model.name"}
    said = run(installed, tmp_path, "-m", "masa_lib.cli", "train", "--out", "mine", "--method", "masa", "--set",
               *(f"{key}={value}" for key, value in settings.items()))
    assert "Trained: mine" in said
    recorded = installed / "masa_lib" / "data" / "runs" / "replay"
    assert "accuracy, final" in run(installed, tmp_path, "-m", "masa_lib.cli", "compare", "mine", str(recorded))
