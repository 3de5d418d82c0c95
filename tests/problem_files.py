"""Files of problems as a test writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."


def texts(problems: list) -> list[str]:
    return [problem.text for problem in problems]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf8")
    return str(path)


def plain_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(start, start + count)]
