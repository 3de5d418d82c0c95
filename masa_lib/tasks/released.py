"""The parser of the authors' released code, with its two shapes and its gaps; see `config.RewardConfig`.

It reads two shapes: compact JSON that begins with math_notion and has no brace inside, and, where that fails, an
unquoted `math_notion: [...]`. The second looks for a length too, but takes two digits and then wants 1024 or more, so
it never finds one; it never looks for a pass rate.
"""

from __future__ import annotations

import json
import re
from typing import Any

from masa_lib.tasks.predictions import MetaPrediction, ParseResult, without_lone_surrogates

_COMPACT = re.compile(r"""\{["']math_notion["']:[^}]*\}""")
_BARE = re.compile(r"math_notion\s*+:\s*+(\[[^\]]*\])")
_BOUND = 2**62  # beyond it every reward is 0 on both sides, and a table cannot hold the number


def parse(text: str) -> ParseResult:
    """Every part that the authors' reward would pay by itself; never raises."""
    # A match needs a closing mark after it; without the tail that has none, every search ends at its first hit.
    candidates = _COMPACT.findall(text[:text.rfind("}") + 1])
    try:
        fields = json.loads(candidates[-1])
    except (IndexError, ValueError, RecursionError):
        fields = _unquoted(text)
    prediction = MetaPrediction(notions=_notions(fields.get("math_notion")),
                                pass_rate=_number(fields.get("pass_rate")),
                                solution_length=_number(fields.get("solution_length")))
    if prediction == MetaPrediction((), None, None):
        return ParseResult(None, 'The released parser takes only compact JSON that begins {"math_notion":.')
    return ParseResult(prediction)


def _unquoted(text: str) -> dict[str, Any]:
    match = _BARE.search(text[:text.rfind("]") + 1])
    if match is None:
        return {}
    try:
        notions = json.loads(match[1])
    except (ValueError, RecursionError):
        entries = match[1].strip("[]").split(",")
        notions = [entry.strip().strip('"').strip("'") for entry in entries if entry.strip()]
    return {"math_notion": notions}


def _notions(value: Any) -> tuple[str, ...]:
    """The notions as the released reward reads them; anything that makes it fail pays nothing, as no notions do."""
    if isinstance(value, str):
        entries = [entry.strip().strip("[").strip("]") for entry in value.split(",")] if "," in value else [value]
    elif isinstance(value, list) and "," not in value and all(isinstance(entry, str) for entry in value):
        entries = value
    else:
        entries = []
    return tuple(without_lone_surrogates(entry) for entry in entries)


def _number(value: Any) -> int | None:
    """Any JSON integer, and a boolean as 0 or 1, because Python counts it among the integers."""
    return max(-_BOUND, min(int(value), _BOUND)) if isinstance(value, int) else None
