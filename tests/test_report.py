"""The comparison as text, JSON and page."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from synthetic import STEPS, write_run

from masa_lib import config as configs
from masa_lib.analysis import compare, report, sentences
from masa_lib.analysis.records import AnalysisError
from masa_lib.analysis.sentences import show
from masa_lib.runs.folder import Run

BASELINE = Path(__file__).resolve().parent.parent / "data" / "runs" / "baseline"
LINE = {0: 0.1, 10: 0.3, STEPS: 0.5}


def study(folder: Path, masa: dict[int, float], seeds: int = 2, **more: int) -> Path:
    for seed in range(seeds):
        write_run(folder / f"grpo-s{seed}", "grpo", seed, {step: value + 0.001 * seed for step, value in LINE.items()})
        write_run(folder / f"masa-s{seed}", "masa", seed, masa, **more)
    return folder


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("worse"), {0: 0.1, 10: 0.25, STEPS: 0.48})


@pytest.fixture(scope="module")
def page(worse: Path) -> str:
    report.compare([worse], worse / "pages" / "report.html")
    return (worse / "pages" / "report.html").read_text(encoding="utf8")


def parsed(page: str) -> BeautifulSoup:
    return BeautifulSoup(page, "html.parser")


def test_the_text_is_an_aligned_table_and_sentences(worse: Path) -> None:
    table = report.compare([worse]).split("\n\n")[0].splitlines()
    assert table[0].split() == ["grpo", "masa"]
    starts = {(line.index(cells[1]), line.rindex(cells[2])) for line in table[1:]
              if len(cells := re.split(r" {2,}", line.strip())) == 3 and cells[1] != cells[2]}
    assert starts == {(table[0].index("grpo"), table[0].index("masa"))}
    assert "accuracy, final" in report.compare([worse])


def test_masa_below_grpo_is_said(worse: Path) -> None:
    text = " ".join(report.compare([worse]).split())
    assert "Its accuracy is not above that of grpo: difference -0.02" in text


def test_masa_above_grpo_in_every_seed_is_said(tmp_path: Path) -> None:
    text = " ".join(report.compare([study(tmp_path, {0: 0.1, 10: 0.4, STEPS: 0.61})]).split())
    assert "Its accuracy is above that of grpo: difference +0.1" in text
    assert "masa: at equal accuracy grpo writes" in text and "in tokens written masa is" in text
    assert "To the target alone it is" in text


def test_one_seed_shows_nothing_about_the_difference(tmp_path: Path) -> None:
    text = " ".join(report.compare([study(tmp_path, {0: 0.1, STEPS: 0.6}, seeds=1)]).split())
    assert "not shown to be above that of grpo: difference +0.100, one seed alone." in text


def test_unequal_updates_are_warned_of_in_text_and_page(tmp_path: Path) -> None:
    text = report.compare([study(tmp_path, LINE, updates=2)], tmp_path / "report.html")
    assert "Warning: The runs took different numbers of optimiser updates" in text
    assert 'class="warning">The runs took' in (tmp_path / "report.html").read_text(encoding="utf8")


def test_json_is_the_summary_alone(worse: Path) -> None:
    assert json.loads(report.compare([worse], as_json=True)) == compare.compare_runs(worse).summary


def test_the_page_is_small_and_loads_nothing(page: str) -> None:
    assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=(?!"data:)""", page)
    assert "plotly" not in page and not re.search(r"url\((?!#)", page)
    assert len(page.encode()) < 1_500_000


def test_the_page_begins_with_what_the_terminal_ends_with(page: str, worse: Path) -> None:
    told = report.compare([worse]).partition("In short:\n")[2]
    assert " ".join(told.split()) == " ".join(parsed(page).body.find_all("p")[n].text for n in range(3))


def test_arms_with_several_numbers_of_seeds_are_said_to_have_from_the_least_to_the_most(worse: Path) -> None:
    comparison = compare.compare_runs(worse)
    methods = comparison.summary["methods"]
    fewer = dataclasses.replace(comparison, summary=comparison.summary | {
        "methods": methods | {"masa": methods["masa"] | {"seeds": 1}}})
    assert sentences.in_short(fewer)[0].endswith("with 1 to 2 seeds.")


def test_three_sentences_say_what_was_trained_what_was_learned_and_what_it_cost(worse: Path) -> None:
    trained, learned, paid = sentences.in_short(compare.compare_runs(worse))
    assert trained == "grpo and masa were trained from the model pocket, 20 steps each with 2 seeds."
    assert re.fullmatch(
        r"On 24 problems that it never trained on, the pass rates that masa predicts and those that come true "
        r"correlate with r = -?0\.\d\d before and 0\.98 after training \(.*\); those of grpo end at 0\.99\.", learned)
    assert paid == ("masa cost 3,000 tokens written, 600 read, 1,600 through the update and 40 seconds, and its "
                    "accuracy went from 0.10 to 0.48; grpo cost 2,000 tokens written, 600 read, 1,600 through the "
                    "update and 40 seconds, and ends at 0.50.")


def test_in_short_nothing_is_compared_where_there_is_one_arm_and_busy_seconds_are_called_so(tmp_path: Path) -> None:
    write_run(tmp_path / "alone", "masa-read", 0, LINE, aware=0.0, more=lambda step: {"cores_others": 1.0})
    trained, learned, paid = sentences.in_short(compare.compare_runs(tmp_path))
    assert trained == "masa-read was trained from the model pocket, 20 steps with the seed 0."
    assert "grpo" not in learned + paid and paid.endswith("(other work ran beside, so seconds do not compare).")


def test_the_page_shows_two_figures_and_four_numbers_and_folds_the_rest(page: str) -> None:
    soup = parsed(page)
    assert [number.text for number in soup.select(".numbers .value")] == ["0.48", "0.98", "3,000", "40"]
    alike, costs = (head.text for head in soup.select("section h2"))
    assert alike == "What masa predicts of itself, and what comes true, before and after training"
    assert re.fullmatch(r"Held-out accuracy by tokens \(dotted: grpo's target 0\.\d{3}\)", costs)
    titles = [fold.text for fold in soup.select("details summary")]
    assert len(titles) == len(set(titles)) and titles[-2:] == ["Every measure of every arm", "Settings"]
    assert all(fold.select_one("svg, table") for fold in soup.select("details"))


def test_the_settings_of_the_page_are_those_of_each_arm_the_different_ones_first(page: str) -> None:
    rows = [[cell.text for cell in row.select("th, td")] for row in parsed(page).select("details:last-of-type tr")]
    assert rows[:2] == [["setting", "grpo", "masa"], ["method", "grpo", "masa"]]
    assert ["steps", "20", "20"] in rows and len(rows) == len(configs.settings()) + 1


def test_the_page_links_to_notebooks_that_are_there(page: str, worse: Path) -> None:
    links = [link["href"] for link in parsed(page).select("li a")]
    assert links and all((worse / "pages" / link).resolve().is_file() for link in links)


def test_the_page_has_every_figure_with_a_sentence(page: str) -> None:
    figures = [figure.find_next_sibling("p") for figure in parsed(page).select(".plot")]
    assert len(figures) == 13 and all(said.text for said in figures)
    for title in ("Held-out accuracy by training step", "Held-out accuracy by tokens", "Accuracy by level", "Pass@k",
                  "Tokens by stream", "Seconds by phase", "Predicted against actual pass rate",
                  "Predicted against actual length", "Rewards by part", "Alignment of the predictions",
                  "Where the tokens to the target went", "Calibration of the predicted pass rate"):
        assert f">{title}" in page


def test_sentences_are_computed_from_the_runs(page: str) -> None:
    assert "masa: 3,000 tokens in a run, 67% solutions, 33% predictions." in page
    assert "grpo: 50% of the time is sampling." in page
    assert re.search(r"masa, first and last tenth of the steps: solution 0\.0[78] &rarr; 0\.9[78], difficulty", page)


def test_the_page_of_grpo_alone_has_no_alignment(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>", "grpo", 0, LINE, samples=4)
    comparison = compare.compare_runs(run.path)
    drawn = [figure.layout.title.text for figure, _ in report.sections(comparison)]
    assert not any("Alignment" in title for title in drawn)
    assert show(comparison.summary["methods"]["grpo"]["pass_at_32_base"]) == "-"


def test_runs_that_never_solve_anything_have_a_page(tmp_path: Path) -> None:
    for method in ("grpo", "masa"):
        write_run(tmp_path / f"{method}-s0", method, 0, {0: -1.0, STEPS: -1.0}, samples=2)
    assert "not gained accuracy, so there is no target" in report.compare([tmp_path], tmp_path / "report.html")
    assert "undefined" in (tmp_path / "report.html").read_text(encoding="utf8")


def test_names_of_arms_are_escaped(tmp_path: Path) -> None:
    write_run(tmp_path / "<b>-s0", "masa", 0, LINE)
    report.compare([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert "&lt;b&gt;" in page
    assert parsed(page).select("b") == []
    drawn = "".join(figure.to_json() for figure, _ in report.sections(compare.compare_runs(tmp_path)))
    assert "&lt;b&gt;" in drawn and "<b>" not in drawn.replace("\\u003c", "<").replace("\\u003e", ">")


def rivals(folder: Path, **curves: dict[int, float]) -> Path:
    """Two seeds of grpo, and of the arms named."""
    for arm, curve in ({"grpo": LINE} | curves).items():
        for seed in range(2):
            write_run(folder / f"{arm.replace('_', '-')}-s{seed}", arm.replace("_", "-"), seed, {
                step: value + 0.001 * seed for step, value in curve.items()}, more=lambda step, arm=arm: {
                    "gate_on": 1, "gate_precision": 0.93, "gate_recall": 0.6, "signal_lost": 0.05, "dropped": 0.4,
                    "cap_on": int(step > 10), "stopped": 0.1, "right_cut": 0.01,
                    "predictions_collapsed": 0} if arm == "masa_efficient" else {})
    return folder


FAST, SLOW = {0: 0.1, 5: 0.5, STEPS: 0.6}, {0: 0.1, STEPS: 0.3}


def test_rivals_that_beat_masa_efficient_are_named(tmp_path: Path) -> None:
    folder = rivals(tmp_path, masa_efficient=LINE, mopps=FAST, dapo=SLOW, oracle=FAST)
    text = " ".join(report.compare([folder], folder / "report.html").split())
    said = re.search(r"masa-efficient is beaten\. (.*?)\.(?= [A-Z]|$)", text)[0]
    assert re.search(r"mopps needs fewer tokens at equal accuracy: masa-efficient spends \d\.\d\d", text)
    assert "oracle (privileged) needs fewer tokens" in text
    assert "grpo needs fewer tokens" in text  # it has no predictions to pay
    assert "dapo" not in said
    assert "masa-efficient is beaten." in (folder / "report.html").read_text(encoding="utf8")


def test_a_rival_that_may_be_cheaper_by_chance_is_said_to_be(tmp_path: Path) -> None:
    folder = rivals(tmp_path, masa_efficient=FAST)
    for seed, curve in enumerate(({0: 0.1, 2: 0.6, STEPS: 0.6}, LINE)):
        write_run(folder / f"mopps-s{seed}", "mopps", seed, curve)
    text = " ".join(report.compare([folder], folder / "report.html").split())
    assert re.search(r"masa-efficient may be beaten\. mopps [^;]* \[0\.\d+, [^;]*can be chance\.", text)


def test_that_nothing_beats_masa_efficient_is_said(tmp_path: Path) -> None:
    text = " ".join(report.compare([rivals(tmp_path, masa_efficient=FAST, mopps=LINE)]).split())
    assert "No arm needs fewer tokens at equal accuracy than masa-efficient." in text


def test_a_rival_that_reaches_the_target_more_often_is_named(tmp_path: Path) -> None:
    text = report.compare([rivals(tmp_path, masa_efficient={0: 0.1, STEPS: 0.2}, mopps=LINE)])
    assert "mopps reaches the target in more of its seeds" in " ".join(text.split())


def test_gate_and_cap_are_told_with_what_rechecks_say(tmp_path: Path) -> None:
    text = " ".join(report.compare([rivals(tmp_path, masa_efficient=FAST)], tmp_path / "report.html").split())
    assert ("masa-efficient: the gate acts in 100% of the steps, first in step 1, goes off again 0.0 times, and drops "
            "0.40 [0.40, 0.40] of the candidates; by re-checks, precision 0.93 [0.93, 0.93], recall 0.60 [0.60, 0.60], "
            "signal lost 0.05 [0.05, 0.05]; the cap acts in 50% of the steps") in text
    assert "predictions are collapsed in 0% of the steps." in text
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert "<summary>Gate and cap over training" in page
    assert "where grpo spends 100 tokens to the target it spends" in page


def test_a_gate_that_never_acts_is_told_of(tmp_path: Path) -> None:
    write_run(tmp_path / "masa-efficient-s0", "masa-efficient", 0, LINE, more=lambda step: {
        "gate_on": 0, "cap_on": 0, "predictions_collapsed": 1, "gate_precision": 0.4})
    text = " ".join(report.compare([tmp_path]).split())
    assert "masa-efficient: the gate never acts; predictions are collapsed in 100% of the steps." in text


def test_many_arms_stand_in_blocks_and_privileged_ones_are_marked(tmp_path: Path) -> None:
    folder = rivals(tmp_path, masa=FAST, masa_efficient=FAST, mopps=LINE, level_table=LINE)
    first, second = report.compare([folder]).split("\n\n")[:2]
    assert first.split("\n")[0].split() == ["grpo", "masa", "masa-efficient", "mopps"]
    assert second.split("\n")[0].split() == ["level-table", "(privileged)"]
    assert [line.split("  ")[0] for line in first.split("\n")] == [line.split("  ")[0] for line in second.split("\n")]


def test_what_was_paid_for_the_predictions_is_said(tmp_path: Path) -> None:
    page = report.compare([rivals(tmp_path, masa=LINE)], tmp_path / "report.html") and (
        tmp_path / "report.html").read_text(encoding="utf8")
    assert re.search(r"masa: expected calibration error .*? A peaked kernel paid for its predictions", page)
    assert re.search(r"grpo: expected calibration error [^<]*Nothing paid for its predictions", page)


def test_the_recorded_baseline_has_a_page(tmp_path: Path) -> None:
    text = " ".join(report.compare([BASELINE], tmp_path / "report.html").split())
    assert "10 of 10 runs do not show that they had the machine to themselves" in text
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert "rises towards the true one in" in page
    assert "Gate and cap" not in page


def test_a_ratio_that_is_a_bound_is_marked_and_told(tmp_path: Path) -> None:
    text = " ".join(report.compare([study(tmp_path, {0: 0.1, STEPS: 0.4})]).split())
    assert re.search(r"tokens at equal accuracy, ratio 1\.00 \[1\.00, 1\.00\] <= 0\.", text)
    assert re.search(r"at equal accuracy grpo writes at most 0\.\d\d", text)


@pytest.mark.parametrize(("missed", "verdict"), [(0.0, "cheaper"), (0.1, "cheaper"), (0.5, "not shown to differ")])
def test_an_arm_is_cheaper_only_if_what_it_never_reached_cannot_undo_it(missed: float, verdict: str) -> None:
    assert sentences.verdict({"mean": 1.3, "low": 1.2, "high": 1.4}, missed) == verdict
    assert sentences.verdict({"mean": 0.8, "low": 0.7, "high": 0.9}, missed) == "dearer"


def test_the_settings_in_which_arms_differ_are_said_in_text_and_page(tmp_path: Path) -> None:
    for arm, rate in (("grpo", 1e-5), ("warm", 1e-4), ("hot", 1e-3)):
        run = write_run(tmp_path / f"{arm}-s0", "grpo", 0, LINE)
        configs.save(configs.replace(run.config, {"update.learning_rate": rate}), run.path / "config.toml")
    said = "Settings that differ: update.learning_rate is 0.001 in hot, 0.0001 in warm, 1e-05 in the others."
    assert said in " ".join(report.compare([tmp_path], tmp_path / "report.html").split())
    assert said in (tmp_path / "report.html").read_text(encoding="utf8")


@pytest.mark.parametrize("name", ["x.pdf", "x", "x.png"])
def test_a_page_of_another_kind_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(AnalysisError, match=r"is HTML and cannot be .*ends in \.html"):
        report.compare([tmp_path / "nothing"], tmp_path / name)


@pytest.mark.parametrize(("value", "text"), [
    (None, "-"), (0.5, "0.500"), ({"before": None, "after": 0.25}, "- -> 0.250"),
    ({"mean": 0.5, "low": None, "high": None}, "0.500"),
    ({"mean": 0.5, "low": 0.4, "high": 0.6}, "0.500 [0.400, 0.600]"),
    ({"shown": 3, "measured": 5, "fall": None}, "3 of 5"), ({"shown": 0, "measured": 0}, "-"),
    ({"before": {"mean": 0.5, "low": 0.4, "high": 0.6}, "after": 0.1}, "0.500 [0.400, 0.600] -> 0.100")])
def test_values_are_shown_with_what_is_known(value: object, text: str) -> None:
    assert show(value) == text


#: the script that writes what the records say into the texts
WRITER = runpy.run_path(str(BASELINE.parents[2] / "studies" / "readme.py"))


@pytest.mark.parametrize("name", WRITER["TEXTS"])
def test_the_texts_say_what_the_records_do(name: str) -> None:
    """To write it into them: `python studies/readme.py`."""
    text = (BASELINE.parents[2] / name).read_text(encoding="utf8")
    assert WRITER["filled"](text) == text
    assert "<!-- records: " in text


def test_what_is_written_into_a_text_is_what_stood_between_its_markers() -> None:
    text = "x <!--trl.pocket-->9<!--/--> y\n<!-- records: memory -->\nold\n<!-- end of records -->\n<!-- note -->\n"
    filled = WRITER["filled"](text)
    assert re.fullmatch(r"x <!--trl.pocket-->\d\.\d<!--/--> y\n<!-- records: memory -->\n\|.*\|\n"
                        r"<!-- end of records -->\n<!-- note -->\n", filled, re.DOTALL)
    assert WRITER["filled"](filled) == filled
    with pytest.raises(KeyError, match="unheard"):
        WRITER["filled"]("<!--trl.unheard-->9<!--/-->")


def test_a_study_without_records_leaves_its_place_empty() -> None:
    assert WRITER["table"]([WRITER["Column"](("unheard",))], ["seeds"]) == ""


def test_the_moving_figure_is_that_of_the_recorded_run() -> None:
    """To write it: `python studies/readme.py --picture`."""
    drawer = runpy.run_path(str(BASELINE.parents[2] / "studies" / "picture.py"))
    drawn, run = drawer["animation"](), Run.open(BASELINE.parent / drawer["PICTURED"])
    assert drawer["PLACE"].read_text(encoding="utf8") == drawn
    soup, known = parsed(drawn), run.evaluations()
    assert len(soup.select(".d circle")) == len(run.evaluation_table(0))
    assert [text.text.rpartition("= ")[2] for text in soup.select(".at text:first-child")] == [
        f"{r:.2f}" for r in known["pass_rate_r"]]
