r"""Is the answer in the last complete `\boxed{}` right? By value, from any thread, bounded in time and memory.

Numbers, letters and words are compared here, in microseconds. The rest goes to math-verify as it was written, in the
process of `grading_worker`; texts that could only make that process die are refused before. An answer that leaves
something to be computed, or that stands in the problem, is not paid for: math-verify takes `96 * 74` for 7104, and a
model that is paid for that learns to copy the problem.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
from collections.abc import Iterable, Sequence

from masa_lib.tasks.grading_worker import Worker
from masa_lib.tasks.number_forms import (
    Number,
    opened,
    plain,
    read_number,
    read_numbers,
    same_value,
    same_values,
    unwrapped,
)

MAX_ANSWER_LENGTH = 1_000  # characters; a longer box holds no answer
MAX_BOXES = 50  # boxes tried from the last one backwards

_BOX = re.compile(r"\\(?:boxed|fbox) *")
_BOX_MARK = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\\[dt]?frac(?:[0-9]{2}|\{[^{}]*\}\{[^{}]*\})|[^\s${}\\]+")
_DIGITS = re.compile(r"-?[0-9]{1,99}", re.ASCII)
_LETTER_GOLD = re.compile(r"\(?([A-J])\)?")
_LETTER = re.compile(r"(?:(?i:option|choice|answer)\b:?\s*)?[(\[]?([A-Ja-j])\]?"
                     r"(?:[).:](?!.*(?:\([A-J]\)|\b[A-J][).:]|\bor [A-J]\Z)).*)?", re.DOTALL)
_WORDS = re.compile(r"(?:[A-Za-z]{3,}|[Nn]o)(?:[ '-][A-Za-z]+)*")
# A power on a power of a number, a power or factorial of five digits, a factorial of a factorial: nobody boxes these.
_EXPLOSIVE = re.compile(r"(?:\^|\*\*)[\s{(]*-?(?:[0-9.]+[\s})]*(?:\^|\*\*)|[0-9]{5})|(?:[0-9]{5}|!)[\s})]*!")
_ROUNDED = re.compile(r"\\approx(?![a-zA-Z])|\N{ALMOST EQUAL TO}")
_EQUALS = re.compile(rf"(?<![<>!:\\=])=(?!=)|\\in(?![a-zA-Z])|{_ROUNDED.pattern}")
_GROUP_COMMA = re.compile(r"(?<=[0-9])(?:,|\{,\}|,\\!)(?=[0-9]{3}(?![0-9]))")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_GREEK = re.compile(r"\\(?:var)?(?:[Aa]lpha|[Bb]eta|[Gg]amma|[Dd]elta|epsilon|[Zz]eta|[Ee]ta|[Tt]heta|iota|kappa"
                    r"|[Ll]ambda|mu|nu|[Xx]i|rho|[Ss]igma|tau|[Uu]psilon|[Pp]hi|chi|[Pp]si|[Oo]mega|ell|triangle|square)(?![a-zA-Z])")
_JUXTAPOSED = re.compile(r"(?<=[0-9)])\s*(?=\()")
_BASED = re.compile(r"\(?([0-9]+|[0-9A-Fa-f]{2,}(?=\)?\s*_\s*\{?1[1-6]\b)"
                    r"|[0-9A-Fa-f]+(?=_\{?16))\)?\s*_\s*\{?\s*([0-9]+|[a-z]+)\s*\}?")
# What parts the entries of points, sets, intervals, matrices and conditions.
_ENTRY = re.compile(r"\\\\|\\[{}]|\\(?:begin|end)\{[a-z]*matrix\}"
                    r"|\\(?:cup|in|leq?|geq?|lt|gt|pm|neq|and|or)(?![a-zA-Z])"
                    r"|[\[\]();,&=<>]|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")
_OPERATION = re.compile(r"[0-9)}]\s*[-+*/!^\N{MULTIPLICATION SIGN}\N{DIVISION SIGN}]|[|]|[-+]\s*[-+(]"
                        r"|\\(?!pi|infty|begin|end|text)[a-zA-Z]{3,}")
_LOOSE_UNIT = re.compile(r"[+-]?[0-9.,]*[0-9](?!.*\b(?:or|and|not|more|less|factorial)\b)(?:\s*[A-Za-z]{2,}\.?)+")
_COEFFICIENT = re.compile(r"[0-9][A-Za-z]\Z")  # 5m may be metres, and five times m
_EDGE = "\N{BROKEN BAR}"
_JOINING = tuple("+-*/^_(){}[]|\\<>!")
_BASES = dict(two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9", ten="10", eleven="11",
              twelve="12", sixteen="16")
_NAME = re.compile(r"[+-]?\s*(?:\\infty|[a-zA-Z](?:_\{?\w+\}?)?)")
_STORED = re.compile(r"####|(?<!\\)\\[-0-9]|\A\s*[\[{(]\s*[\"']|\Ab(['\"]).*\1\Z|\\n\Z|</?[a-z]+>"
                     r"|\A(?:np\.\w+|tensor|array|Decimal|Fraction)\(", re.DOTALL)
_MAX_DEPTH = 12
_MAX_FRACTIONS = 20

_WORKER = Worker()
atexit.register(_WORKER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WORKER.forget)


class _LimitMet(Exception):
    """The comparison has no result; raised, since a cache keeps results and no exceptions."""


def extract_answer(text: str) -> str | None:
    r"""The content of the last complete `\boxed{}`, or None where there is none of at most `MAX_ANSWER_LENGTH`.

    `\fbox` is a box, too, and `\boxed 72` holds what stands up to the next space.
    """
    end = len(text)
    for _ in range(MAX_BOXES):
        end = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if end < 0:
            return None
        start = _BOX.match(text, end).end()
        if text.startswith("{", start):
            content = _content(text, start + 1)
        else:
            bare = _UNBRACED.match(text, start, start + MAX_ANSWER_LENGTH)
            content = bare[0].rstrip(".,;:") if bare else None
        if content is not None:
            return content
    return None


def grade(text: str, answer: str, *, problem: str = "", percentage_slack: bool = False) -> bool:
    r"""Whether a solution's boxed answer equals the problem's answer by value.

    Numbers are equal as numbers (a decimal to 6 places, as in math-verify; units, currency and `%` do not count), A to
    J as letters, words as words; the rest is what math-verify says. Wrong are: an answer over the limits; where the
    answer is a number, one that leaves a number to be computed, or ends a false chain of equations (`x = 1 = 2`);
    digits of another base; and a formula that stands in the problem and is not the answer as it is written.

    Args:
        text: the whole solution.
        answer: the problem's answer.
        problem: what was asked; without it, no answer counts as copied.
        percentage_slack: what `reward.mode = "released"` takes from the authors' code: plain numbers within 1e-4 of
            each other are equal, also after multiplying or dividing by 100, and none of the above is refused.

    Raises:
        GradingError: math-verify is needed and cannot be started.
    """
    return grade_many([text], [answer], problems=[problem], percentage_slack=percentage_slack)[0]


def grade_many(texts: Sequence[str], answers: Sequence[str], *, problems: Sequence[str] | None = None,
               percentage_slack: bool = False) -> list[bool]:
    """`grade` for solutions, answers and what was asked, in order; each different question is asked once."""
    known: dict[tuple[str | None, str, str], bool] = {}
    keys = [(extract_answer(text), answer, problem) for text, answer, problem in
            zip(texts, answers, [""] * len(texts) if problems is None else problems, strict=True)]
    for key in keys:
        if key not in known:
            known[key] = key[0] is not None and _has_value(*key, percentage_slack)
    return [known[key] for key in keys]


def limits_met() -> int:
    """How many answers of this process so far counted as wrong because a limit kept math-verify from a result."""
    return _WORKER.limits


def unmatchable(answers: Iterable[str]) -> list[str]:
    r"""The answers that no solution can match: not one that fits a box, or stored in a form that nobody writes.

    Of those forms are `... #### 72`, `["5", "7"]`, `{"answer": 5}`, `b'72'`, `tensor(72)`, `<answer>72</answer>`,
    and a matrix whose row breaks lost a
    backslash (`1 \2`).
    """
    return [answer for answer in answers if read_number(answer) is None
            and (_STORED.search(answer) or not plain(answer)
                 or extract_answer(f"\\boxed{{{answer}}}") != answer.strip())]


def unmatchable_sentence(source: str, answers: Sequence[str]) -> str:
    """One sentence on a source's answers that no solution can match, with the first three; empty where there are none.

    Args:
        source: the name of the file or data set.
        answers: all of its answers.
    """
    found = unmatchable(answers)
    shown = ", ".join(repr(answer[:60]) for answer in found[:3])
    return (f"{len(found)} of {len(answers)} answers of {source} can never be matched by a boxed answer "
            f"(the first: {shown}); store the final answer alone." if found else "")


def _content(text: str, start: int) -> str | None:
    depth = 1
    for mark in _BOX_MARK.finditer(text, start, start + MAX_ANSWER_LENGTH + 1):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start:mark.start()].strip()
    return None


def _has_value(predicted: str, answer: str, problem: str, percentage_slack: bool) -> bool:
    try:
        return _released(predicted, answer) if percentage_slack else _is_right(predicted, answer, problem)
    except _LimitMet:
        return False


@functools.lru_cache(maxsize=20_000)
def _is_right(predicted: str, answer: str, problem: str) -> bool:
    """Letters, words and numbers at once, then what is not paid, and math-verify for what is left."""
    if _DIGITS.fullmatch(predicted) and _DIGITS.fullmatch(answer):  # nearly all answers of most problems: no detours
        return int(predicted) == int(answer)
    if plain(predicted) == plain(answer) != "":
        return True
    named = _named(predicted, answer)
    if named is not None:
        return named
    *name, last = _sides(answer)
    number = read_number(last)
    if number is not None and not number.whole_fraction and len(name) < 2:
        return _is_number(predicted, number, answer, problem)
    if _squeezed(predicted) == _squeezed(answer):
        return True
    base, golds = _BASED.fullmatch(unwrapped(plain(last))), read_numbers(answer)
    if base is not None:
        return _is_based(predicted, base)
    found = read_numbers(predicted) if golds else None
    if found is not None and found[0] == golds[0]:
        return same_values(found[1], golds[1], ordered=golds[0] not in ("", "\\{\\}"))
    if _is_copied(predicted, answer, problem) or _leaves_entries(predicted, answer):
        return False
    return _compare(predicted, answer) and _is_true_chain(predicted)


@functools.lru_cache(maxsize=20_000)
def _released(predicted: str, answer: str) -> bool:
    """As the authors' code, as far as numbers go: relative tolerance 1e-4, a slack of 100 either way, exactly."""
    named = _named(predicted, answer)
    left, right = read_number(predicted), read_number(answer)
    if named is not None or left is None or right is None:
        return _squeezed(predicted) == _squeezed(answer) or _compare(predicted, answer) if named is None else named
    return any(abs(left.value - target) <= max(abs(left.value), abs(target)) / 10_000
               for target in (right.value / 100, right.value, right.value * 100))


def _named(predicted: str, answer: str) -> bool | None:
    """Whether a letter or a word is the right one; None where the answer is neither."""
    gold, found = (re.sub(r"(?<!\\)[{}]", "", unwrapped(plain(text))).strip() for text in (answer, predicted))
    letter = _LETTER_GOLD.fullmatch(gold)
    if letter is not None:
        chosen = _LETTER.fullmatch(found)
        return chosen is not None and chosen[1].upper() == letter[1]
    if _WORDS.fullmatch(gold):
        return _sides(found)[-1].casefold().replace(" ", "") == gold.casefold().replace(" ", "")
    return None if found else False


def _is_number(predicted: str, number: Number, answer: str, problem: str) -> bool:
    """Whether an answer ends in this number, written out, behind nothing that contradicts it."""
    *before, last = _sides(predicted)
    found = read_number(last)
    based = _BASED.fullmatch(unwrapped(plain(last)))
    if found is None and based is not None:
        found = read_number(based[1]) if based[2] in ("10", "ten") or "base" in problem.lower() else None
    elif found is None:
        return _LOOSE_UNIT.fullmatch(unwrapped(plain(last))) is not None and _compare(last, answer)
    if found is None or found.whole_fraction or not same_value(found, number):
        return False
    formula = predicted if before else last
    if ((before or _is_converted(found, number) or _COEFFICIENT.search(last)) and _stands_in(formula, problem)
            and _squeezed(formula) != _squeezed(answer)):
        return False
    name = _sides(answer)[:-1]
    if name and before and _squeezed(name[0]) != _squeezed(before[0]):
        return _compare(predicted, answer)
    return _is_true_chain(predicted)


def _is_converted(found: Number, number: Number) -> bool:
    """Whether the answer has another form than the right one, so that writing it otherwise may be what was asked."""
    alike = found.form == number.form or {found.form, number.form} <= {"integer", "decimal"}
    return not alike or not found.reduced or found.value != number.value


def _is_true_chain(text: str) -> bool:
    r"""Whether the sides of an equation that are without a letter equal the last one; to 1 % around an `\approx`."""
    *before, final = _sides(text)
    last, rounded = read_number(final), _ROUNDED.search(text) is not None
    for side in before:
        side = _JUXTAPOSED.sub(r" \\cdot ", _GREEK.sub(" x", side))  # math-verify takes 2(3) for a mixed number
        if not side.strip() or re.search("[a-zA-Z]", _COMMAND.sub("", side)):
            continue
        number = read_number(side)
        if number is None or last is None:
            if not rounded and not _compare(side, final):
                return False
        elif not same_value(number, last) and not (rounded and abs(number.value - last.value) * 100 <= abs(last.value)):
            return False
    return True


def _is_based(predicted: str, gold: re.Match[str]) -> bool:
    """The same digits, and the same base where one is given: without one, it is that of the problem."""
    found = unwrapped(_GROUP_COMMA.sub("", plain(_sides(predicted)[-1])))
    based = _BASED.fullmatch(found)
    digits, base = based.groups() if based else (found, gold[2])
    same_base = _BASES.get(base, base) == _BASES.get(gold[2], gold[2])
    return same_base and digits.upper().lstrip("0") == gold[1].upper().lstrip("0")


def _leaves_entries(predicted: str, answer: str) -> bool:
    """Whether points, sets, intervals or matrices of plain numbers are to have one computed."""
    gold, found = _entries(answer), _entries(_sides(predicted)[-1])
    if len(gold) < 2 or not all(_NAME.fullmatch(entry) or read_number(entry) for entry in gold):
        return False
    for entry in found:
        number = read_number(entry)
        if number.whole_fraction if number else _OPERATION.search(entry):
            return True
    return False


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in _ENTRY.split(unwrapped(plain(text))) if entry.strip()]


def _is_copied(predicted: str, answer: str, problem: str) -> bool:
    """Whether a formula stands in the problem and is not the right one as it is written."""
    gold = {_braceless(answer), _braceless(_sides(answer)[-1])}
    return any(_braceless(part) not in gold and _stands_in(part, problem)
               for part in (predicted, _sides(predicted)[-1]))


def _stands_in(formula: str, problem: str) -> bool:
    """Whether a formula of at least two characters stands in the problem by itself, not as a part of another one."""
    formula = opened(_visible(formula).replace(_EDGE, "").strip()).removeprefix("+").strip()
    problem = _visible(problem)
    if len(formula) < 2 or len(formula) > len(problem):
        return False
    for match in re.finditer(r" *".join(re.escape(mark) for mark in formula if mark != " "), problem):
        before, after = problem[:match.start()], problem[match.end():]
        parted = (not before or before[-1] in f" ={_EDGE}") and not after[:1].isalnum()
        if parted and before.rstrip()[-1:] not in _JOINING and after.lstrip()[:1] not in _JOINING:
            return True
    return False


def _visible(text: str) -> str:
    """Without braces and spacing commands; an edge where a formula begins or ends."""
    edged = plain(re.sub(r"(?<!\\)\\[()\[\]]|(?<!\\)\$", _EDGE, text))
    edged = re.sub(r"\\[dt]?frac(?:\s*\{([0-9]+)\}\s*\{([0-9]+)\}|([0-9])([0-9]))", r"\1\3/\2\4", edged)
    return re.sub(r"(?<!\\)[{}]", "", edged.replace("dfrac", "frac").replace("\\bar", "\\overline"))


def _braceless(text: str) -> str:
    return re.sub(r"(?<!\\)[{}]", "", _squeezed(text))


def _squeezed(text: str) -> str:
    return unwrapped(plain(text)).replace(" ", "").replace("dfrac", "frac").replace("tfrac", "frac")


def _sides(text: str) -> list[str]:
    """The sides of an equation or of a chain of them; of several equations, in a list, the whole."""
    joined = _GROUP_COMMA.sub("", text)
    return [text] if re.search("[,;&]|\\\\text", joined) and joined.count("=") > 1 else _EQUALS.split(text)


def _compare(predicted: str, answer: str) -> bool:
    """What math-verify says of the texts as they are written.

    Raises:
        _LimitMet: it cannot say anything within its limits.
    """
    if not (_is_tame(predicted) and _is_tame(answer)):
        return False
    verdict = _WORKER.compare(predicted, answer)
    if verdict is None:
        raise _LimitMet
    return verdict


def _is_tame(text: str) -> bool:
    """Whether math-verify can be expected to finish: no towers of powers, huge factorials or deep nesting."""
    if len(text) > MAX_ANSWER_LENGTH or _EXPLOSIVE.search(text) or text.count("frac") > _MAX_FRACTIONS:
        return False
    depth = deepest = 0
    for mark in text:
        depth += (mark in "{([") - (mark in "})]")
        deepest = max(deepest, depth)
    return deepest <= _MAX_DEPTH
