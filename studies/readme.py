"""Write the tables of recorded studies into the README, between its markers: `python studies/readme.py`.

Every number of such a table is what `masa compare` prints of the records; a test runs this and finds no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from masa_lib.analysis import compare, report

ROOT = Path(__file__).resolve().parent.parent
EQUAL = [f"{label} at equal accuracy, ratio" for label in ("tokens", "prompts read", "update", "seconds",
                                                           "all computed", "update thrice")]
COSTS = ["tokens, all streams", "prompts read, tokens", "tokens through the update", "seconds", *EQUAL,
         "tokens to target, ratio"]
#: by marker: studies beside each other, each with what its columns are called; rows of the table (none: a row an arm)
TABLES = {
    "baseline": ({"baseline": "pocket, ", "smollm2": "SmolLM2, "}, [
        "seeds", "optimiser updates", "accuracy, base", "accuracy, final", "r of the pass rate", "within levels",
        *COSTS]),
    "efficiency": ({"efficiency": ""}, [
        "seeds", "accuracy, final", "accuracy above grpo", *COSTS, "seeds that never reach it", "r of the pass rate",
        "precision of the gate", "recall of the gate"])}


def recorded(name: str) -> compare.Comparison:
    """The comparison of a recorded study."""
    return compare.compare_runs(ROOT / "data" / "runs" / name)


def table(studies: dict[str, str], labels: list[str], read: Callable[[str], compare.Comparison]) -> str:
    """Measures (rows) by arms (columns) in Markdown, those that there are; of a single study, arms by measures."""
    columns: list[dict[str, str]] = []
    for name, prefix in studies.items():
        head, *rows = report.table_rows(read(name).summary)
        found = {row[0].strip(): row[1:] for row in rows}
        columns += [{"": prefix + arm, **{label: found[label][place] if label in found else "-" for label in labels}}
                    for place, arm in enumerate(head[1:])]
    cells = [[label, *(column[label] for column in columns)] for label in ["", *labels]
             if any(column[label] != "-" for column in columns)]
    if len(studies) == 1:
        cells = [list(row) for row in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(row).lstrip() + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


def filled(text: str, read: Callable[[str], compare.Comparison] = recorded) -> str:
    """The README with its tables as the records have them; `read` compares the runs of a study."""
    for name, (studies, labels) in TABLES.items():
        begin, end = f"<!-- records: {name} -->\n", "\n<!-- end of records -->"
        before, _, rest = text.partition(begin)
        text = before + begin + table(studies, labels, read) + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf8")), encoding="utf8")
