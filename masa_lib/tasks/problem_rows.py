"""What a problem is, and how the rows of local files and of Hugging Face data sets become problems.

A file is JSONL, CSV or Parquet, with the columns `problem` and `answer` (and perhaps `id` and `level`), or in the
layout of verl (`prompt` chat messages, `reward_model.ground_truth`). The first thing wrong with it is told in one
sentence that names file, column or row. What a data set's authors told their model about the form of an answer is cut
off its problems: `prompts` words our own. Nothing here chooses, divides or orders problems.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masa_lib import hub
from masa_lib.errors import MasaError
from masa_lib.tasks.data_sets import DATA_SETS, answer_text, level_number

#: where a text falls into sentences; some instructions follow a problem without a full stop, or end in a colon
_BORDER = re.compile(r"""(?<=[.!?])["')]*\s+|\n+|(?<=[\u3002\uff01\uff1f])|(?<=\\boxed\{\}):\s+
    |\s+(?=(?:Let[\u2019']s|Let\ us|Please)\ (?:think|reason|solve|put)\b)""", re.VERBOSE)
#: a box to be filled; one that holds digits, a letter or a formula is a part of a problem
_BOX = r"\\boxed(?:\{(?:[ .]*|[A-Za-z ]{3,}|\\text\w*\{[A-Za-z ]+\})\}|(?![a-zA-Z]|\s*\{))"
#: sentences that tell a model how to write its answer: by what no problem says of itself ...
_FORM = re.compile(rf"""(?i)
    .*\b(?:answers?|response|result|solution|value|output)\b.*(?:{_BOX}|\#{{4}}|</?answer>|["'`]answer:)
  | .*(?:{_BOX}|\#{{4}}|</?answer>).*\b(?:answers?|response|result|solution)\b
  | .*\u7b54\u6848.*{_BOX}
  | .*</?think>
  | .*\bwithout\ quotes\b
  | .*\blast\ line\ of\ your\ (?:response|answer|solution)\b
  | .*\byou\ first\ think\ about\ the\ reasoning
  | (?:please\ )?box\ (?:your|the)\ (?:final\ )?answer\W*$
  | (?:remember\ to\ )?(?:please\ )?(?:put|place|enclose|box|return|give|write|present)\b[^$]*{_BOX}\W*$""", re.VERBOSE)
#: ... or by asking for steps and for nothing else
_STEPS = re.compile(r"""(?i)\W*(?:(?:and|now|please|let[\u2019']s|let\ us|you\ should|remember\ to|carefully)\s+)*
    (?:think|reason|solve|work|go|explain|show|answer)\b
    (?:\s+(?:through|about|out|on|it|this|the|following|above|given|math|mathematical|mathematics|problem|question
       |task|your|reasoning|work|solution|carefully|efficiently|and|clearly))*
    [,\s]+step[ -]by[ -]step\b(?:\s+(?:before|first|and|to|then)\b[^$]*)?\W*$""", re.VERBOSE)
#: a heading, or the cue for the answer
_CUE = re.compile(r"""(?i)
    (?:please\ )?(?:solve|answer|work\ out)\ (?:the\ following|this)\ (?:math(?:ematic(?:al|s))?\ )?(?:problem|question)
    (?:\ (?:carefully|efficiently|correctly|concisely|clearly|and))*[.:]?
  | (?:final\ )?(?:answer|solution|response):""", re.VERBOSE)
#: what stands between an instruction and the problem behind it
_LABEL = re.compile(r"(?i)(?:this is the |here is the )?(?:problem|question):\s*")


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


def without_instruction(text: str) -> str:
    r"""A problem's text without what precedes or follows it about the form of an answer.

    Such sentences name `\boxed{}`, tags, a last line, or ask for steps alone; those within the text are left.
    """
    borders = [0, *(border.end() for border in _BORDER.finditer(text)), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(borders)]
    while parts and _instructs(parts[-1]):
        parts.pop()
    first = next((number for number, part in enumerate(parts) if not _instructs(part)), len(parts))
    left = "".join(parts[first:]).strip()
    return _LABEL.sub("", left, count=1) if first and _LABEL.match(left) else left


def _instructs(sentence: str) -> bool:
    """A question is none, whatever box stands in it."""
    sentence = sentence.strip()
    if not sentence or sentence.rstrip("]$)\\").endswith("?"):
        return not sentence
    return bool(_FORM.match(sentence) or _STEPS.match(sentence) or _CUE.fullmatch(sentence))


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
        with hub.patient(entry.hub):
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
            problems.append(Problem(f"{name}-{split}-{number}", without_instruction(text), answer, level, name))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ProblemError(f"Row {number} of the data set {name} ({entry.hub}) is not laid out as expected: "
                               f"{error!r}.") from error
    return [problem for problem in problems if problem.text and problem.answer]


def read_file(source: str) -> Iterator[Problem]:
    """The problems of a JSONL, CSV or Parquet file, in its order.

    Raises:
        ProblemError: unreadable file, missing column, bad row, empty answer, one id of two problems.
    """
    first: dict[str, tuple[int, str]] = {}
    columns: tuple[str, str] | None = None
    for number, row in _rows(source):
        columns = columns or _layout(source, row)
        text, answer = _text_and_answer(source, number, row, columns)
        identifier = answer_text(row.get("id")) or f"{Path(source).stem}-{number}"
        before, asked = first.setdefault(identifier, (number, text))
        if asked != text:
            raise ProblemError(f"Rows {before} and {number} of {source} have the same id {identifier!r}.")
        level = level_number(row["level"]) if answer_text(row.get("level")) else 1
        if level is None:
            raise ProblemError(f"Row {number} of {source} has the level {row['level']!r}; it takes a whole number "
                               "from 1, or ? where it is unknown.")
        yield Problem(identifier, text, answer, level, answer_text(row.get("data_source")) or source)


def _rows(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file, counted from 1 (of a JSONL file: the line numbers)."""
    import pyarrow.parquet

    kind = Path(source).suffix.lower()
    try:
        if kind == ".parquet":
            yield from enumerate(pyarrow.parquet.ParquetFile(source).read().to_pylist(), start=1)
            return
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ProblemError(f"The file {source} cannot be read: {error}") from error
    yield from (_csv_rows if kind == ".csv" else _json_rows)(source, text)


def _json_rows(source: str, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProblemError(f"Row {number} of {source} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ProblemError(f"Row {number} of {source} is no JSON object, but {line.strip()[:40]!r}.")
        yield number, row


def _csv_rows(source: str, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows below the header, which names the columns; a cell that holds a comma or a line break stands in quotes."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ProblemError(f"Line {reader.line_num} of {source} is no CSV: {error}.") from error
    header = [name.strip() for name in rows[0]] if rows else []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(header):
            raise ProblemError(f"Row {number} of {source} has {len(row)} cells where its header has {len(header)}; a "
                               "text with a comma or a line break stands in double quotes.")
        yield number, dict(zip(header, row, strict=True))


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
    if not isinstance(text, str) or not _is_unicode(text) or not without_instruction(text):
        raise ProblemError(f"Row {number} of {source} has no usable text in its column {columns[0]}.")
    if isinstance(answer, dict) or not answer_text(answer):
        raise ProblemError(f"Row {number} of {source} has an empty or unreadable answer in its column {columns[1]}.")
    return without_instruction(text), answer_text(answer)


def _from_verl(prompt: Any, reward_model: Any) -> tuple[Any, Any]:
    """The last user message, and the ground truth."""
    if isinstance(prompt, list):
        asked = [message.get("content") for message in prompt
                 if isinstance(message, dict) and message.get("role") == "user"]
        prompt = asked[-1] if asked else None
    answer = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    answer = answer.get("target") if isinstance(answer, dict) else answer
    return prompt, answer


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no tokenizer and no digest takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
