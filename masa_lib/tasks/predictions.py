"""What a meta rollout predicts, whoever reads it out of the model's text."""

from __future__ import annotations

import dataclasses

PASS_RATE_STEPS = 8  # a predicted pass rate is a whole number of eighths


@dataclasses.dataclass(frozen=True)
class MetaPrediction:
    """What one meta rollout predicts about its problem's solutions.

    Attributes:
        notions: the mathematical notions that the solutions will use.
        pass_rate: how many of 8 solutions will be right, 0 to 8. In released mode any whole number, or None: absent.
        solution_length: length of a solution in tokens. In released mode any whole number, or None: absent.
    """

    notions: tuple[str, ...]
    pass_rate: int | None
    solution_length: int | None


@dataclasses.dataclass(frozen=True)
class ParseResult:
    """A prediction, or the sentence that says why there is none (`error` is empty when it parsed).

    `spans`: first character and end of the pass rate and of the length in the text; none in released mode.
    """

    prediction: MetaPrediction | None
    error: str = ""
    spans: tuple[tuple[int, int], ...] = ()


def without_lone_surrogates(text: str) -> str:
    """Join surrogate pairs; spell lone ones out, since no file and no solution can hold them."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "backslashreplace")
