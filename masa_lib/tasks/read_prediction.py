r"""The parser that reads a prediction out of a model's text.

Models wrap the JSON in prose and code fences, break lines, reorder keys, use single quotes, leave trailing commas, and
put braces and LaTeX into notions. So the text is not cut out and handed to `json`: objects are read by a small tolerant
reader, from the last opening brace backwards, under a fixed budget that keeps hostile text cheap. Nothing is evaluated,
nothing is guessed: a value out of range or a missing key is an error that says so.
"""

from __future__ import annotations

import re
from typing import Any

from masa_lib.tasks import released as authors
from masa_lib.tasks.predictions import PASS_RATE_STEPS, MetaPrediction, ParseResult, without_lone_surrogates

KEYS = ("math_notion", "pass_rate", "solution_length")
MAX_SOLUTION_LENGTH = 1_000_000  # tokens
MAX_NOTIONS = 32
MAX_NOTION_LENGTH = 200  # characters
TOKEN_BUDGET = 1_500  # tokens read in one text, over all attempts; a prediction with 32 notions has 79
MAX_DEPTH = 5  # objects and lists inside one another

# Possessive and bounded repeats: no token costs more than its own bounded length, whatever follows it. A single quote
# closes only in front of a mark, so that 'Fermat's theorem' is one string.
_TOKEN = re.compile(r"""\s{0,500}+(?:
    (?P<double>"(?:[^"\\]{1,50}+|\\.){0,60}+")
  | (?P<single>'(?:[^'\\]{1,50}+|\\.|'(?!\s{0,20}[,\]}:])){0,60}+')
  | (?P<mark>[{}\[\]:,])
  | (?P<bare>[^\s"'{}\[\]:,][^"'{}\[\]:,\n]{0,200}+))""", re.DOTALL | re.VERBOSE)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|([bfnrt])(?![a-zA-Z])|([\"'\\/]))")
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,9})(?:\.0{0,9})?")


class _Unreadable(Exception):
    """The object under the reader breaks off or is malformed; the message says how."""


def parse_prediction(text: str, *, released: bool = False) -> ParseResult:
    """Read the prediction out of a meta rollout; never raises, and bounded in time for any text.

    The last complete object that holds all three keys counts.

    Args:
        text: the whole completion.
        released: read as the authors' code does: compact JSON alone, and every part that it would reward by itself.
    """
    if released:
        return authors.parse(text)
    reader, reason = _Reader(text), ""
    start = text.rfind("{")
    while start >= 0 and reader.budget > 0:
        fields: dict[str, Any] = {}
        try:
            reader.read_object(start, fields)
            if all(key in fields for key in KEYS):
                return _check(fields, reader.spans)
            problem = "lacks " + " and ".join(key for key in KEYS if key not in fields)
        except _Unreadable as error:
            problem = str(error)
        if not reason and any(key in fields for key in KEYS):
            reason = f"The object that begins at character {start} {problem}."
        start = text.rfind("{", 0, start)
    if start >= 0:
        reason = reason or f"No prediction among the last {TOKEN_BUDGET} tokens of braces and texts."
    return ParseResult(None, reason or f"There is no object with {', '.join(KEYS)} in the text.")


class _Reader:
    """Reads one object after another from a text, under one budget of tokens."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.budget = text, 0, TOKEN_BUDGET
        self._span, self.spans = (0, 0), {}  # of the last token; of the values of the object, by key

    def read_object(self, start: int, fields: dict[str, Any]) -> None:
        """Fill `fields` from the object whose brace stands at `start`; what was read stays there if it breaks off."""
        self.position, self.spans = start + 1, {}
        self._members(fields, depth=1)

    def _token(self) -> tuple[str, str]:
        self.budget -= 1
        if self.budget < 0:
            raise _Unreadable("is too long")
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            rest = self.text[self.position:self.position + 20].strip()
            raise _Unreadable(f"breaks off at {rest!r}" if rest else "is not closed")
        self.position = match.end()
        kind, value = match.lastgroup, match[match.lastgroup].rstrip()
        start = match.start(kind)
        if kind in ("double", "single"):
            self._span = start + 1, self.position - 1
            return "text", _unescape(value[1:-1])
        self._span = start, start + len(value)
        return (value, value) if kind == "mark" else ("text", value)

    def _members(self, fields: dict[str, Any], depth: int) -> None:
        kind, key = self._token()
        while kind != "}":
            if kind != "text":
                raise _Unreadable(f"has {key!r} where a key should stand")
            fields[key] = None
            kind, mark = self._token()
            if kind != ":":
                raise _Unreadable(f"has {mark[:20]!r} after the key {key[:20]!r}, not a colon")
            fields[key] = self._value(*self._token(), depth)
            if depth == 1:
                self.spans[key] = self._span
            kind, key = self._next("}")

    def _value(self, kind: str, value: str, depth: int) -> Any:
        if kind == "text":
            return value
        if depth >= MAX_DEPTH:
            raise _Unreadable(f"holds objects or lists more than {MAX_DEPTH} deep")
        if kind not in "{[":
            raise _Unreadable(f"has {value!r} where a value should stand")
        if kind == "{":
            self._members(fields := {}, depth + 1)
            return fields
        entries = []
        kind, value = self._token()
        while kind != "]":
            entries.append(self._value(kind, value, depth + 1))
            kind, value = self._next("]")
        return entries

    def _next(self, closing: str) -> tuple[str, str]:
        """The token after a comma (also a trailing one), or the closing mark."""
        kind, value = self._token()
        if kind == ",":
            return self._token()
        if kind != closing:
            raise _Unreadable(f"has {value[:20]!r} where a comma or {closing!r} should stand")
        return kind, value


def _check(fields: dict[str, Any], spans: dict[str, tuple[int, int]]) -> ParseResult:
    notions = fields["math_notion"]
    if isinstance(notions, str):
        notions = notions.split(",")
    if not isinstance(notions, list) or not all(isinstance(notion, str) for notion in notions):
        return ParseResult(None, "math_notion is not a list of texts.")
    notions = tuple(notion for entry in notions if (notion := " ".join(entry.split())))
    if len(notions) > MAX_NOTIONS:
        return ParseResult(None, f"math_notion holds {len(notions)} notions; at most {MAX_NOTIONS} are allowed.")
    if any(len(notion) > MAX_NOTION_LENGTH for notion in notions):
        return ParseResult(None, f"math_notion holds a notion of more than {MAX_NOTION_LENGTH} characters.")
    numbers = {}
    for key, high in (("pass_rate", PASS_RATE_STEPS), ("solution_length", MAX_SOLUTION_LENGTH)):
        match = _WHOLE_NUMBER.fullmatch(fields[key].strip()) if isinstance(fields[key], str) else None
        if match is None or not 0 <= int(match[1]) <= high:
            given = repr(fields[key])[:40]
            return ParseResult(None, f"{key} is {given}; it must be a whole number from 0 to {high}.")
        numbers[key] = int(match[1])
    return ParseResult(MetaPrediction(notions, **numbers), spans=tuple(spans[key] for key in numbers))


def _unescape(text: str) -> str:
    r"""Undo JSON escapes; `\frac`, `\theta` and the like stay, because a letter after `\f` or `\t` means LaTeX."""
    if "\\" in text:
        text = _ESCAPE.sub(_plain, text)
    return without_lone_surrogates(text)


def _plain(escape: re.Match[str]) -> str:
    if escape[1]:
        return chr(int(escape[1], 16))
    return escape[3] or " "
