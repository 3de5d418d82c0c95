"""Which answers count as right, and that no answer hangs, crashes, prints or runs anything."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sympy.parsing import sympy_parser

from masa_lib.tasks import grading, grading_worker, math_server
from masa_lib.tasks.grading import extract_answer, grade, grade_many
from masa_lib.tasks.grading_worker import GradingError


def boxed(answer):
    return f"Step by step, {{so}} the answer is \\boxed{{{answer}}}."


@pytest.fixture
def no_worker(monkeypatch):
    def start(*_):
        raise AssertionError("the worker was asked")

    monkeypatch.setattr(grading_worker.Worker, "compare", start)


@pytest.mark.parametrize(("text", "answer"), [
    (boxed("5"), "5"), ("\\boxed{1} no, \\boxed{2}", "2"), ("\\boxed{1} no, \\boxed{2", "1"), ("\\boxed {5}", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\left\{ x}", r"\left\{ x"),
    ("\\boxed 72", "72"), ("so $\\boxed 72$.", "72"), ("\\boxed 72.", "72"), (r"\boxed\frac12", r"\frac12"),
    (r"\boxed \frac{1}{2} or", r"\frac{1}{2}"), (r"\boxed{1} \boxed -5", "-5"), (r"\fbox{5}", "5"),
    (r"\boxed{5} \boxed", "5"),
    (r"\boxed{\boxed{5}}", "5"), ("\\boxed{ 5 \n}", "5"), (r"\boxed{a\\}", r"a\\"),
    ("", None), ("5", None), ("\\boxed", None), ("\\boxed{5", None), ("boxed 5", None), ("boxed{5}", None),
    (boxed("1" * 2000), None)])
def test_the_last_complete_box_is_the_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(("predicted", "answer", "right"), [
    ("42", "42", True), ("42", "43", False), ("042", "42", True), ("+42", "42", True), ("-42", "42", False),
    ("\N{MINUS SIGN}42", "-42", True), ("42.", "42", True), ("42.0", "42", True), ("$42$", "42", True),
    ("1,234", "1234", True), ("1{,}234", "1234", True), (r"1\,234", "1234", True), ("1,234", "1.234", False),
    ("1/2", "0.5", True), (r"\frac{1}{2}", "1/2", True), (r"-\dfrac{1}{2}", "-0.5", True), ("2/4", "1/2", True),
    (r"\frac{-1}{2}", "-.5", True), ("0.333333", "1/3", True), ("0.3333", "1/3", False), ("50", "0.5", False),
    ("1" * 900, "1" * 900, True), ("1" * 900, "2" + "1" * 899, False), (r"\text{42}", "42", True), ("", "42", False),
    ("B", "B", True), ("b", "B", True), ("(B)", "B", True), (r"\text{B}", "B", True), (r"\textbf{(B)} 17", "B", True),
    ("B) 17", "B", True), ("C", "B", False), ("17", "B", False), ("Because", "B", False),
    ("Tuesday", "tuesday", True), (r"\text{Tuesday}", "Tuesday", True), ("Tusedya", "Tuesday", False),
    ("x + 1", "x+1", True), (r"\left(1, 2\right)", "(1,2)", True)])
def test_plain_answers_are_compared_without_the_worker(predicted, answer, right, no_worker):
    assert grade(boxed(predicted), answer) is right


@pytest.mark.parametrize(("predicted", "answer", "right"), [
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True), ("x^2-1", "(x-1)(x+1)", True), ("x^2-1", "(x-1)^2", False),
    (r"\{2, 1\}", r"\{1, 2\}", True), ("(2, 1)", "(1, 2)", False), ("1 2", "12", False), ("[1, 2)", "[1, 2]", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac22 \\ 4 - 2 \end{pmatrix}", True)])
def test_the_rest_is_compared_by_value_by_math_verify(predicted, answer, right):
    assert grade(boxed(predicted), answer) is right


@pytest.mark.parametrize(("predicted", "answer"), [
    ("96 * 74", "7104"), ("0 - 8", "-8"), ("96/4", "24"), (r"\sqrt{16}", "4"), (r"\gcd(12, 8)", "4"), ("|-8|", "8"),
    (r"\log_2 8", "3"), ("7104 = 96 * 74", "7104"), ("7104x/x", "7104"), ("1, 234", "1234")])
def test_a_number_that_is_left_to_be_computed_is_refused_without_the_worker(predicted, answer, no_worker):
    assert not grade(boxed(predicted), answer)


@pytest.mark.parametrize("predicted", ["96 * 74", r"\frac{14208}{2}"])
def test_the_released_code_computes_what_is_left(predicted):
    assert grade(boxed(predicted), "7104", percentage_slack=True)


def test_percentage_slack_accepts_what_the_released_code_accepts(no_worker):
    for predicted, answer in [("50", "0.5"), ("0.5", "50"), ("5000", "50"), ("10001", "10000"), ("0.33334", "1/3")]:
        assert not grade(boxed(predicted), answer)
        assert grade(boxed(predicted), answer, percentage_slack=True)
    assert not grade(boxed("51"), "50", percentage_slack=True)


HOSTILE = {"tower": "9**9**9**9", "latex tower": "10^{10^{10}}", "digits": "7" * 100_000, "power": "2^{99999999}",
           "fractions": "\\frac{1}{" * 500 + "2" + "}" * 500, "factorial": "99999999!", "factorials": "9!!!!!",
           "binomial": r"\binom{99999999}{5000000}", "expansion": "(x+y+z+1)^{900}",
           "python": "__import__('os').system('touch HACKED')", "call": "open('HACKED','w')", "roots": r"\sqrt{" * 200,
           "surrogates": "\ud800 + x", "nul": "\0", "unicode": "٣²", "letters": "a" * 900, "quotes": "'''\"\"\""}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_wrong_within_seconds_and_runs_nothing(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grading_worker, "CPU_SECONDS", 0.5)
    start = time.monotonic()
    assert not grade(boxed(HOSTILE[name]), "x+1")
    assert time.monotonic() - start < 60
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert grade(boxed("1+x"), "x+1")


@pytest.mark.parametrize("text", [
    "{" * 10**6, "\\boxed{" * 150_000, "\\boxed{" + "{" * 10**6, "\\boxed{" + "{}" * 500_000, "\\boxed{" + "}" * 10**6,
    "\\boxed" * 170_000], ids=lambda text: text[:12])
def test_a_million_braces_are_read_in_a_moment(text):
    start = time.process_time()
    assert not grade(text, "1")
    assert time.process_time() - start < 0.5


@given(st.text(st.characters(), max_size=30), st.text(st.sampled_from("ABC.,()$%\\{}^_ 1/="), max_size=8))
def test_no_text_makes_the_checks_before_the_worker_raise(text, answer):
    extract_answer("\\boxed{" + text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading._WORKER, "compare", lambda *_: False)
        for gold, given in ((text, answer), (answer, text)):
            grade("\\boxed{" + given + "}", gold, problem=gold + " $" + given + "$")


def test_many_threads_get_their_own_answers():
    numbers = list(range(40))
    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(lambda n: grade(boxed(f"x + {n}"), f"{n} + x"), numbers))
        wrong = list(pool.map(lambda n: grade(boxed(f"x + {n}"), f"{n + 1} + x"), numbers))
    assert all(right)
    assert not any(wrong)


def test_pairs_are_graded_in_order_and_must_match_in_number():
    assert grade_many([boxed("1"), boxed("2"), "none"], ["1", "1", "1"]) == [True, False, False]
    with pytest.raises(ValueError, match="shorter"):
        grade_many([boxed("1")], [])


@pytest.fixture
def at_the_next_wait(monkeypatch):
    """Have something happen once, while the worker is computing an answer."""
    def arrange(act):
        def wait(*arguments):
            monkeypatch.setattr(grading_worker.select, "select", real)
            act()
            return real(*arguments)

        real = select.select
        assert grade(boxed("y+1"), "1+y")  # so that it runs
        monkeypatch.setattr(grading_worker.select, "select", wait)

    return arrange


def test_a_killed_worker_is_replaced_and_asked_again(at_the_next_wait):
    assert grade(boxed("y+2"), "2+y")
    grading._WORKER.process.kill()
    assert grade(boxed("y+3"), "3+y")
    at_the_next_wait(lambda: grading._WORKER.process.kill())
    assert grade(boxed("y+4"), "4+y")


def test_an_interrupt_shifts_no_later_answer(at_the_next_wait):
    def interrupt():
        raise KeyboardInterrupt

    at_the_next_wait(interrupt)
    with pytest.raises(KeyboardInterrupt):
        grade(boxed("y+5"), "5+y")
    assert [grade(boxed(f"y+{n}"), "6+y") for n in (6, 7, 5)] == [True, False, False]
    assert grade(boxed("y+5"), "5+y")


def test_a_worker_that_stands_still_is_replaced_and_one_that_works_is_waited_for(at_the_next_wait, monkeypatch):
    monkeypatch.setattr(grading_worker, "WALL_SECONDS", 2.0)
    at_the_next_wait(lambda: os.kill(grading._WORKER.process.pid, signal.SIGSTOP))
    assert grade(boxed("y+8"), "8+y")
    monkeypatch.setattr(grading_worker, "WALL_SECONDS", 1.0)
    monkeypatch.setattr(grading_worker, "CPU_SECONDS", 1.5)
    grading._WORKER.close()
    assert not grade(boxed(HOSTILE["expansion"]), "x+1")
    assert grading._WORKER.ended == -signal.SIGPROF  # its own clock ended it, not ours


def test_what_came_of_a_limit_is_counted_told_once_and_not_remembered(monkeypatch, caplog):
    monkeypatch.setattr(grading._WORKER, "limits", 0)
    monkeypatch.setattr(grading_worker, "CPU_SECONDS", 0.2)
    grading._WORKER.close()
    hostile = boxed(HOSTILE["expansion"])
    for _ in range(2):
        assert grade_many([hostile, hostile], ["x+1", "x+1"]) == [False, False]  # one question, whatever it costs
    assert grading.limits_met() == 2
    assert [record.message for record in caplog.records] == [
        "An answer counts as wrong because comparing it ran into a limit (0.2 s of CPU time, 2 GiB): "
        "'(x+y+z+1)^{900}'. Further ones are counted in silence."]


def test_a_comparison_that_fills_the_memory_says_nothing_of_the_answer(monkeypatch):
    replies = serve(monkeypatch, [[7, "x+1", "1+x"]])
    assert replies[1:] == ["[7, true]"]
    assert serve(monkeypatch, [[8, "x+1", "1+x"]], memory_bytes=2**20)[1:] == ["[8, null]"]


def test_a_worker_that_cannot_start_is_an_error_and_not_a_wrong_answer(monkeypatch):
    worker = grading_worker.Worker()
    monkeypatch.setattr(grading_worker.sys, "executable", "/bin/false")
    with pytest.raises(GradingError, match="math-verify is installed"):
        worker.compare("x", "y")


def serve(monkeypatch, requests, memory_bytes=2**40):
    monkeypatch.setattr(sympy_parser, "eval_expr", sympy_parser.eval_expr)  # the worker closes it for its whole process
    replies = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        math_server.serve([json.dumps(request) for request in requests], replies, 60.0, memory_bytes)
    return replies.getvalue().splitlines()


def test_the_worker_answers_line_by_line_and_reads_numbers_without_eval(monkeypatch):
    replies = serve(monkeypatch, [[1, "x+1.5", "1.5+x"], [2, "x+1", "x+2"], [3, "x(", ")"]])
    assert replies == ["ready", "[1, true]", "[2, false]", "[3, false]"]
    with pytest.raises(ValueError, match="not evaluated"):
        math_server.read_literal("__import__ ('os' )")


def test_the_worker_loads_nothing_heavy():
    assert grade(boxed("y+9"), "9+y")
    loaded = " ".join(part.path for part in psutil.Process(grading._WORKER.process.pid).memory_maps())
    assert "python" in loaded
    assert not [name for name in ("torch", "pandas", "transformers") if name in loaded]


def test_a_process_that_reads_its_program_from_stdin_grades_in_a_thread_and_ends_silently():
    program = ("import threading\nfrom masa_lib.tasks.grading import grade\n"
               "run = lambda: print(grade(r'\\boxed{x+1}', '1+x'))\n"
               "thread = threading.Thread(target=run); thread.start(); thread.join()\n")
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-"], input=program, capture_output=True,
                          text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_a_forked_process_starts_a_worker_of_its_own():
    program = ("import os\nfrom masa_lib.tasks.grading import grade\n"
               "assert grade(r'\\boxed{x+1}', '1+x')\n"
               "child = os.fork()\n"
               "right = all(grade(r'\\boxed{x+%d}' % n, '%d+x' % n) for n in range(2, 20))\n"
               "if child == 0: raise SystemExit(0 if right else 1)\n"
               "assert os.waitpid(child, 0)[1] == 0 and right\n")
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", program], capture_output=True, text=True,
                          timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_importing_and_grading_plain_answers_start_no_process():
    program = ("import sys\nfrom masa_lib.tasks import grading\n"
               "assert grading.grade(r'\\boxed{5}', '5')\n"
               "assert grading._WORKER.process is None and 'sympy' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_a_large_process_has_its_answers_compared_too() -> None:
    code = ("held = bytearray(1_300 * 2**20); held[::4096] = b'x' * len(held[::4096])\n"
            "from masa_lib.tasks import grading\nprint(grading.grade(r'\\boxed{y+1}', '1+y'), grading.limits_met())")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "0"]
