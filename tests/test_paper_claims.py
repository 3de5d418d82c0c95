"""The paper's claims: computed again as claims.csv says; and what the released code's departures change."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest

from masa_lib import DATA
from masa_lib.analysis.compare import PAPER
from masa_lib.config import RewardConfig
from masa_lib.lessons import exercises, paper_claims, released_rewards
from masa_lib.lessons.reward_table import RewardTable, score_table
from masa_lib.lessons.widgets import claim_table
from masa_lib.runs.folder import Run

BASELINE = DATA / "runs" / "baseline"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_claims_computed_again_are_those_of_the_table(version: str) -> None:
    table, found = paper_claims.table(version), paper_claims.recompute(version)
    assert set(found.index) <= set(table.index)
    for claim, value in found.items():
        number = re.search(r"[-+]?\d+\.?(\d*)", table.loc[claim, "recomputed_value"])
        assert value == pytest.approx(float(number[0]), abs=10.0 ** -len(number[1])), claim  # rounded, or cut


def test_every_claim_is_in_one_version_and_has_a_verdict() -> None:
    tables = [paper_claims.table(version) for version in ("v1", "v2")]
    assert sum(map(len, tables)) == len(pd.read_csv(PAPER / "claims.csv"))
    for table in tables:
        assert table.index.is_unique
        assert set(table["verdict"]) == set(paper_claims.VERDICTS)
    assert set(paper_claims.HEADLINES.values()) <= set(tables[0].index)


def test_the_curves_of_figure_4_give_the_recorded_ratios_and_shares() -> None:
    found = {panel: paper_claims.budget_curve(panel) for panel in "abc"}
    assert [round(paper_claims.speed_up(curve), 2) for curve in found.values()] == [1.36, 1.14, 1.25]
    assert [math.floor(paper_claims.share_below(curve) + 0.1) for curve in found.values()] == [0, 55, 43]


def test_a_speed_up_is_read_off_straight_lines() -> None:
    curve = pd.DataFrame({"method": ["GRPO"] * 2 + ["MASA-efficient"] * 3, "cost": [0, 100, 0, 40, 80],
                          "accuracy": [0.0, 0.3, 0.0, 0.2, 0.4]})
    assert paper_claims.speed_up(curve) == pytest.approx(100 / 60)
    assert paper_claims.share_below(curve) == 0.0


def test_scores_leave_out_averages_and_name_variants() -> None:
    assert list(paper_claims.scores("v1", "Table 1", "Qwen3-8B-Base").columns) == ["GRPO", "MASA"]
    assert len(paper_claims.scores("v1", "Table 2", "Qwen3-14B-Base")) == 13
    columns = list(paper_claims.scores("v2", "Table 5", "Qwen3-8B-Base").columns)
    assert columns == ["GRPO", "GRPO, NF", "MAPR", "MAPR, NF"]
    assert paper_claims.scores("v1", "Table 1", "Qwen3-8B-Base", "pass@32").notna().all(axis=None)


def test_the_exercises_of_notebook_08_have_the_answers_that_the_tables_give() -> None:
    maths, other, small = (paper_claims.scores(*place) for place in (
        ("v1", "Table 1", "Qwen3-8B-Base"), ("v1", "Table 2", "Qwen3-14B-Base"), ("v2", "Table 1", "Qwen3-4B-Base")))
    found = {"gain in points": maths.loc["AIME25", "MASA"] - maths.loc["AIME25", "GRPO"],
             "mean of gains": paper_claims.gain(other["MASA"], other["GRPO"]).mean(),
             "average of 4B": paper_claims.gain(*small[["MAPR", "GRPO"]].mean())}
    for exercise, value in found.items():
        assert exercises.check(exercise, value) == f"{exercise}: right."


def test_answers_are_folded_and_texts_are_escaped() -> None:
    row = {"claim": "a < b", "where_printed": "v1 <b>", "printed_value": "1 & 2", "recomputed_value": "<script>",
           "how_recomputed": "so", "verdict": "consistent"}
    page = paper_claims.as_table(pd.DataFrame([row]))
    summary, answer = page.split("</summary>")
    assert "<script>" not in page
    assert "a &lt; b" in summary
    assert "1 &amp; 2" in summary
    assert "consistent" not in summary
    assert "consistent" in answer
    assert "<details><summary>" in page  # closed: no attribute `open`


def test_claims_are_chosen_by_version_verdict_and_words() -> None:
    claims = paper_claims.everything()
    assert len(paper_claims.chosen(claims)) == len(claims) == len(pd.read_csv(PAPER / "claims.csv"))
    found = paper_claims.chosen(claims, "v1", "inconsistent", "GATED Figure")
    assert set(found["version"]) == {"v1"}
    assert set(found["verdict"]) == {"inconsistent"}
    assert 0 < len(found) < 13
    assert found.astype(str).agg(" ".join, axis=1).str.lower().str.contains("gated").all()
    assert paper_claims.chosen(claims, words="no such word").empty


def test_the_filter_shows_what_it_counts_and_comes_back_to_all() -> None:
    claims = paper_claims.everything()
    panel = claim_table.ClaimTable(claims)
    assert panel.count.value.count(f"{len(claims)} of {len(claims)} claims") == 1
    panel.verdict.value, panel.version.value = "not derivable", "v2"
    shown = paper_claims.chosen(claims, "v2", "not derivable")
    assert f"{len(shown)} of {len(claims)} claims" in panel.count.value
    assert panel.page.value.count("<tr>") == len(shown) + 1
    panel.words.value = "no such word"
    assert "0 of" in panel.count.value
    panel.reset()
    assert panel.page.value.count("<tr>") == len(claims) + 1
    assert [control.description for control in (panel.version, panel.verdict, panel.words)] == ["version", "verdict",
                                                                                               "words"]


def test_without_widgets_all_claims_are_there_folded() -> None:
    claims = paper_claims.everything()
    page = claim_table.ClaimTable(claims).static().data
    assert page.count("<tr>") == len(claims) + 1
    assert page.startswith("<details><summary>")


def test_verdicts_are_compared_and_wrong_words_are_refused() -> None:
    table = paper_claims.table("v1")
    mine = dict.fromkeys(paper_claims.HEADLINES.values(), "consistent") | {paper_claims.HEADLINES["GPQA"]: ""}
    found = paper_claims.judged(mine, table)["agree"]
    assert [found[paper_claims.HEADLINES[name]] for name in paper_claims.HEADLINES] == [True, True, None, False, False]
    with pytest.raises(ValueError, match="'yes' is no verdict; write one of consistent, inconsistent"):
        paper_claims.judged({paper_claims.HEADLINES["GPQA"]: "yes"}, table)
    with pytest.raises(ValueError, match="There is no claim 'nothing'"):
        paper_claims.judged({"nothing": ""}, table)


@pytest.fixture(scope="module")
def recorded() -> tuple[RewardTable, pd.Series]:
    """The predictions of one recorded run, and the group of each."""
    rollouts, table = released_rewards.read([BASELINE / "masa-s0"])
    return table, rollouts.loc[table.index, "group"]


def test_recorded_runs_are_read_with_groups_of_their_own() -> None:
    folders = [BASELINE / f"masa-s{seed}" for seed in (0, 1)]
    rollouts, table = released_rewards.read(folders)
    settings = Run.open(folders[0]).config.sampling
    sizes = rollouts.groupby(["group", "stream"]).size().unstack()
    assert (sizes["solution"] == settings.solutions).all()
    assert (sizes["meta"] == settings.predictions).all()
    assert len(table.index) == (rollouts["stream"] == "meta").sum()
    # The rewards of this mode were recorded when the predictions were made.
    ours = score_table(table, Run.open(folders[0]).config.reward)["reward"]
    assert (ours - rollouts.loc[table.index, "reward"]).abs().max() < 1e-9


def test_a_payment_changes_only_the_part_that_its_departure_is_about(recorded: tuple[RewardTable, pd.Series]) -> None:
    table, _ = recorded
    paid = released_rewards.payments(table)
    pd.testing.assert_frame_equal(paid["published"], score_table(table, RewardConfig()))
    pd.testing.assert_frame_equal(paid["released"], score_table(table, RewardConfig(mode="released")))
    for name, parts in {"open window": ["reward_difficulty", "reward_notion"],
                        "matching": ["reward_difficulty", "reward_length"]}.items():
        pd.testing.assert_frame_equal(paid[name][parts], paid["published"][parts])
    assert (paid["parser"] <= paid["published"] + 1e-12).all(axis=None)
    assert (paid["parser"].loc[~table.counts["released"].parsed_N, "reward"] == 0).all()


def test_an_open_window_never_pays_where_all_right_solutions_have_one_length(
        recorded: tuple[RewardTable, pd.Series]) -> None:
    table, _ = recorded
    one = table.shortest_N == table.longest_N
    paid = released_rewards.payments(table)
    assert one.sum() > 50
    assert (paid["open window"].loc[one, "reward_length"] == 0).all()
    assert (paid["released"].loc[one, "reward_length"] == 0).all()
    assert (paid["published"].loc[one, "reward_length"] > 0).any()


def test_the_same_payment_changes_nothing(recorded: tuple[RewardTable, pd.Series]) -> None:
    table, groups = recorded
    rewards = released_rewards.payments(table)["published"]["reward"]
    found = released_rewards.compare(rewards, rewards, groups)
    assert found["changed"] == found["turned"] == found["other_winner"] == 0
    assert found["mean_reward"] == pytest.approx(rewards.mean())


def test_two_payments_are_compared_group_by_group() -> None:
    before, after = pd.Series([1.0, 0, 0, 1, 0.5, 0.5]), pd.Series([0.0, 1, 0, 1, 0.5, 0.5])
    found = released_rewards.compare(before, after, pd.Series([0, 0, 1, 1, 2, 2]))
    assert found == pytest.approx({"mean_reward": 0.5, "changed": 1 / 3, "turned": 1 / 3, "other_winner": 1 / 3,
                                   "no_signal": 1 / 3})
