"""Which code one training step enters: files, functions and lines of their bodies, what a reader has to open.

    python benchmarks/trace_step.py --method masa-read

Every Python call inside masa_lib during the second step is noted (the first one loads what is loaded lazily). The
grader's own process is left out.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import masa_lib
from masa_lib.config import METHODS
from masa_lib.models import tiers
from masa_lib.training.trainer import Trainer

HERE = Path(masa_lib.__file__).parent


def entered(trainer: Trainer) -> set[CodeType]:
    """The functions of the library that one step calls."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(HERE)):
            found.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        trainer.train_step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def lines(code: CodeType) -> int:
    """Lines of a function from its head to its end."""
    numbers = {line for *_, line in code.co_lines() if line}
    return max(numbers) - code.co_firstlineno + 1 if numbers else 0


def table(found: set[CodeType]) -> list[tuple[str, int, int, int]]:
    """File, functions entered, lines of these, lines of the file; comprehensions count with their function."""
    by_file: dict[str, list[CodeType]] = defaultdict(list)
    for code in found:
        if not code.co_name.startswith("<"):
            by_file[code.co_filename].append(code)
    return sorted((str(Path(name).relative_to(HERE)), len(codes), sum(map(lines, codes)),
                   len(Path(name).read_text(encoding="utf8").splitlines())) for name, codes in by_file.items())


def main() -> None:
    """Train two small steps and print what the second one entered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="masa", choices=sorted(METHODS))
    options = parser.parse_args()
    trainer = Trainer(tiers.config({"model.name": "pocket", "method": options.method, "sampling.problems": 4}))
    trainer.train_step()
    rows = table(entered(trainer))
    rows.append(("in all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    print(f"{'file':34}{'functions':>10}{'lines':>7}{'of':>7}")
    for name, functions, entered_lines, whole in rows:
        print(f"{name:34}{functions:10}{entered_lines:7}{whole:7}")


if __name__ == "__main__":
    main()
