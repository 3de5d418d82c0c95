r"""Which texts are finished numbers, and what they are worth.

`72`, `1{,}000`, `\frac{11}2`, `2005 1/2`, `1.6\mathrm{~cm}`, `\$18`, `237.5\%`, `17°`, `1e9` and `0.\overline{3}` are
written out; `96 \cdot 74`, `\log_5 625`, `|-8|` and `96/4` leave something to be computed. The difference decides what
is paid where the answer is a number. Values are exact fractions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

#: commands that set their argument as text
TEXT = (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|emph|mbox"
        r"|operatorname|bm|boldsymbol|underline|boxed|fbox)\s*")
MAX_EXPONENT = 400  # of ten; a larger one is no number that anyone writes out
MAX_LENGTH = 1_000  # characters; a longer text is no number

# What sets a formula without changing it; a backslash before it would make it a row break of a matrix.
_MARKUP = re.compile(r"(?<!\\)(?:\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle"
                     r"|[lL]arge|LARGE|[hH]uge)(?![a-zA-Z])"
                     r"|\\!\s*|\\?\$|\\(?:text)?color\s*\{\w*\}|\\text\s*\{\s*\}"
                     r"|\\checkmark(?![a-zA-Z]))|[`\N{CHECK MARK}]")
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|(?<!\\)\\q?quad(?![a-zA-Z])|~")
_THIN_GROUP = re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")
_BRACED_COMMA = re.compile(r"(?<=[0-9])\s?\{,\}\s?(?=[0-9])")
_BRACED_GROUP = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!\s*)(?=[0-9]{3}(?![0-9]))")
_GROUP = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_CONJUNCTION = r"(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))"
_SEPARATOR = re.compile(rf"\s*(?:[,;]?\s*{_CONJUNCTION}|[,;])\s*")
_BRACKETED = re.compile(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", re.DOTALL)
_WRITTEN_FRACTION = {character: f"{above}/{below}" for character, above, below in
                     zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True)}

# Units are text commands without a number, or words: the short ones by name, since `5xy` is a product.
_POWER = r"(?:\s*\^\s*\{?\s*-?[1-9](?:\s*\})?|[\N{SUPERSCRIPT TWO}\N{SUPERSCRIPT THREE}])"
# Words that make another number of it, or none.
_CHANGING = re.compile(r"\b(?:or|and|not|more|less|fewer|least|most|factorial|squared|cubed)\b")
_SCALE = r"(?!(?:hundred|thousand|million|billion|trillion|dozen)s?\b)"
_SET_UNIT = rf"{TEXT}\{{[^{{}}0-9=]*(?:\^\{{?-?[1-9]\}}?[^{{}}0-9=]*)*\}}"
_SHORT_UNITS = ("mi|mm|cm|dm|km|m|kg|mg|g|lb|lbs|oz|ft|in|yd|h|hr|hrs|min|s|sec|ms|l|L|ml|mL|cc|mph|kph|Hz|kW|J|N|W|V"
                "|Pa|K|deg|sq|per|men|ton|tons|day|days|am|pm|USD|st|nd|rd|th")
_WORD_UNIT = rf"(?:(?:{_SHORT_UNITS})(?![a-zA-Z])|{_SCALE}(?=[a-z]*[aeiou])[A-Za-z][a-z]{{3,}}(?![a-zA-Z]))"
_DEGREE = r"(?:\^\s*\{?\s*\\circ(?:\s*\})?|\\degree(?![a-zA-Z])|\N{DEGREE SIGN})(?:\s*[CF](?![a-zA-Z]))?"
_MARK = r"['\"\N{PRIME}\N{DOUBLE PRIME}\N{EURO SIGN}\N{POUND SIGN}]{1,2}"
_ORDINAL = rf"\^\s*(?:\{{\s*)?(?:{TEXT}\{{)?(?:st|nd|rd|th)\b\s*\}}{{0,2}}"
_RATE = rf"\\[dt]?frac\s*\{{\s*{_SET_UNIT}\s*\}}\s*\{{\s*{_SET_UNIT}\s*\}}"
_UNIT = rf"(?:{_SET_UNIT}|{_RATE}|{_WORD_UNIT}|{_DEGREE}|{_MARK}|{_ORDINAL}){_POWER}?"
_UNITS = re.compile(rf"\s*{_UNIT}(?:(?:\s*(?:/|\\cdot(?![a-zA-Z])|\*))?\s*{_UNIT}){{0,5}}\s*\Z")
_PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{)?\s*(?:percent(?:age)?|pct)\s*\}?)\s*\Z")
_SET_LABEL = r"\s*(?:\([A-J]\)|[^{}0-9=]*(?::|\bis)|about|approximately|exactly|only)\s*"
_LABEL = re.compile(rf"(?:{TEXT}\{{{_SET_LABEL}\}}|[A-Za-z][A-Za-z ]*(?::(?!=)|\bis\b)|\([A-J]\)|="
                    r"|\\(?:approx|implies|Rightarrow|therefore)(?![a-zA-Z])"
                    r"|\N{ALMOST EQUAL TO})\s*")
_CURRENCY = re.compile(r"(?<![0-9])[\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{INDIAN RUPEE SIGN}]|\\pounds(?![a-zA-Z])")

# In brackets a comma parts entries: (1,234) is a point.
_BRACED = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_NESTED = rf"(?:[^{{}}]|{_BRACED})*"
_ENCLOSED = re.compile(rf"\(([^(),]*)\)|\[([^\[\],]*)\]|\\\{{((?:[^{{}},]|{_BRACED})*)\\\}}|\{{({_NESTED})\}}")
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}\.?[0-9]*|\.[0-9]+)"
_PART = rf"(?:\{{\s*([+-]?\s*{_INTEGER})\s*\}}|([0-9]))"
_RATIO = rf"(?:\\(?:[dtcs]|nice)?frac\s*{_PART}\s*{_PART}|({_INTEGER})\s*(?:/|\\over(?![a-zA-Z]))\s*(-?{_INTEGER}))"
_FORMS = {
    "decimal": re.compile(rf"({_DECIMAL})"),
    "fraction": re.compile(rf"(){_RATIO}"),
    "mixed": re.compile(rf"({_INTEGER})(?:\s*(?=\\)|\s+){_RATIO}"),
    "repeating": re.compile(r"([0-9]*\.[0-9]*)\\(?:overline|bar|dot)\s*\{?\s*([0-9]+)\s*\}?"),
    "power of ten": re.compile(rf"()({_DECIMAL})[eE]([+-]?[0-9]+)|(?:({_DECIMAL})\s*"
                               r"(?:\\times|\\cdot|[*x\N{MULTIPLICATION SIGN}])\s*)?"
                               r"10\s*\^\s*(?:\{\s*([+-]?[0-9]+)\s*\}|(-?[0-9]+))"),
}


@dataclass(frozen=True)
class Number:
    """A number as it was written: its value (of `50%`: 50), its form, and whether nothing is left to be reduced.

    A fraction that is a whole number is no finished form: the division is left to be done.
    """

    value: Fraction
    form: str
    percent: bool = False
    reduced: bool = True
    whole_fraction: bool = False

    def values(self) -> tuple[Fraction, ...]:
        """What it may stand for: a percentage is its number, or a hundredth of it."""
        return (self.value, self.value / 100) if self.percent else (self.value,)


def plain(text: str) -> str:
    """Without dollar signs, what sets a formula without changing it, and a full stop at the end; spaces are single."""
    text = _BRACED_COMMA.sub(",", _THIN_GROUP.sub("", re.sub("[\N{MINUS SIGN}\N{EN DASH}]", "-", text)))
    text = " ".join(_SPACES.sub(" ", _MARKUP.sub("", text)).split()).removesuffix("\\\\")
    text = text.removesuffix(".").removesuffix(",").strip()
    while len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    return text


def unwrapped(text: str) -> str:
    r"""A plain text with the arguments of `\text` and its like in place of the commands."""
    for _ in range(3):
        text = re.sub(TEXT + rf"\{{({_NESTED})\}}", r"\1", text)
    return " ".join(text.split()).removesuffix(".").strip()


def read_number(text: str) -> Number | None:
    """The number that a text is, apart from units, currency and a label before it; None where it is none.

    Args:
        text: as a model or a data set writes it.
    """
    if len(text) > MAX_LENGTH:
        return None
    text = opened(plain(text))
    percent = _PERCENT.search(text) is not None
    bare = _PERCENT.sub("", text) if percent else _without_units(text)
    for candidate in (bare, unwrapped(bare)):
        candidate = _LABEL.sub("", candidate, count=1) if _LABEL.match(candidate) else candidate
        candidate = _PERCENT.sub("", candidate) if percent else _without_units(candidate)
        number = _signed(_CURRENCY.sub("", candidate), percent)
        if number is not None:
            return number
    return None


def read_numbers(text: str) -> tuple[str, list[Number]] | None:
    """The brackets around a list of at least two finished numbers (empty without any) and the numbers; else None.

    A comma before three digits marks thousands where something else parts the numbers (a comma and a space, `and`).
    """
    text = plain(_BRACED_GROUP.sub("", text))
    bracketed = _BRACKETED.fullmatch(text)
    brackets, text = (bracketed[1] + bracketed[3], bracketed[2]) if bracketed else ("", text)
    text = _GROUP.sub("", text) if re.search(rf",\s|{_CONJUNCTION}", text) else text
    numbers = [read_number(entry) for entry in _SEPARATOR.split(text)]
    if len(numbers) < 2 or any(number is None or number.whole_fraction for number in numbers):
        return None
    return brackets, numbers


def same_values(left: list[Number], right: list[Number], ordered: bool) -> bool:
    """Whether two lists hold equal numbers, equally often; in the same order where that counts."""
    if not ordered:
        left, right = (sorted(numbers, key=lambda number: number.value) for numbers in (left, right))
    return len(left) == len(right) and all(map(same_value, left, right))


def same_value(left: Number, right: Number) -> bool:
    """Equal as numbers; a decimal to 6 places, as in math-verify, unless that makes it 0.

    `50%` equals 50 and 0.5, but two percentages are compared as such.
    """
    if left.percent and right.percent:
        return _same(left.value, right.value, left, right)
    return any(_same(one, other, left, right) for one in left.values() for other in right.values())


def _without_units(text: str) -> str:
    units = _UNITS.search(text)
    return text if units is None or _CHANGING.search(units[0]) else text[:units.start()]


def _same(one: Fraction, other: Fraction, left: Number, right: Number) -> bool:
    rounded = {"decimal", "power of ten"} & {left.form, right.form}
    return one == other or (bool(rounded) and round(one, 6) == round(other, 6) != 0)


def _signed(text: str, percent: bool) -> Number | None:
    """One sign in all, braces or brackets around it all, and for what else is written out a form of `_FORMS`."""
    text = opened(text)
    for character, ratio in _WRITTEN_FRACTION.items():
        text = text.replace(character, f" {ratio}")
    sign = re.match(r"\s*[+-]?\s*", text)[0].strip()
    body = opened(text.strip().removeprefix(sign))
    for form, pattern in _FORMS.items():
        match = pattern.fullmatch(body)
        if match is not None:
            return _number(form, match, sign, percent)
    return None


def opened(text: str) -> str:
    """Without one pair of brackets or braces around it all."""
    enclosed = _ENCLOSED.fullmatch(text.strip())
    return (next(filter(None, enclosed.groups()), "") if enclosed else text).strip()


def _number(form: str, match: re.Match[str], sign: str, percent: bool) -> Number | None:
    groups = [group.replace(",", "").replace(" ", "") if group else group for group in match.groups()]
    factor = -1 if sign == "-" else 1
    if form == "decimal":
        value = _fraction(groups[0])
        form = "integer" if "." not in groups[0] else form
        return Number(factor * value, form, percent)
    if form == "repeating":
        start, cycle = groups
        scale = Fraction(1, 10 ** len(start.partition(".")[2]))
        return Number(factor * (_fraction(start) + scale * Fraction(int(cycle), 10 ** len(cycle) - 1)), form, percent)
    if form == "power of ten":
        exponent = int(groups[2] or groups[4] or groups[5])
        if abs(exponent) > MAX_EXPONENT:
            return None
        return Number(factor * _fraction(groups[1] or groups[3] or "1") * Fraction(10) ** exponent, form, percent)
    return _ratio(form, groups, sign, percent)


def _ratio(form: str, groups: list[str | None], sign: str, percent: bool) -> Number | None:
    above, below = int(groups[1] or groups[2] or groups[5]), int(groups[3] or groups[4] or groups[6])
    doubled = (sign == "-") + (above < 0) + (below < 0) > 1
    if not below or doubled or (form == "mixed" and (above < 0 or below < 0)):
        return None
    value = Fraction(above, below)
    whole = value + int(groups[0] or 0)
    return Number(-whole if sign == "-" else whole, form, percent, reduced=math.gcd(above, below) == 1,
                  whole_fraction=value.denominator == 1)


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal if decimal not in (".", "") else "0")
