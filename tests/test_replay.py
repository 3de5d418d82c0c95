"""Replay of recorded groups: the same numbers as a loop over them with the gate and cap that trainings use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import rollout_table, write_run

from masa_lib import config as configs
from masa_lib.gates import masa
from masa_lib.lessons import replay, replay_report
from masa_lib.lessons.replay import Groups
from masa_lib.method import gating
from masa_lib.runs.folder import Run

RECORDED = Path(__file__).resolve().parent.parent / "data" / "runs" / "baseline" / "masa-s0"
STEPS = (1, 5, 10, 15, 20, 25)


def recorded(folder: Path, method: str = "masa", steps: tuple[int, ...] = STEPS, **more: float) -> Run:
    run = write_run(folder, method, 0, {0: 0.1, 20: 0.5})
    for step in steps:
        run.write_rollouts(step, rollout_table(step, **more))
    return run


@pytest.fixture(scope="module")
def knows(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded(tmp_path_factory.mktemp("replay") / "masa-s0", aware=0.8, groups=24)


@pytest.fixture(scope="module")
def groups(knows: Run) -> Groups:
    return replay.read_groups(knows.path)


def known(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values[np.isfinite(values)])


def phase(table: pd.DataFrame, name: str = "all") -> pd.DataFrame:
    return table[table["phase"] == name]


def test_groups_are_those_that_the_run_recorded(knows: Run, groups: Groups) -> None:
    table = knows.rollouts([10])
    here = groups.steps_P == 10
    solved, meta = (table[table["stream"] == stream] for stream in ("solution", "meta"))
    assert groups.lengths_PG[here].ravel().tolist() == solved["length"].tolist()
    assert groups.right_PG[here].ravel().tolist() == solved["correct"].tolist()
    assert groups.meta_PM[here].ravel().tolist() == meta["length"].tolist()
    rates = (meta["predicted_pass_rate"].astype(float) / 8).to_numpy()
    np.testing.assert_array_equal(groups.rates_PM[here].ravel(), rates)
    assert groups.phases_FP.sum(axis=1).tolist() == [48, 48, 48, 144]


@pytest.mark.parametrize(("rule", "threshold"), [("signal", 0.2), ("signal", 0.9), ("v1", 0.1), ("v2", 0.1)])
def test_a_gate_drops_what_the_training_would(groups: Groups, rule: str, threshold: float) -> None:
    config = configs.replace(configs.Config(), {"gate.rule": rule} | (
        {"gate.threshold": threshold} if rule == "signal" else {}))
    dropped = np.array([not masa.admits(known(rates), config) for rates in groups.rates_PM])
    flat = np.array([right.all() or not right.any() for right in groups.right_PG])
    tokens, meta = groups.lengths_PG.sum(axis=1), groups.meta_PM.sum()
    row = phase(replay.gate_curve(groups, rule, [threshold], recheck=0.25)).iloc[0]
    saved = (0.75 * tokens[dropped].sum() - meta) / tokens.sum()
    lost = 0.75 * (dropped & ~flat).sum() / (~flat).sum()
    assert 0 < dropped.sum() < len(dropped)
    assert row["groups_dropped"] == dropped.sum()
    assert row["precision"] == pytest.approx(flat[dropped].mean())
    assert row["recall"] == pytest.approx(dropped[flat].mean())
    assert row["f1"] == pytest.approx(2 / (1 / row["precision"] + 1 / row["recall"]))
    assert (row["tokens_saved"], row["signal_lost"]) == pytest.approx((saved, lost))
    assert row["gain"] == pytest.approx((1 - lost) / (1 - saved))


@pytest.mark.parametrize("aggregate", replay.AGGREGATES)
@pytest.mark.parametrize("multiplier", [0.5, 0.9, 1.5])
def test_a_cap_stops_what_the_training_would(groups: Groups, aggregate: str, multiplier: float) -> None:
    config = configs.replace(configs.Config(), {"cap.aggregate": aggregate, "cap.multiplier": multiplier})
    caps = np.array([gating.cap(tuple(map(int, known(lengths))), config) for lengths in groups.predicted_PM])[:, None]
    over, right = groups.lengths_PG > caps, groups.right_PG
    still = right & ~over
    row = phase(replay.cap_curve(groups, aggregate, [multiplier])).iloc[0]
    assert row["right_cut"] == pytest.approx(over[right].mean())
    assert row["stopped"] == pytest.approx(over.mean())
    assert row["tokens_saved"] == pytest.approx((groups.lengths_PG - caps).clip(0).sum() / groups.lengths_PG.sum())
    signal = groups.signal_P
    assert row["signal_lost"] == pytest.approx(1 - (still.any(axis=1) & ~still.all(axis=1))[signal].mean())


def test_a_smaller_m_is_the_mean_over_random_subsets(groups: Groups) -> None:
    one = phase(replay.gate_curve(groups, "signal", [0.5], predictions=1, draws=2000)).iloc[0]
    scores = masa.rule_scores(groups.rates_PM[..., None], "signal", 8)  # each prediction alone
    assert one["groups_dropped"] == pytest.approx((scores < 0.5).mean(axis=1).sum(), rel=0.01)
    assert one["meta_share"] == pytest.approx(groups.meta_PM.mean() * len(groups.steps_P) / groups.lengths_PG.sum())


def test_predictions_with_a_shared_beginning_cost_it_once(groups: Groups) -> None:
    shared = dataclasses.replace(groups, config=configs.replace(groups.config, {"sampling.shared_beginning": True}))
    np.testing.assert_allclose(shared.meta_tokens(1), groups.meta_PM[:, 0])
    np.testing.assert_allclose(shared.meta_tokens(8), groups.meta_PM.sum(axis=1))
    np.testing.assert_allclose(shared.meta_tokens(2), groups.meta_PM[:, 0] + groups.meta_PM[:, 1:].mean(axis=1))


def test_subsets_repeat_and_have_no_prediction_twice(groups: Groups) -> None:
    numbers = np.broadcast_to(np.arange(8.0), groups.rates_PM.shape)
    three = replay.draw(groups, numbers, 3, draws=5)
    assert three.shape == (5, 144, 3)
    assert (np.diff(np.sort(three, axis=-1), axis=-1) > 0).all()
    assert (three == replay.draw(groups, numbers, 5, draws=5)[..., :3]).all()
    assert not (three[0] == three[1]).all()


@pytest.mark.parametrize("count", [0, 9])
def test_more_predictions_than_recorded_are_refused(groups: Groups, count: int) -> None:
    with pytest.raises(replay.ReplayError, match=f"has 8 predictions a problem; ask for 1 to 8, not {count}"):
        replay.draw(groups, groups.rates_PM, count)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0, 1), st.sampled_from(["signal", "v1", "v2"]))
def test_more_is_dropped_at_a_higher_threshold_and_shares_stay_shares(seed: int, predictions: int, recheck: float,
                                                                      rule: str) -> None:
    rng = np.random.default_rng(seed)
    rates, right = rng.integers(0, 9, (20, 6)) / 8, rng.random((20, 8)) < rng.random((20, 1))
    made = Groups(configs.Config(), np.repeat(np.arange(4), 5), rates, 10 * rates, np.ones((20, 6)), right,
                  np.full((20, 8), 10.0))
    table = replay.gate_curve(made, rule, predictions=predictions, recheck=recheck)
    for _, part in table.groupby("phase"):
        assert (np.diff(part["dropped"]) >= -1e-12).all()
        assert part[["dropped", "precision", "recall", "signal_lost"]].fillna(0.5).map(
            lambda share: -1e-9 <= share <= 1 + 1e-9).all(axis=None)
        assert (part["tokens_saved"] <= part["dropped"] * (1 - recheck) - part["meta_share"] + 1e-9).all()


def test_what_nothing_was_predicted_of_is_admitted_and_uncapped(groups: Groups) -> None:
    silent = dataclasses.replace(groups, rates_PM=np.full_like(groups.rates_PM, np.nan),
                                 predicted_PM=np.full_like(groups.predicted_PM, np.nan))
    assert not replay.every_gate(silent)["dropped"].any()
    assert not replay.every_cap(silent)["stopped"].any()
    assert replay.recommend(replay.every_gate(silent), "all") is None


def test_rechecks_find_the_true_precision_and_more_of_them_find_it_surer(groups: Groups) -> None:
    truth = phase(replay.gate_curve(groups, "v1", [0.3]), "last third").iloc[0]
    table = replay.recheck_curve(groups, "v1", 0.3, shares=(0.05, 0.3, 1.0))
    assert 0.3 < truth["precision"] < 0.9
    assert table["precision"].to_numpy() == pytest.approx(truth["precision"], abs=0.02)
    assert table["recall"].to_numpy() == pytest.approx(truth["recall"], abs=0.05)
    assert (np.diff(table["precision_high"] - table["precision_low"]) < 0).all()
    assert table["signal_lost"].iloc[-1] == 0


def test_an_oracle_is_sure_where_problems_are_and_not_where_luck_decides() -> None:
    sure = replay.ceiling(pd.DataFrame({"n": 32, "c": [0, 32, 16] * 20}), 8)
    assert sure.loc[sure["threshold"] == 0.3, ["precision", "recall"]].to_numpy() == pytest.approx(
        np.array([[1.0, 1.0]]), abs=0.02)
    luck = replay.ceiling(pd.DataFrame({"n": 32, "c": [29] * 50}), 8)
    assert luck["precision"].dropna().iloc[-1] < 0.6


def test_predictions_that_know_need_few_and_are_recommended(groups: Groups) -> None:
    gates = replay.every_gate(groups)
    found = replay.recommend(gates, "all")
    assert found["good"]
    assert found["precision"] >= 0.9
    assert found["recall"] >= 0.5
    fewer = gates[(gates["phase"] == "all") & (gates["predictions"] < found["predictions"])]
    assert not ((fewer["precision"] >= 0.9) & (fewer["recall"] >= 0.5) & (fewer["groups_dropped"] >= 20)).any()


def test_blind_predictions_are_not_recommended_and_it_is_said(tmp_path: Path) -> None:
    blind = recorded(tmp_path / "masa-s0", aware=0.0)
    assert "nothing reaches precision 0.9 at recall 0.5" in " ".join(replay_report.replay(blind.path).split())


def test_the_text_has_the_verdicts_and_a_row_for_each_m(knows: Run) -> None:
    text = replay_report.replay(knows.path)
    flat = " ".join(text.split())
    assert "masa-s0: 144 groups of 6 recorded steps, G = 8, M = 8." in flat
    assert "last third: the least that reaches precision 0.9 at recall 0.5 is M = " in flat
    assert "who knows 24 other solutions of a problem drops groups of 8 less than half of those without" in flat
    rows = text.split("The gate by M, last third:\n")[1].split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == ["predictions", *map(str, range(1, 9))]


def test_the_json_names_a_setting_for_each_phase(knows: Run) -> None:
    found = json.loads(replay_report.replay(knows.path, as_json=True))
    assert list(found["gates"]) == list(replay.PHASES)
    assert found["gates"]["all"]["good"] is True
    assert {cap["aggregate"] for cap in found["caps"]} <= set(replay.AGGREGATES)
    assert all(cap["right_cut"] <= 0.05 for cap in found["caps"])


def test_steps_that_a_gate_or_a_cap_thinned_are_left_out(tmp_path: Path) -> None:
    run = recorded(tmp_path / "masa-efficient-s0", "masa-efficient", (1, 2, 3))
    gated = rollout_table(4)
    run.write_rollouts(4, gated[(gated["stream"] == "meta") | (gated["group"] > 2)])
    run.write_rollouts(5, rollout_table(5).assign(capped=lambda table: table["stream"] == "solution"))
    assert np.unique(replay.read_groups(run.path).steps_P).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("steps", "streams", "message"), [
    ((), (), "recorded no step with solutions and predictions"), (STEPS, ("solution",), "recorded no step"),
    ((1, 2), ("solution", "meta"), "fewer than three steps")])
def test_a_run_without_whole_groups_is_refused(tmp_path: Path, steps: tuple[int, ...], streams: tuple[str, ...],
                                               message: str) -> None:
    run = recorded(tmp_path / "x", steps=())
    for step in steps:
        run.write_rollouts(step, rollout_table(step)[lambda table: table["stream"].isin(streams)])
    with pytest.raises(replay.ReplayError, match=message):
        replay.read_groups(run.path)


def test_a_run_in_which_every_group_has_a_signal_is_refused(tmp_path: Path) -> None:
    run = recorded(tmp_path / "x", steps=())
    for step in (1, 2, 3):
        table = rollout_table(step)
        correct = table["correct"].where(table["member"] > 1, table["member"] == 0)
        run.write_rollouts(step, table.assign(correct=correct))
    with pytest.raises(replay.ReplayError, match="every group has a signal"):
        replay_report.replay(run.path)


def test_the_recorded_baseline_can_be_replayed() -> None:
    groups = replay.read_groups(RECORDED)
    assert groups.rates_PM.shape == (144, 8)
    text = " ".join(replay_report.replay(RECORDED).split())
    assert "nothing reaches precision 0.9" in text
    assert "drops groups of 8 with precision 0.8" in text
