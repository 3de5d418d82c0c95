"""What the parser takes, what it refuses and why, and that no text hurts it."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masa_lib.tasks.predictions import MetaPrediction
from masa_lib.tasks.read_prediction import MAX_NOTION_LENGTH, MAX_NOTIONS, MAX_SOLUTION_LENGTH, parse_prediction

PLAIN = '{"math_notion": ["carry", "borrow"], "pass_rate": 5, "solution_length": 40}'
EXPECTED = MetaPrediction(("carry", "borrow"), 5, 40)


@pytest.mark.parametrize("text", [
    PLAIN,
    f"<meta>I expect {{about}} 5 of 8, since \\frac{{1}}{{2}} helps.</meta>\nHere it is: {PLAIN} That's it.",
    f"```json\n{PLAIN}\n```",
    f"{PLAIN} and so \\boxed{{5}} with {{x: 1}}",
    json.dumps(json.loads(PLAIN), indent=4),
    '{"solution_length": 40, "pass_rate": 5, "math_notion": ["carry", "borrow"]}',
    "{'math_notion': ['carry', 'borrow'], 'pass_rate': 5, 'solution_length': 40}",
    '{"math_notion": ["carry", "borrow",], "pass_rate": 5, "solution_length": 40,}',
    '{"math_notion": ["carry", "borrow"], "pass_rate": "5", "solution_length": " 40 "}',
    '{"math_notion": ["carry", "borrow"], "pass_rate": 5.0, "solution_length": 40.00}',
    "{math_notion: [carry, borrow], pass_rate: 5, solution_length: 40}",
    '{"math_notion": "carry, borrow", "pass_rate": 5, "solution_length": 40}',
    '{"why": {"a": [1, {}]}, "math_notion": ["carry", "borrow"], "pass_rate": 5, "solution_length": 40, "sure": true}',
    f'{{"prediction": {PLAIN}}}',
    f"{{{PLAIN}}}",
    PLAIN.replace("carry", " carry\n"),
], ids=lambda text: text[:30])
def test_what_real_models_write_is_read(text):
    assert parse_prediction(text).prediction == EXPECTED, parse_prediction(text).error


@pytest.mark.parametrize(("written", "notion"), [
    (r'"\frac{1}{2}"', r"\frac{1}{2}"), (r'"\\theta"', r"\theta"), (r'"x \in \{1, 2\}"', r"x \in \{1, 2\}"),
    ('"a } and { b"', "a } and { b"), (r'"the \"law\""', 'the "law"'), ("'Fermat's theorem'", "Fermat's theorem"),
    (r'"\u00e9\ud83d\ude00"', "é\N{GRINNING FACE}"), ('"[1, 2]: {"', "[1, 2]: {"), (r'"two\nlines"', r"two\nlines"),
    (r'"two\n lines"', "two lines")])
def test_braces_quotes_and_latex_inside_a_notion_stay_what_they_are(written, notion):
    result = parse_prediction(f'{{"math_notion": [{written}], "pass_rate": 5, "solution_length": 40}}')
    assert result.prediction == MetaPrediction((notion,), 5, 40), result.error


def test_the_last_complete_object_counts():
    last = PLAIN.replace("5", "2")
    assert parse_prediction(PLAIN + last).prediction.pass_rate == 2
    assert parse_prediction(PLAIN + last[:-1]).prediction.pass_rate == 5
    assert parse_prediction(PLAIN + '{"pass_rate": 1}').prediction.pass_rate == 5
    assert parse_prediction(PLAIN + last.replace("2", "9")).prediction is None


@pytest.mark.parametrize("value", ["-1", "9", "0.5", "7.01", "true", "null", "NaN", "Infinity", "1e400", "1e0", '""',
                                   "[5]", "{}", "5/8", "1" * 5000, '"five"', "0x5", "٣"])
def test_a_pass_rate_that_is_no_whole_number_up_to_8_is_refused(value):
    result = parse_prediction(PLAIN.replace("5", value))
    assert result.prediction is None
    assert "pass_rate" in result.error or "breaks off" in result.error or "comma" in result.error


@pytest.mark.parametrize(("value", "accepted"), [
    ("0", True), (str(MAX_SOLUTION_LENGTH), True), (str(MAX_SOLUTION_LENGTH + 1), False), ("-1", False),
    ("40.5", False)])
def test_a_solution_length_has_bounds(value, accepted):
    result = parse_prediction(PLAIN.replace("40", value))
    assert (result.prediction is not None) == accepted
    assert accepted or "solution_length is " in result.error


@pytest.mark.parametrize(("text", "reason"), [
    ("", "no object"), ("I think 5 of 8.", "no object"), ("\\frac{1}{2}", "no object"),
    (PLAIN[:-1], "not closed"), (PLAIN[:30], "breaks off at"),
    ('{"math_notion": [], "pass_rate": 5}', "lacks solution_length"),
    ('{"pass_rate": 5}', "lacks math_notion and solution_length"),
    (PLAIN.replace('"pass_rate":', '"pass_rate"'), "not a colon"),
    (PLAIN.replace(", ", " "), "where a comma"),
    ('{"math_notion": {"a": 1}, "pass_rate": 5, "solution_length": 40}', "not a list of texts"),
    ('{"math_notion": [["a"]], "pass_rate": 5, "solution_length": 40}', "not a list of texts"),
    (PLAIN.replace('"carry"', ",".join(['"a"'] * MAX_NOTIONS)), f"at most {MAX_NOTIONS}"),
    (PLAIN.replace("carry", "a" * (MAX_NOTION_LENGTH + 1)), f"more than {MAX_NOTION_LENGTH} characters"),
    ('{"pass_rate": ' + '{"a": ' * 9, "deep"), ("{" * 9000 + PLAIN[:-1] + "{" * 9000, "No prediction among"),
], ids=lambda text: text[:30])
def test_the_error_says_why(text, reason):
    result = parse_prediction(text)
    assert result.prediction is None
    assert reason in result.error
    assert len(result.error) < 200


NOTION = st.text(st.characters(exclude_characters="\\\"'", exclude_categories=["Cs", "Cc"]), max_size=20)


@given(st.lists(NOTION, max_size=5), st.integers(0, 8), st.integers(0, 10**6), st.sampled_from([None, 2]),
       st.permutations(["math_notion", "pass_rate", "solution_length"]), st.text(max_size=30))
def test_every_prediction_written_as_json_is_read_back(notions, pass_rate, length, indent, order, prose):
    values = {"math_notion": notions, "pass_rate": pass_rate, "solution_length": length}
    text = prose + json.dumps({key: values[key] for key in order}, indent=indent, ensure_ascii=False)
    expected = tuple(clean for notion in notions if (clean := " ".join(notion.split())))
    assert parse_prediction(text).prediction == MetaPrediction(expected, pass_rate, length)


PIECES = st.sampled_from([
    '{"math_notion":', "{'math_notion':", '["', '"]', '",', "'", ":", ",", "[", "]", "{", "}", "\\", "\\u", "\\ud800",
    '"pass_rate":', '"solution_length":', "7", "1e400", " ", "\n", "x", "\ud800"])


@given(st.lists(PIECES | st.text(st.characters(), max_size=5), max_size=60).map("".join), st.booleans())
def test_no_text_raises_and_a_prediction_or_a_reason_comes_back(text, released):
    result = parse_prediction(text, released=released)
    assert (result.prediction is None) == bool(result.error)
    for notion in result.prediction.notions if result.prediction else ():
        notion.encode("utf8")


MEGABYTE = 1_000_000
UNITS = ["{", "}", "{}", '{"', "{'", "{'a' ", '{"a":', '{"a":["', "{'a':['{", '{"math_notion":', '{"math_notion":}',
         "[", "'", '"', "\\", '{"\\', "{ ", "{" + " " * 499, "{'" + "a" * 49, "math_notion:[", "math_notion ",
         "\ud800{", "a,", '{"math_notion":["a","b"],"pass_rate":9,', '["a",' * 3, "1", "\n", '{"a":\'{\'a":"', "' "]


def _turns(count: int) -> float:
    """Processor seconds of so many turns of an empty loop: a yardstick of this machine."""
    begin = time.process_time()
    for _ in range(count):
        pass
    return time.process_time() - begin


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("unit", UNITS, ids=repr)
@pytest.mark.parametrize("start", ["", '{"math_notion":'])
def test_a_megabyte_of_hostile_text_takes_less_than_three_turns_of_a_loop_a_character(start, unit, released):
    text = start + (unit * (MEGABYTE // len(unit) + 1))[:MEGABYTE]
    ratios = []
    for _ in range(3):
        begin = time.process_time()
        parse_prediction(text, released=released)
        ratios.append((time.process_time() - begin) / _turns(MEGABYTE))
        if ratios[-1] < 3:
            return
    pytest.fail(f"{min(ratios):.1f}")


def test_the_released_parser_takes_compact_json_that_begins_with_math_notion_and_nothing_else():
    assert parse_prediction(PLAIN, released=True).prediction == EXPECTED
    assert parse_prediction("x " + PLAIN + PLAIN.replace("5", "2"), released=True).prediction.pass_rate == 2
    for refused in (PLAIN.replace("{", "{ "), PLAIN.replace("carry", "{x}"), PLAIN.replace('"', "'"),
                    PLAIN.replace("0}", "0,}"), '{"pass_rate": 5, "math_notion": [], "solution_length": 40}', ""):
        result = parse_prediction(refused, released=True)
        assert result.prediction is None
        assert "released" in result.error


@pytest.mark.parametrize(("text", "prediction"), [
    ('{"math_notion": "a, [b]", "pass_rate": 5}', MetaPrediction(("a", "b"), 5, None)),
    ('{"math_notion": ["a", 5], "pass_rate": true}', MetaPrediction((), 1, None)),
    ('{"math_notion": ["a"], "pass_rate": 0.5, "solution_length": "9"}', MetaPrediction(("a",), None, None)),
    ('{"math_notion": [], "pass_rate": -3, "solution_length": 50}', MetaPrediction((), -3, 50)),
    ("math_notion : ['a', b], pass_rate: 5, solution_length: 50", MetaPrediction(("a", "b"), None, None)),
])
def test_the_released_parser_keeps_every_part_that_the_released_reward_pays_for(text, prediction):
    assert parse_prediction(text, released=True).prediction == prediction
