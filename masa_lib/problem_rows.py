"""What a problem is, and how the rows of local files and of Hugging Face data sets become problems.

A file is JSONL or Parquet, with the columns `problem` and `answer` (and perhaps `id` and `level`), or in the layout of
verl (`prompt` chat messages, `reward_model.ground_truth`). The first thing wrong with it is told in one sentence that
names file, column or row. Nothing here chooses, divides or orders problems.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masa_lib.datasets_table import DATA_SETS, answer_text, level_number
from masa_lib.errors import MasaError

_INSTRUCTION = re.compile(
    r"\s*(?:Let's|Please) (?:think|reason) step by step,? and (?:output|put) (?:the|your) final answer "
    r"(?:(?:with)?in \\boxed\{\}|after \"####\")\.?\s*\Z")


class ProblemError(MasaError, ValueError):
    """A source of problems cannot be used; the message names the file, column or row, and what is allowed."""


@dataclass(frozen=True)
class Problem:
    """A problem: what is asked (`text`), the right answer, how hard it is (`level`, 0 unknown), where it is from."""

    id: str
    text: str
    answer: str
    level: int
    source: str


def read_hub(name: str, split: str, seed: int) -> list[Problem]:
    """A split of a data set of the table; the few rows that are published without an answer are left out.

    Args:
        name: a key of `DATA_SETS`.
        split: the hub's name of the split.
        seed: of shuffled options.

    Raises:
        ProblemError: the set cannot be loaded, lacks a column, or has a row that is laid out otherwise.
    """
    import datasets

    entry = DATA_SETS[name]
    try:
        table = datasets.load_dataset(entry.hub, entry.config, split=split)
    except Exception as error:  # of the hub, the network, the agreement or the parser: types without a common base
        raise ProblemError(f"The data set {name} ({entry.hub}, split {split}) cannot be loaded from the hub or its "
                           f"cache: {error}") from error
    for column in entry.columns:
        if column not in table.column_names:
            raise ProblemError(f"The data set {name} ({entry.hub}) has no column {column!r}; "
                               f"it has {', '.join(table.column_names)}.")
    problems = []
    for number, row in enumerate(table):
        try:
            text, answer, level = entry.read(row, random.Random(f"{seed}/{name}/{number}"))
            problems.append(Problem(f"{name}-{split}-{number}", text.strip(), answer, level, name))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ProblemError(f"Row {number} of the data set {name} ({entry.hub}) is not laid out as expected: "
                               f"{error!r}.") from error
    return [problem for problem in problems if problem.text and problem.answer]


def read_file(source: str) -> Iterator[Problem]:
    """The problems of a JSONL or Parquet file, in its order.

    Raises:
        ProblemError: unreadable file, missing column, bad row, empty answer, duplicate id.
    """
    first: dict[str, int] = {}
    columns: tuple[str, str] | None = None
    for number, row in _rows(source):
        columns = columns or _layout(source, row)
        text, answer = _text_and_answer(source, number, row, columns)
        identifier = answer_text(row.get("id")) or f"{Path(source).stem}-{number}"
        if identifier in first:
            raise ProblemError(f"Rows {first[identifier]} and {number} of {source} have the same id {identifier!r}.")
        first[identifier] = number
        level = level_number(row["level"]) if answer_text(row.get("level")) else 1
        if not level:
            raise ProblemError(f"Row {number} of {source} has the level {row['level']!r}; it takes a whole number "
                               "from 1.")
        yield Problem(identifier, text, answer, level, answer_text(row.get("data_source")) or source)


def _rows(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file, counted from 1 (of a JSONL file: the line numbers)."""
    import pyarrow.parquet

    try:
        if source.endswith(".parquet"):
            yield from enumerate(pyarrow.parquet.ParquetFile(source).read().to_pylist(), start=1)
            return
        lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ProblemError(f"The file {source} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProblemError(f"Row {number} of {source} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ProblemError(f"Row {number} of {source} is no JSON object, but {line.strip()[:40]!r}.")
        yield number, row


def _layout(source: str, row: Mapping[str, Any]) -> tuple[str, str]:
    layouts = (("problem", "answer"), ("prompt", "reward_model"))
    best = max(layouts, key=lambda columns: sum(column in row for column in columns))
    for column in best:
        if column not in row:
            raise ProblemError(f"The file {source} has no column {column!r} (it has {', '.join(row) or 'none'}); it "
                               "needs problem and answer, or prompt and reward_model.ground_truth (verl).")
    return best


def _text_and_answer(source: str, number: int, row: Mapping[str, Any], columns: tuple[str, str]) -> tuple[str, str]:
    text, answer = row.get(columns[0]), row.get(columns[1])
    if columns == ("prompt", "reward_model"):
        text, answer = _from_verl(text, answer)
    if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
        raise ProblemError(f"Row {number} of {source} has no usable text in its column {columns[0]}.")
    if isinstance(answer, dict) or not answer_text(answer):
        raise ProblemError(f"Row {number} of {source} has an empty or unreadable answer in its column {columns[1]}.")
    return text.strip(), answer_text(answer)


def _from_verl(prompt: Any, reward_model: Any) -> tuple[Any, Any]:
    """The last user message without its instruction (prompts.py words our own), and the ground truth."""
    if isinstance(prompt, list):
        asked = [message.get("content") for message in prompt
                 if isinstance(message, dict) and message.get("role") == "user"]
        prompt = asked[-1] if asked else None
    answer = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    answer = answer.get("target") if isinstance(answer, dict) else answer
    return _INSTRUCTION.sub("", prompt) if isinstance(prompt, str) else None, answer


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no tokenizer and no digest takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
