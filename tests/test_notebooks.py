"""The notebooks as files: executed, small, clean, and really compared by nbval. That they run is nbval's part."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
LESSONS, SOLUTIONS = (sorted(folder.glob("*.ipynb")) for folder in (NOTEBOOKS, NOTEBOOKS / "solutions"))
LIMIT = 1_000_000  # bytes
LINES = 25  # of a cell
WIDE = 118  # characters of code that JupyterLab shows beside its side bar in a window of 1366 pixels
#: of nbval and nbclient: cells that are not run, whose output is ignored, or that may fail
EVASIONS = re.compile(r"NBVAL_(SKIP|IGNORE_OUTPUT|RAISES_EXCEPTION)|nbval-(skip|ignore-output|raises-exception)"
                      r"|raises-exception|skip-execution", re.IGNORECASE)
COMPARED = "# NBVAL_CHECK_OUTPUT"
#: how many such cells a notebook may have, by its place in the folder: a number that is never to grow
EVADING: dict[str, int] = {}
#: cells that show recorded data and are compared, at least
WANTED = {"00_start_here": 1, "01_do_models_know_themselves": 8, "02_the_reward_lab": 8, "03_grpo_from_scratch": 7,
          # the tables of models went from 04 to 05, the file of problems to appendix A
          "04_train_masa": 2, "05_a_real_model": 4, "06_doing_less": 5, "07_did_it_help": 9,
          "08_reading_the_paper_critically": 15, "appendix_a_files_and_resuming": 2, "appendix_b_scale_out": 3,
          "solutions/00_start_here": 2, "solutions/01_do_models_know_themselves": 2,
          "solutions/02_the_reward_lab": 5, "solutions/04_train_masa": 2, "solutions/05_a_real_model": 2,
          "solutions/06_doing_less": 2, "solutions/07_did_it_help": 3, "solutions/08_reading_the_paper_critically": 7}


def place(path: Path) -> str:
    return path.relative_to(NOTEBOOKS).with_suffix("").as_posix()


every_notebook = pytest.mark.parametrize("path", [*LESSONS, *SOLUTIONS], ids=place)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=place)
every_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=place)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf8"))


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]


def shown(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(cell["id"], output) for cell in code_cells(path) for output in cell["outputs"]]


@every_notebook
def test_is_at_most_a_megabyte(path: Path) -> None:
    assert path.stat().st_size <= LIMIT


@every_notebook
def test_was_executed_in_order_from_a_fresh_kernel(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@every_notebook
def test_has_no_errors_and_no_noise_in_its_outputs(path: Path) -> None:
    faults = [where for where, output in shown(path)
              if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert faults == []


@every_lesson
def test_most_cells_show_something(path: Path) -> None:
    cells = code_cells(path)
    assert sum(bool(cell["outputs"]) for cell in cells) >= 0.8 * len(cells)


@every_notebook
def test_has_no_widget_state_and_no_leftover_metadata(path: Path) -> None:
    book = load(path)
    assert set(book["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["id"] for cell in book["cells"] if cell["metadata"]] == []
    assert [where for where, output in shown(path)
            if any("widget" in kind for kind in output.get("data", {}))] == []


@every_notebook
def test_names_the_kernel_that_everybody_has(path: Path) -> None:
    assert load(path)["metadata"]["kernelspec"]["name"] == "python3"


@every_notebook
def test_names_no_machine_and_no_absolute_path(path: Path) -> None:
    book = load(path)
    for cell in book["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)  # base64 is full of slashes
    text = json.dumps(book)
    folders = "home|root|tmp|work|usr|opt|mnt|Users"
    assert re.findall(rf"(?<![\w.:/\\<])(?:/(?:{folders})/\S{{0,40}}|[A-Z]:\\\\\S{{0,40}})", text) == []
    name = socket.gethostname()
    assert name in ("localhost", "") or not re.search(rf"\b{re.escape(name)}\b", text)


@every_notebook
def test_cells_are_short_and_have_names(path: Path) -> None:
    cells = load(path)["cells"]
    assert [cell["id"] for cell in cells if len(source(cell).splitlines()) > LINES] == []
    assert len({cell["id"] for cell in cells}) == len(cells)


@every_notebook
def test_no_line_of_code_is_cut_at_the_edge_of_a_small_window(path: Path) -> None:
    assert [(cell["id"], line) for cell in code_cells(path) for line in source(cell).splitlines()
            if len(line) > WIDE] == []


@every_notebook
def test_no_more_cells_than_allowed_evade_being_run_or_compared(path: Path) -> None:
    evading = [cell["id"] for cell in load(path)["cells"]
               if EVASIONS.search(json.dumps(cell["metadata"]) + source(cell))]
    assert len(evading) <= EVADING.get(place(path), 0), evading


@pytest.mark.parametrize("tag", ["# NBVAL_SKIP", "# nbval_ignore_output", "# NBVAL_RAISES_EXCEPTION", "nbval-skip",
                                 "raises-exception", "skip-execution"])
def test_what_evades_is_recognised(tag: str) -> None:
    assert EVASIONS.search(tag)
    assert not EVASIONS.search(COMPARED)


@every_notebook
def test_recorded_tables_are_compared(path: Path) -> None:
    marked = [cell for cell in code_cells(path) if source(cell).startswith(COMPARED)]
    assert len(marked) >= WANTED.get(place(path), 0)
    for cell in marked:  # images are never compared, so a compared cell shows text
        assert any("text" in output or "text/plain" in output.get("data", {}) for output in cell["outputs"]), cell["id"]


@every_notebook
def test_figures_are_drawn_for_plotly_and_for_those_without(path: Path) -> None:
    drawn = [(where, output["data"]) for where, output in shown(path)
             if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert [where for where, data in drawn if "image/png" not in data] == []


@every_lesson
def test_opens_and_closes_as_every_notebook_does(path: Path) -> None:
    text = "\n".join(source(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    for wanted in ("# ", r"\*\*What you will (learn|be able to do)\*\*", r"\*\*How long\*\*", "## Predict first",
                   "## (Takeaways|Verdict)", "## Exercises", "## Where to read on"):
        assert re.search(wanted, text), wanted
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert [link for link in links if not link.startswith("http") and not (path.parent / link).exists()] == []


@every_lesson
def test_checked_exercises_have_solutions(path: Path) -> None:
    if any("checks.check" in source(cell) for cell in code_cells(path)):
        assert (NOTEBOOKS / "solutions" / path.name).is_file()


@every_solution
def test_solutions_belong_to_a_lesson_and_are_right(path: Path) -> None:
    assert (NOTEBOOKS / path.name).is_file()
    said = json.dumps([output for _, output in shown(path)])
    assert "not yet" not in said
    assert "no answer yet" not in said


@every_lesson
def test_says_where_its_reader_is_in_the_course(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("arc", ROOT / "site" / "arc.py")
    arc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arc)
    assert path.stem in arc.ARC
    assert arc.line(path.stem) in source(load(path)["cells"][0]).splitlines(), "run: python site/arc.py"
