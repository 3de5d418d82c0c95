r"""Which answers are paid: one table of right answer, answer given, problem, and whether it is worth the reward."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masa_lib.config import ProblemsConfig
from masa_lib.tasks.data_sets import answer_text
from masa_lib.tasks.grading import grade, unmatchable, unmatchable_sentence
from masa_lib.tasks.number_forms import read_number
from masa_lib.tasks.problems import ProblemPool

EXPAND = "Expand $(x+1)(x-1)$ and simplify."

WRITTEN_OTHERWISE = [  # right answer, answers that are paid
    (r"\frac{1}{2}", [r"{\frac{1}{2}}", r"\text{\frac{1}{2}}", r"\mathbf{\frac{1}{2}}", r"\color{red}{\frac{1}{2}}",
                      r"\{\frac{1}{2}\}", r"x \in \{\frac{1}{2}\}", r"\left(\frac{1}{2}\right)", r"\sfrac{1}{2}"]),
    ("18", [r"\color{blue}18", r"\textcolor{red}{18}", "The answer is 18", r"\text{The answer is } 18",
            "the answer is 18.",
            r"18 \checkmark", r"18 \frac{\text{m}}{\text{s}}", '18"', "18'", "18''", "18,", "18\\\\", r"18\%\text{ }",
            r"18^{\text{th}}", "18th", "18^{th}", r"18\mathrm{th}", r"\underline{18}", r"18\text{ in.}", "18 \n"]),
    ("18", [r"\$18", "$18$", "18.", "18.00", "+18", "018", r"\$18.00", r"18\text{ dollars}", "18 dollars", "(18)",
            "{18}",
            r"\{18\}", "**18**", "`18`", r"\textbf{18}", r"\mathbf{18}", r"\boxed{18}", r"\(18\)", r"\[18\]", "$$18$$",
            "Answer: 18", "x = 18", r"n=18", "= 18", r"\text{Total} = 18", r"\text{(C) } 18", r"\textbf{(C)} 18",
            r"\displaystyle 18", r"18\,\text{m}", r"18~\text{m}", r"18 \quad"]),
    ("30", [r"\theta = 30", r"\alpha=30^\circ", r"\lambda = 30", r"\sin\theta = 30",
            r"\varphi \approx 30", r"\Delta = 30", r"(30^\circ)",
            r"{30\%}", r"\left(30^\circ\right)", r"{30^\circ}", r"\texttt{30}", r"\emph{30}", r"\large 30",
            r"\implies 30",
            r"\therefore 30", r"f(3) = 3(9) + 3 = 30", r"\theta = \frac{60}{2} = 30"]),
    ("-30", ["\N{EN DASH}30"]), (r"\begin{pmatrix} 7 \\ 5 \end{pmatrix}",
                                 [r"\angle A = \begin{pmatrix} 7 \\ 5 \end{pmatrix}"]),
    (r"90^\circ", [r"(90^\circ)", r"\theta = 90^\circ"]), (r"\text{odd}", [r"\text{Parity} = \text{odd}"]),
    ("C", ["Option C", r"\text{Option C}", "choice C", "[C]", "Answer: C", "Option (C)"]),
    ("A3_{12}", ["A3_{12}", "a3_{12}"]),
    (r"\$18", ["18", r"\$18", "18 dollars"]),
    (r"20\text{ square units}", ["20", "20 square units", r"20\text{ units}^2"]),
    ("20", [r"20\text{ square units}", "20 miles per hour", r"20\ \mathrm{m/s^2}", r"20\text{ m}/\text{s}^2"]),
    (r"72\text{ cm}^2", ["72", r"72\text{ cm}^2", "72 cm^2", "72cm²", r"72\,\mathrm{cm}^{2}"]),
    (r"\frac{1}{512}", [r"\frac1{512}", r"\dfrac{1}{512}", "1/512", r"{1 \over 512}", r"1 \over 512"]),
    ("5.5", [r"\frac{11}2", r"5\frac12", "5 1/2", r"5\frac{1}{2}", "5½", "11/2", "5.50", r"\tfrac{11}{2}"]),
    (r"\frac{1}{54}", [r"{1 \over 54}", r"\frac{1}{54}\text{ cm}"]),
    ("1.6", [r"1.6\mathrm{~cm}", r"1.6 \text{ cm}", r"\frac85", "1.60", "1 3/5"]),
    ("17", ["17°", r"17^\circ", r"17^{\circ}", r"17\text{ degrees}", r"17^\circ\text{C}", r"17\degree"]),
    ("17°", ["17", r"17^\circ"]), (r"17^\circ", ["17", "17°"]),
    (r"237.5\%", ["237.5", r"237.5\%", "237.5%", "237.5 percent", "2.375"]),
    ("50", [r"50\%", "50%"]), (r"50\%", ["50", r"\frac12", "0.5", r"50\text{ percent}"]),
    ("90000", ["90{,}000", "90,000", r"90,\!000", r"90\,000", r"9 \times 10^4", "9e4", r"9\cdot10^{4}"]),
    (r"90{,}000", ["90000", "90,000"]), (r"90,\!000", ["90000", "90,000"]),
    ("2005.5", ["2005 1/2", r"2005\frac{1}{2}", r"\frac{4011}{2}"]), ("2005 1/2", ["2005.5", r"2005\frac12"]),
    ("1000000000", ["1e9", "1E9", "10^9", "10^{9}", "1,000,000,000"]), ("1e9", ["1000000000", r"10^{9}"]),
    ("1e-07", ["0.0000001", r"10^{-7}", "1e-7"]),
    ("4320", [r"n=4,\!320", "n = 4{,}320", "4,320"]),
    (r"\frac13", [r"0.\overline{3}", r"0.\bar{3}", "0.333333", "2/6"]), ("-8", ["-(8)", r"-\left(8\right)", "(-8)",
                                                                                "- 8"]), ("-1/2", [r"-\frac{1}{2}",
                                                                                                   r"\frac{-1}{2}",
                                                                                  "-.5"]),
    ("F", ["F", "f", "(F)", r"\text{(F)}", r"\textbf{F}", "F) 17"]), ("J", ["J", "(J)", "J."]), ("A", ["(A)", "A: 3"]),
    ("(H)", ["H", "(H)"]), (r"\text{(G)}", ["G", "(g)"]),
    (r"\text{Tuesday}", ["Tuesday", "tuesday", r"\text{Tuesday}"]), ("no", ["no", r"\text{no}"]),
    (r"\text{Friday}", ["{Friday}", "**friday**"]), (r"\text{two lines}", ["two lines", r"\text{Two lines}"]),
    ("{(E)}", ["E", "({E})"]), (r"\cos(6)\sin(12)", [r"\cos(6) \cdot \sin(12)", r"\sin(12)\cos(6)"]),
    ("32", [r"2^5 = 32", r"x = 2^5 = 32", r"\frac{64}{2} = 32", r"A = \pi r^2 = 32", "32 = 32", r"f(2) = 32"]),
    ("3.14", [r"\pi \approx 3.14", r"x \approx 3.14", r"3.142 \approx 3.14"]),
    ("x=5", ["5", "x=5", "x = 5"]), ("5", ["x=5", r"\{5\}", r"x \in \{5\}", "5 pies", "5 m", "[5]", r"\text{Answer: }5",
                               r"5\text{ million}"]),
    (r"\log_5 7", [r"\log_5 7", r"\frac{\ln 7}{\ln 5}"]), (r"2\pi", [r"2\pi", r"2 \cdot \pi", r"\pi \cdot 2"]),
    (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt3}{2}", r"\frac{3}{2\sqrt3}", r"\sqrt{\frac34}", r"\frac12\sqrt3"]),
    (r"\sin 10^\circ", [r"\sin 10^\circ", r"\sin{10^\circ}"]), (r"|x|", [r"|x|", r"\left|x\right|"]),
    (r"2^{10}", [r"2^{10}", "1024"]), (r"\sqrt{16}", ["4", r"\sqrt{16}"]), ("2 + 3", ["5", "2+3"]),
    (r"\lfloor x \rfloor", [r"\lfloor x \rfloor"]), (r"\gcd(a,b)", [r"\gcd(a,b)"]), ("503e", ["503e", r"503 \cdot e"]),
    ("[1,2)", ["[1,2)", "[1, 2)", r"\left[1,2\right)"]), (r"(-\infty,3)", [r"(-\infty, 3)", r"\left(-\infty,3\right)"]),
    (r"\{1,2\}", [r"\{1,2\}", r"\{2, 1\}"]), ("3, -3", [r"\pm 3", "-3, 3", "3,-3"]), ("(3,4)", ["(3, 4)",
                                                                                                r"\left(3,4\right)"]),
    (r"45^\circ, 135^\circ", ["45, 135", "135, 45", r"45^\circ \text{ and } 135^\circ"]),
    (r"6, 8\text{, and }10", ["6, 8, 10", "10, 8, 6", "6, 8 and 10"]), ("12, 345, 6", ["12,345,6", "6, 345, 12"]),
    ("1,000, 2,000", ["1000, 2000", "1,000 and 2,000", r"1{,}000, 2{,}000"]), (r"(45^\circ, 30^\circ)", ["(45, 30)"]),
    (r"\$3, \$5", ["3, 5"]), (r"50\%, 25\%", ["25, 50"]), (r"3-i,-2+i", [r"3 - i \text{ and } -2 + i", "3-i, -2+i"]),
    (r"3 - i \text{ and } -2 + i", ["3-i, -2+i"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix}1\\2\end{pmatrix}",
                                               r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"]),
    (r"\begin{pmatrix} 1 & \frac12 \\ 2 & 3 \end{pmatrix}", [r"\begin{pmatrix} 1 & 0.5 \\ 2 & 3 \end{pmatrix}"]),
    (r"1110_4", ["1110_4", "1110", "1110_{4}", r"1110_{\text{four}}", "1,110_4"]), (r"2E_{16}", ["2E_{16}", "2e_{16}",
                                                                                                 "2E"]),
    ("34", [r"34_{10}"]), ("1, 234", ["1, 234", "1,234"]), ("x^2-1", ["x^2-1", "(x-1)(x+1)", r"x^{2} - 1", "-1+x^2"]),
    (r"$\cos x=-1.5$ never happens", [r"\cos x=-1.5$ never happens"]), ("y = 2x+3", ["y=2x+3", "y = 3 + 2x"]),
    (r"x > 5", ["x>5", "5 < x"]),
]

NOT_PAID = [  # right answer, answers that compute to it or only look like it
    ("7104", ["96 * 74", r"96 \times 74", r"96 \cdot 74", "96 \N{MULTIPLICATION SIGN} 74", "7104x/x",
              r"\frac{7104x}{x}", "(96)(74)", "1000 * 7.104",
              "x = 96 * 74", "7104 = 96 * 74", "--7104", "-(-7104)", "14208/2", r"\frac{14208}{2}", r"7104 \cdot 1",
              "7104 + 0", r"\frac{7104.0}{1.0}", "-(7104)", "7104^1", "7105", r"\text{7105}", "7104.5", "-7104"]),
    ("4", [r"\log_5625", r"\log_5 625", r"\log_2{16}", r"\sqrt{16}", "2^2", "2+2", "|4|", "|-4|", r"\left|-4\right|",
           "4!/3!",
           r"\lg 10000", r"4 \ln e", r"\ln e^4", "4e^0", r"4\cos 0", r"\binom{4}{1}", r"\frac{8}{2}", r"8 \div 2",
           "5 - 1"]),
    ("5", [r"\lfloor 36/7 \rfloor", r"\lceil 4.5 \rceil", r"\left\lfloor \frac{36}{7} \right\rfloor", r"\max(3, 5)",
           r"\min(5,6)",
           r"\sqrt[3]{125}", r"17 \mod 12", r"17 \bmod 12", r"\sum_{i=1}^{5} 1", r"5xy", "5x", "5, 5, 6",
           "5 \\text{ or } 7"]),
    ("30", [r"\gcd(120, 150)", r"\operatorname{gcd}(120, 150)", r"\text{lcm}(6, 15)", r"\operatorname{lcm}(6,15)",
            "5 * 6", "5!/4"]),
    ("0", [r"\sin 0", r"\sin \pi", r"\ln 1", r"\log 1", r"\cos 90^\circ", r"\tan 0", "5 - 5", "0 \\cdot 7", "1=0",
           "1 = 2 = 0",
           "|0|", "-(-0)"]),
    ("503", [r"503 \ln e", r"503\ln(e)", r"503 \log 10", r"503 \sin 90^\circ", r"503 \cdot \sin^2 x + 503 \cos^2 x"]),
    ("1234", ["1, 234", r"1,\ 234", r"1,~234", r"1,\;234", r"1, \, 234", "(1,234)", "(1, 234)", "1; 234", "[1, 234]",
              "1.234",
              r"1 \text{ and } 234", r"\{1, 234\}", "12,34"]),
    ("10000", ["10, 000", "10; 000", "(10,000)"]), ("1, 234", ["1234", "1; 235", "234"]), ("45, 135", ["45, 136", "45",
                                                                                                       "45, 135, 225",
                                                                                                       "45, 45",
                                                                                                       "40+5, 135"]),
    ("(45, 30)", ["(30, 45)", "(45, 31)"]),
    ("30", [r"\theta = 31 = 30", r"\alpha = 30 = 2\theta = 29", r"\theta = 3(9) = 30",
            r"\theta = 5 \cdot 6", "(5 * 6)", "{60/2}"]),
    ("C", ["Option B", "Option C or D", "[D]", "CD", "Options"]),
    ("A3_{12}", ["A3_{16}", "A4_{12}", "123"]), ("AB_{15}", ["AB_{16}"]),
    ("1110_4", ["1110_5", "1110_{10}", "1111_4", "84", r"1110_{\text{five}}", "111_4"]), ("84", ["1110_4", "84_{16}"]),
    ("2E_{16}", ["2E_{15}", "2F_{16}"]), ("42", ["42_8", "52_8", r"101010_2"]),
    ("32", ["x=1=2=32", "1 = 32", "2+2 = 32", "2^4 = 32", r"1 \approx 32", "31 = 32", "32 = x = 31", "x=32=33"]),
    ("8", ["|-8|", "-(-8)", "--8", "-(-(8))", r"\left|-8\right|", r"\lvert -8 \rvert", r"-\left(-8\right)",
           r"\sqrt{64}", "+-8"]),
    ("-8", ["-(-(-8))", "0 - 8", "8"]), ("0.5", [r"1 - \frac12", "50", r"\sin 30^\circ", r"2^{-1}", r"0.25 \cdot 2"]),
    ("5/6", [r"\frac12 + \frac13", r"\frac{1+4}{6}", r"1 - \frac16", "0.83"]),
    ("120000", [r"12 \times 10000", r"1.2 \times 10^{4}", r"120 \times 1000"]),
    ("1e-07", ["0", "2e-07", "1e-08"]), ("0.0000002", ["0.0000001", "0"]), ("0.000000", ["1e-9"]),
    ("x=5", ["y=5", "x=6", "x = 2 + 3", "x=1=5"]), ("(3,4)", ["(4,3)", "(1+2, 4)", r"(3, \sqrt{16})",
                                                              r"(3, \frac{8}{2})"]),
    (r"\{1,2\}", [r"\{1, 1+1\}", r"\{1,3\}", r"\{1\}"]), (r"(-\infty,3)", [r"(-\infty, 6/2)", r"(-\infty,3]",
                                                                           r"(-\infty, 1+2)"]),
    ("[1,2)", ["[1,2]", "(1,2)", "[1, 4/2)"]), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
                                                [r"\begin{pmatrix} 1 \\ 1+1 \end{pmatrix}",
                                                 r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"]),
    ("F", ["G", "6", "Fine", "FJ", "(F) or (G)", "F. or G.", "F) 3, G) 4", "F or G"]), ("J", ["I", "10"]), ("Tuesday",
                                                                                                            ["Tusedya",
                                                                                                             "Monday",
                                                                                                             ""]),
                                                                                                             ("no",
                                                                                                              ["on",
                                                                                                               "yes"]),
    (r"2\pi", [r"3\pi", "6.3", r"A = 7 = 2\pi"]), ("x^2-1", ["x^2+1", "(x-1)^2"]),
]

WITH_PROBLEM = [
    ("-2", "4x + 3y = -2", "Given that $2x - 3y = 8$ and $4x + 3y = -2$, what is $xy$?", False),
    ("3", "g(x) = 3", "Let $g(x) = 3$. Find $g(2)$.", False), ("0", "x^2-1=0", "Solve \\[x^2 - 1 = 0.\\]", False),
    ("3", "g(2) = 3", "Let $g(x) = 3$. Find $g(2)$.", True), ("2", "2d", "Given that $2d = 4$, find $d$.", False),
    ("5", "5m", "Solve $5m = 25$.", False), ("5", r"5\text{ m}", "Twice as long as 2.5 m?", True),
    ("x^2-1", "(x+1)(x-1)", EXPAND, False), ("x^2-1", "y = (x+1)(x-1)", EXPAND, False), ("x^2-1", "x^2-1", EXPAND,
                                                                                         True),
    ("x^2-1", "(x-1)(x+1)", EXPAND, True), ("x^2-1", "x^2 - 1", "Expand (x+1)(x-1).", True),
    ("x^2-1", r"\left(x+1\right)\left(x-1\right)", EXPAND, False), ("x^2-1", "(x+1)(x-1)",
                                                                    "Write $(x+1)(x-1)+2$ as a square.", True),
    ("(x-1)(x+1)", "x^2-1", "Factor $x^2-1$.", False), ("(x-1)(x+1)", "x^2 - 1", "Factor x^2-1 completely.", False),
    ("(x-1)(x+1)", "(x+1)(x-1)", "Factor $x^2-1$.", True),
    (r"\frac{7}{12}", r"\frac{84}{144}", r"Simplify $\frac{84}{144}$.", False), ("7/12", "84/144", "Reduce 84/144.",
                                                                                 False),
    (r"\frac{7}{12}", r"\frac{14}{24}", r"Simplify $\frac{84}{144}$.", True), (r"\frac{13}{20}", "0.65",
                                                                               "Write 0.65 as a fraction.", False),
    (r"\frac{13}{20}", "0.65", "How likely is it?", True), ("0.375", r"\frac{3}{8}",
                                                            r"Write $\frac{3}{8}$ as a decimal.", False),
    (r"\frac{1}{3}", r"0.\overline{3}", r"Write $0.\overline{3}$ as a fraction.", False),
    ("32000", r"3.2 \times 10^4", r"Write $3.2 \times 10^4$ in full.", False), ("5.5", r"5\frac12",
                                                                                r"Write $5\frac12$ as a decimal.",
                                                                                False),
    ("x+7", "x+3+4", "Simplify: x+3+4", False), ("2x", "x+x", "Simplify $x + x$.", False), ("2x", "x + x",
                                                                                            "Simplify $x^2+x$.", True),
    (r"2\sqrt{3}", r"\left(\sqrt{12}\right)", r"Simplify $\sqrt{12}$.", False),
    (r"2\sqrt{3}", r"+\sqrt{12}", r"Simplify $\sqrt{12}$.", False),
    (r"\frac{3}{4}", r"\frac{12}{16}", "Reduce 12/16.", False),
    (r"\frac{3}{4}", "12/16", r"Reduce $\dfrac{12}{16}$.", False),
    ("0.625", "5/8", r"Write $\frac58$ as a decimal.", False),
    (r"\frac{5}{9}", r"0.\bar5", r"Write $0.\overline{5}$ as a fraction.", False),
    (r"2\sqrt{3}", r"\sqrt{12}", r"Simplify $\sqrt{12}$.", False), (r"2\sqrt{3}", r"\sqrt{12}", "How long is the side?",
                                                                    True),
    (r"\frac{1}{x}", r"\frac{x}{x^2}", r"Simplify $\dfrac{x}{x^2}$.", False), (r"3^{200}", "3^{200}",
                                                                               "Is $2^{300}$ or $3^{200}$ larger?",
                                                                               True),
    ("7104", "96 * 74", "What is 96 * 74?", False), ("42", "42", "Is 42 even or odd? Say 42.", True), ("0.5", "0.5",
                                                                                                       "Is it 0.5?",
                                                                                                       True),
    ("(3,4)", "(3,4)", "Reflect (3,4) twice.", True), ("42", "42_8", "Write 34 in base 8.", True), ("x=5", "5",
                                                                                                    "Solve $x=5$.",
                                                                                                    True),
    (r"\frac{1}{2}", "1/2", r"A coin falls heads with probability $\frac12$.", True), (r"\log_5 7", r"\log_5 7",
                                                                                       r"Is $\log_5 7$ rational?",
                                                                                       True),
    (r"\frac{\ln 7}{\ln 5}", r"\log_5 7", r"Write $\log_5 7$ in natural logarithms.", False), ("y^2", "yy",
                                                                                               "Simplify $yy$.", False),
]

TABLE = [*((gold, given, "", True) for gold, answers in WRITTEN_OTHERWISE for given in answers),
         *((gold, given, "", False) for gold, answers in NOT_PAID for given in answers), *WITH_PROBLEM]


def boxed(answer: str) -> str:
    return f"Step by step, {{so}} the answer is \\boxed{{{answer}}}."


@pytest.mark.parametrize(("gold", "given", "problem", "paid"), TABLE)
def test_an_answer_is_paid_where_it_is_right_and_finished(gold: str, given: str, problem: str, paid: bool) -> None:
    assert grade(boxed(given), gold, problem=problem) is paid


@given(st.fractions(-100, 100, max_denominator=60), st.fractions(-100, 100, max_denominator=60))
def test_fractions_are_equal_exactly_when_their_values_are(left: Fraction, right: Fraction) -> None:
    fraction = left.denominator > 1  # 4 is the answer, not 4/1
    predicted = f"\\frac{{{left.numerator}}}{{{left.denominator}}}" if fraction else str(left)
    assert grade(boxed(predicted), str(right)) == (left == right)


NUMBERS = st.fractions(-10**6, 10**6, max_denominator=999)


@given(NUMBERS.filter(lambda number: number.denominator > 1), st.sampled_from([r"{}\frac{{{}}}{{{}}}", "{} {}/{}"]))
def test_a_mixed_number_is_the_sum_of_its_parts(number: Fraction, form: str) -> None:
    whole, rest = divmod(abs(number), 1)
    written = form.format(whole or "", rest.numerator, rest.denominator).strip()
    found = read_number("-" + written if number < 0 else written)
    assert found is not None
    assert found.value == number


@given(st.integers(-10**12, 10**12), st.sampled_from(["{:,}", r"\${:,}", r"{:,}\text{{ cm}}^2", r"{:,}\%", "x = {:,}",
                                                      "**{:,}**"]))
def test_a_whole_number_is_read_through_commas_units_and_marks(number: int, form: str) -> None:
    assert grade(boxed(form.format(number).replace(",", "{,}")), str(number))
    assert not grade(boxed(form.format(number)), str(number + 1))


@given(st.integers(1, 999), st.integers(0, 999))
def test_a_list_is_never_read_as_thousands(first: int, second: int) -> None:
    assert not grade(boxed(f"{first}, {second:03}"), str(1000 * first + second))
    assert grade(boxed(f"{first},{second:03}"), str(1000 * first + second))


@given(st.integers(-99, 99), st.integers(-99, 99), st.sampled_from(["+", "-", "*", r"\times", r"\cdot"]))
def test_an_operation_is_no_answer_but_may_end_in_one(left: int, right: int, sign: str) -> None:
    value = {"+": left + right, "-": left - right}.get(sign, left * right)
    assert not grade(boxed(f"{left} {sign} ({right})"), str(value))
    assert grade(boxed(f"{left} {sign} ({right}) = {value}"), str(value))
    assert not grade(boxed(f"{left} {sign} ({right}) = {value + 1}"), str(value + 1))


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40) | st.sampled_from([row[0] for row in TABLE]))
def test_every_answer_that_fits_a_box_is_paid_for_itself(gold: str) -> None:
    assert grade(f"\\boxed{{{gold}}}", gold, problem=f"Is it ${gold}$?") or gold in unmatchable([gold])


def test_answers_that_no_box_can_match_are_counted_and_three_are_shown() -> None:
    stored = ["She sells 16 - 7 = 9.\n#### 72", '["5", "7"]', "['5']", "b'72'", '{"answer": 5}', "{5", "5}", "",
              "tensor(72)", "np.int64(72)", "<answer>72</answer>", "72\\n",
              "1" * 2000]
    fine = [r"\{1, 2\}", "[1, 2]", "72", "1e-07", r"\frac{1}{2}", "Tuesday", "b", "5, 7", r"\text{(B)}", "2^{10}",
            r"\boxed{72}", "f(x)"]
    assert unmatchable([*fine, *stored]) == stored
    assert unmatchable_sentence("x.jsonl", fine) == ""
    said = unmatchable_sentence("x.jsonl", [*fine, *stored])
    assert said.startswith("13 of 25 answers of x.jsonl can never be matched")
    assert [shown in said for shown in ("#### 72", '["5", "7"]', "['5']", "b'72'")] == [True, True, True, False]


@pytest.mark.parametrize("part", ["cm ", "cm~", "'", "word ", r"\text{a}", "{", "(1,", "1,234,", "x=", "^2", " ",
                                  "and "])
def test_no_text_takes_longer_to_read_than_a_moment(part: str) -> None:
    text = (part * 1000)[:990]
    start = time.process_time()
    for gold in ("5", "5, 6", "1110_4"):
        grade(f"\\boxed{{{text}}}", gold, problem=f"What is ${text}$?")
    assert time.process_time() - start < 2


def test_loading_a_file_tells_of_the_answers_that_no_box_can_match(tmp_path: Path) -> None:
    answers = ["She sold 16 - 7 = 9.\n#### 72", '["5", "7"]', "1e-07", *map(str, range(60))]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"problem": f"What is it, number {number}?", "answer": answer}) + "\n"
                            for number, answer in enumerate(answers)), encoding="utf8")
    pool = ProblemPool(ProblemsConfig(source=str(path)), seed=0)
    assert "can never be matched by a boxed answer (the first: " in pool.note
    assert ("#### 72" in pool.note, '["5", "7"]' in pool.note, "1e-07" in pool.note) == (True, True, False)
    assert (answer_text(b"72"), answer_text(["5", "7"])) == ("72", "5, 7")
