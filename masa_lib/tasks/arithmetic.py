"""Chained arithmetic: problems whose difficulty varies widely within a level, and worked solutions in a few habits.

A problem starts from a number and applies operations one after the other. Its level fixes how many operations there are
and how many digits they have; how many of them are traps (a carry, a borrow across zeros, a change of sign, a large
product) is drawn for each problem anew, and so is the wording, so that neither the level nor the length of the prompt
tells how hard it is. Nothing here knows a model: the habits are what `pocket.py` teaches and reinforcement selects.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

#: level -> (operations, digits of an operand)
LEVEL_SPECS: dict[int, tuple[int, int]] = {
    1: (1, 1), 2: (2, 1), 3: (1, 2), 4: (3, 1), 5: (2, 2), 6: (4, 1),
    7: (1, 3), 8: (3, 2), 9: (2, 3), 10: (4, 2), 11: (3, 3), 12: (4, 3),
    13: (5, 3), 14: (4, 4), 15: (6, 3), 16: (5, 4), 17: (7, 3), 18: (6, 4),
}
#: the usual ones; those above are out of the pocket model's reach, before training and after, and are taken by name
LEVELS = range(1, 13)
NOTIONS = ("carry", "borrow", "zeros", "sign", "product", "check")
_OPENINGS = ("Left to right: ", "Start with ", "Take the number ")
_WORDS = {"+": ("Add", "add"), "-": ("Subtract", "subtract"), "x": ("Multiply by", "multiply by")}


@dataclass(frozen=True)
class Chain:
    """A start value and the operations applied to it, in order: `(("+", 47), ("x", 3))`."""

    start: int
    operations: tuple[tuple[str, int], ...]

    def values(self) -> list[int]:
        """The start value and the value after each operation."""
        values = [self.start]
        for symbol, operand in self.operations:
            values.append(apply(values[-1], symbol, operand))
        return values


def apply(value: int, symbol: str, operand: int) -> int:
    """The value after one operation; `symbol` is `+`, `-` or `x`."""
    return value + operand if symbol == "+" else value - operand if symbol == "-" else value * operand


def make_chain(rng: random.Random, level: int) -> Chain:
    """Draw a chain of a level; the share of traps among its operations is drawn first."""
    count, digits = LEVEL_SPECS[level]
    trap_share = rng.random()
    start = value = _number(rng, digits)
    operations = []
    for _ in range(count):
        symbol, operand = _operation(rng, value, digits, trap=rng.random() < trap_share)
        operations.append((symbol, operand))
        value = apply(value, symbol, operand)
    return Chain(start, tuple(operations))


def make_problem(rng: random.Random, level: int) -> tuple[str, str]:
    """Draw a problem of a level: its text and its answer."""
    chain = make_chain(rng, level)
    return problem_text(chain, rng.randrange(3)), str(chain.values()[-1])


def problem_text(chain: Chain, wording: int) -> str:
    """The problem in one of three wordings (0 to 2) of different length."""
    if wording == 0:
        return f"Left to right: {chain.start}" + "".join(f" {symbol} {n}" for symbol, n in chain.operations)
    if wording == 1:
        return f"Start with {chain.start}." + "".join(f" {_WORDS[symbol][0]} {n}." for symbol, n in chain.operations)
    parts = "".join(f", then {_WORDS[symbol][1]} {n}" for symbol, n in chain.operations)
    return f"Take the number {chain.start}{parts}. What number do you get at the end?"


def shape(chain: Chain) -> str:
    """What can be seen of a problem without solving it: `3 steps, 2 digits, adds, multiplies`."""
    verbs = {"+": "adds", "-": "subtracts", "x": "multiplies"}
    used = [verb for symbol, verb in verbs.items() if any(symbol == other for other, _ in chain.operations)]
    digits = len(str(max(chain.start, *(operand for _, operand in chain.operations))))
    return ", ".join([f"{len(chain.operations)} steps", f"{digits} digits", *used])


def is_held_out(text: str) -> bool:
    """Whether a problem belongs to the evaluation split: one in eight, by a digest of its text.

    The wordings of one chain fall on the same side.
    """
    if text.startswith(_OPENINGS):
        text = " ".join(piece[0].lower() for piece in re.findall(r"\d|[-+x] |[Aa]dd|[Ss]ub|[Mm]ul", text))
        text = text.translate(str.maketrans("asm", "+-x"))
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def notions_of(value: int, symbol: str, operand: int) -> set[str]:
    """The notions that working out one operation uses; an operation with one of them is a trap."""
    text = work(value, symbol, operand, worked=True)
    return {notion for notion in NOTIONS if f" {notion}" in text}


def work(value: int, symbol: str, operand: int, *, worked: bool) -> str:
    """One line of a solution: the result at once (sums of two digits always), or column by column, notions named."""
    result = apply(value, symbol, operand)
    one_digit = symbol != "x" and 0 <= value < 10 and 0 <= operand < 10 and result >= 0
    if not worked or one_digit:
        return f"{value}{symbol}{operand}={result}. "
    if symbol == "x":
        columns = _multiply(abs(value), operand)
        return f"{value}{symbol}{operand}: {columns}{result}. "
    other = operand if symbol == "+" else -operand
    if (value >= 0) == (other >= 0) or value == 0:
        sign = "" if value >= 0 and other >= 0 else " sign "
        return f"{value}{symbol}{operand}:{sign or ' '}{_add(abs(value), abs(other))}{result}. "
    large, small = max(abs(value), abs(other)), min(abs(value), abs(other))
    sign = " " if value >= 0 and result >= 0 else f" sign {large}-{small}: "
    return f"{value}{symbol}{operand}:{sign}{_subtract(large, small)}{result}. "


@dataclass(frozen=True)
class Habits:
    """How a solution is written; shares are probabilities.

    `shortcut`: answer at once. `worked`: an operation is worked out in columns rather than answered at once. `restate`:
    the chain is written down first (costs tokens, changes nothing). `ramble`: after the last operation the work is
    checked all over again, once or more, each time with this probability.
    """

    shortcut: float = 0.35
    worked: float = 0.45
    restate: float = 0.5
    ramble: float = 0.25


def write_solution(chain: Chain, rng: random.Random, habits: Habits) -> str:
    """A correct solution in the given habits, ending in a box."""
    values = chain.values()
    answer = f"\\boxed{{{values[-1]}}}"
    if rng.random() < habits.shortcut:
        return answer
    text = ""
    if rng.random() < habits.restate:
        text += f"Begin {chain.start}" + "".join(f" {symbol} {n}" for symbol, n in chain.operations) + ". "
    text += _lines(chain, values, rng, habits)
    while rng.random() < habits.ramble:
        text += "Let me check. " + _lines(chain, values, rng, habits)
    return text + "So " + answer


def _lines(chain: Chain, values: list[int], rng: random.Random, habits: Habits) -> str:
    return "".join(work(value, symbol, operand, worked=rng.random() < habits.worked)
                   for value, (symbol, operand) in zip(values, chain.operations, strict=False))


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) + (digits == 1), 10**digits - 1)


def _operation(rng: random.Random, value: int, digits: int, trap: bool) -> tuple[str, int]:
    """An operation that is a trap, or is none, as wished; the last of twenty tries is taken as it comes."""
    for _ in range(20):
        symbol = rng.choice("++---x")
        operand = rng.randint(2, 9) if symbol == "x" else _number(rng, rng.randint(max(1, digits - 1), digits))
        if symbol == "x" and abs(value) >= 10 ** (digits + 1):
            continue
        if bool(notions_of(value, symbol, operand)) == trap:
            break
    return symbol, operand


def _columns(large: int, small: int) -> list[tuple[int, int]]:
    """Digit pairs from the right; the smaller number is filled up with zeros."""
    left, right = str(large)[::-1], str(small)[::-1]
    width = max(len(left), len(right))
    return [(int(a), int(b)) for a, b in zip(left.ljust(width, "0"), right.ljust(width, "0"), strict=True)]


def _add(a: int, b: int) -> str:
    text, carry = "", 0
    for p, q in _columns(a, b):
        total = p + q + carry
        text += f"{p}+{q}" + ("+1" if carry else "") + f"={total}" + (" carry; " if total > 9 else "; ")
        carry = total // 10
    return text


def _subtract(large: int, small: int) -> str:
    text, borrow = "", 0
    for p, q in _columns(large, small):
        short = p - q - borrow < 0
        difference = p - q - borrow + 10 * short
        text += f"{'1' if short else ''}{p}-{q}" + ("-1" if borrow else "") + f"={difference}"
        text += (" zeros" if p == 0 and borrow else "") + (" borrow; " if short else "; ")
        borrow = int(short)
    return text


def _multiply(a: int, factor: int) -> str:
    text, carry = " product " if factor > 2 else "", 0
    for p in map(int, str(a)[::-1]):
        total = p * factor + carry
        text += f"{p}x{factor}" + (f"+{carry}" if carry else "") + f"={total}" + (" carry; " if total > 9 else "; ")
        carry = total // 10
    return text.lstrip()
