"""Figures: what is drawn where, and that it can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from synthetic import STEPS, write_run

from masa_lib import config
from masa_lib.analysis import compare, figures, gate_figures

CURVES = {"grpo": {0: 0.1, 10: 0.3, STEPS: 0.5}, "masa": {0: 0.1, 10: 0.4, STEPS: 0.6}}
#: linear RGB as people without red or without green cones see it (Machado, Oliveira and Fernandes 2009)
SIGHTS = {"all cones": np.eye(3),
          "no red": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                              [-0.003882, -0.048116, 1.051998]]),
          "no green": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                                [-0.011820, 0.042940, 0.968881]])}
#: linear RGB -> cones -> Oklab (Ottosson 2020)
CONES = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                  [0.0883024619, 0.2817188376, 0.6299787005]])
OKLAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                  [0.0259040371, 0.7827717662, -0.8086757660]])
POINTS = pd.DataFrame({"arm": "masa", "row": "masa", "column": "after", "label": "x",
                       "predicted": np.linspace(0, 1, 50), "actual": np.linspace(0.2, 0.7, 50)})


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> compare.Comparison:
    folder = tmp_path_factory.mktemp("study")
    for seed in range(2):
        for method, curve in CURVES.items():
            write_run(folder / f"{method}-s{seed}", method, seed, curve)
    return compare.compare_runs(folder)


@pytest.fixture(scope="module")
def drawn(comparison: compare.Comparison) -> dict[str, go.Figure]:
    curves, steps, problems = comparison.curves, comparison.steps, comparison.problems
    return {"accuracy": figures.accuracy_curve(curves, target=0.46), "levels": figures.accuracy_by_level(problems),
            "tokens": figures.tokens_by_stream(steps), "seconds": figures.seconds_by_phase(steps),
            "pass rate": figures.predictions(problems), "length": figures.predictions(problems, "length"),
            "paper": figures.beside_paper(compare.paper_points("pass_rate"), problems),
            "rewards": figures.rewards_by_part(steps), "alignment": figures.alignment(steps),
            "pass@k": figures.pass_at_k_curve(problems)}


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, go.Figure]:
    """The figures of gates: a study with masa-efficient."""
    folder = tmp_path_factory.mktemp("gated")
    for arm, curve in (*CURVES.items(), ("masa-efficient", CURVES["masa"])):
        for seed in range(2):
            write_run(folder / f"{arm}-s{seed}", arm, seed, curve, more=lambda step, arm=arm: {
                "predicted_pass_rate": None if arm == "grpo" else step / STEPS, "accuracy": 0.5,
                **({"gate_precision": 0.5 + step / 40, "dropped": 0.3, "tokens_recheck": 5}
                   if arm == "masa-efficient" else {"gate_precision": None, "dropped": 0.0})})
    found = compare.compare_runs(folder)
    shares = pd.DataFrame({arm: row["tokens_of_reference"] for arm, row in found.summary["methods"].items()}).T
    return {"calibration": gate_figures.calibration_curve(compare.calibration_curve(found.problems)),
            "pass rates": gate_figures.predicted_and_true(found.steps),
            "gate": gate_figures.gate_over_steps(found.steps), "shares": gate_figures.token_shares(shares)}


def named(figure: go.Figure, name: str) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.name == name]


def titles(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_every_figure_has_a_title_axes_and_the_one_template(drawn: dict[str, go.Figure],
                                                            gated: dict[str, go.Figure]) -> None:
    for name, figure in (drawn | gated).items():
        assert figure.layout.title.text, name
        assert any(axis.title.text for axis in figure.select_xaxes()), name
        assert figure.layout.template == figures.TEMPLATE, name
        assert figure.layout.paper_bgcolor is None, name


def test_an_arm_has_one_colour_in_every_figure(drawn: dict[str, go.Figure]) -> None:
    assert named(drawn["accuracy"], "masa")[0].line.color == figures.VERMILLION
    assert named(drawn["alignment"], "masa")[0].line.color == figures.VERMILLION
    assert named(drawn["pass@k"], "grpo, after")[0].line.color == figures.BLUE


def test_colours_stay_apart_whatever_the_arms() -> None:
    arms = ["masa", "z", "a", "grpo", "b"]
    colors = figures.arm_colors(arms)
    assert list(colors) == ["grpo", "masa", "a", "b", "z"]
    assert len(set(colors.values())) == len(arms)
    assert figures.arm_colors(["masa"])["masa"] == colors["masa"]


def test_a_method_keeps_its_colour_and_others_take_what_is_free() -> None:
    alone, together = (figures.arm_colors(arms) for arms in (["mopps"], [*config.METHODS, "grpo-fresh", *"wxz"]))
    assert alone["mopps"] == together["mopps"]
    assert len(set(together.values())) == 12
    assert figures.arm_colors(["before training", "grpo"])["before training"] == figures.GREEN


@pytest.mark.parametrize("sight", SIGHTS)
def test_twelve_colours_are_told_apart_and_stand_out_on_light_and_dark_pages(sight: str) -> None:
    srgb = np.array([[int(color[at:at + 2], 16) / 255 for at in (1, 3, 5)] for color in figures.PALETTE])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.cbrt((linear @ SIGHTS[sight].T).clip(0, 1) @ CONES.T) @ OKLAB.T
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1)
    assert apart[~np.eye(12, dtype=bool)].min() > 0.075  # 0.02 is just seen
    light = linear @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (light + 0.05)).min() > 1.4
    assert ((light + 0.05) / 0.06).min() > 2.4


@pytest.mark.parametrize("against", ["step", "tokens", "seconds"])
def test_the_accuracy_curve_has_a_line_a_seed_and_the_mean(comparison: compare.Comparison, against: str) -> None:
    figure = figures.accuracy_curve(comparison.curves, against)
    assert len(figure.data) == 2 * (2 + 1)
    mean = named(figure, "masa")[0]
    assert list(mean.y) == pytest.approx([0.1, 0.4, 0.6])
    assert mean.x[-1] == {"step": STEPS, "tokens": 150 * STEPS, "seconds": 2.0 * STEPS}[against]


def test_tokens_by_stream_end_at_the_runs_totals(drawn: dict[str, go.Figure]) -> None:
    assert [trace.y[-1] for trace in named(drawn["tokens"], "solutions")] == [100 * STEPS] * 2
    assert [trace.y[-1] for trace in named(drawn["tokens"], "predictions")] == [0, 50 * STEPS]
    assert not named(drawn["tokens"], "re-checks")


def test_phases_add_up_to_the_runs_seconds(drawn: dict[str, go.Figure]) -> None:
    assert sum(trace.x[0] for trace in drawn["seconds"].data) == pytest.approx(2.0 * STEPS)


def test_prediction_panels_name_r_and_share_their_range(drawn: dict[str, go.Figure]) -> None:
    assert [title.split(":")[0] for title in titles(drawn["pass rate"])] == [
        "grpo, before", "grpo, after", "masa, before", "masa, after"]
    assert all("r = " in title for title in titles(drawn["pass rate"]))
    for axis in [*drawn["pass rate"].select_xaxes(), *drawn["pass rate"].select_yaxes()]:
        assert axis.range == pytest.approx((-0.04, 1.04))
    (low, high), *others = {tuple(axis.range) for axis in drawn["length"].select_xaxes(row=2)}
    assert low < 0 < high
    assert not others


def test_the_regression_line_is_that_of_all_points() -> None:
    figure = figures.prediction_panels(POINTS, "pass_rate", limit=7)
    points, _, line = figure.data
    assert len(points.x) == 7
    assert (line.y[0], line.y[-1]) == pytest.approx((0.2, 0.7))


def test_points_are_jittered_but_hover_tells_the_truth() -> None:
    points = figures.prediction_panels(POINTS, "pass_rate").data[0]
    assert not np.allclose(points.x, points.customdata[:, 0])
    assert np.allclose(points.x, points.customdata[:, 0], atol=0.05)


def test_constant_predictions_have_no_line_and_an_undefined_r() -> None:
    figure = figures.prediction_panels(POINTS.assign(predicted=0.5), "pass_rate")
    assert titles(figure) == ["after: r undefined"]
    assert len(figure.data) == 2


def test_hover_text_is_escaped(drawn: dict[str, go.Figure]) -> None:
    assert "&lt; 7?" in drawn["pass rate"].data[0].text[0]


def test_the_papers_points_stand_above_ours(drawn: dict[str, go.Figure]) -> None:
    heads = titles(drawn["paper"])
    assert heads[:2] == ["paper, grpo: r = 0.05", "paper, masa: r = 0.67"]
    assert [head.split(":")[0] for head in heads[2:]] == ["ours, grpo", "ours, masa"]


def test_grpo_has_no_meta_rewards_and_no_alignment(drawn: dict[str, go.Figure]) -> None:
    assert len(named(drawn["rewards"], "difficulty")) == 1
    assert len(named(drawn["rewards"], "solution")) == 2
    assert len(named(drawn["alignment"], "masa")) == 4
    assert not named(drawn["alignment"], "grpo")


def test_each_name_stands_in_the_legend_once(drawn: dict[str, go.Figure], gated: dict[str, go.Figure]) -> None:
    for figure in (drawn | gated).values():
        shown = [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]
        assert len(shown) == len(set(shown))


def test_pass_at_k_grows_with_k_inside_its_interval(drawn: dict[str, go.Figure]) -> None:
    curve = named(drawn["pass@k"], "grpo, before")[0]
    assert list(curve.x) == [1, 2, 4, 8, 16, 32]
    assert (np.diff(curve.y) > 0).all()
    assert (np.asarray(curve.error_y.array) >= 0).all()


def test_levels_before_and_after_are_those_of_the_problems(comparison: compare.Comparison,
                                                           drawn: dict[str, go.Figure]) -> None:
    rows = comparison.problems.query("arm == 'masa' and when == 'after' and level == 2")
    assert named(drawn["levels"], "masa, after")[0].y[1] == pytest.approx((rows["c"] / rows["n"]).mean())


def test_figures_take_arms_without_problems_of_a_side(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo-s0", "grpo", 0, CURVES["grpo"], samples=2)
    problems = compare.compare_runs(tmp_path).problems
    assert list(named(figures.pass_at_k_curve(problems[problems["when"] == "before"]), "grpo, before")[0].x) == [1, 2]


def test_the_calibration_curve_has_a_line_an_arm_with_intervals(gated: dict[str, go.Figure]) -> None:
    line = named(gated["calibration"], "masa")[0]
    assert line.line.color == figures.VERMILLION
    assert (np.diff(line.x) > 0).all()
    assert (np.asarray(line.error_y.array, float)[np.isfinite(line.error_y.array)] >= 0).all()


def test_the_bars_of_a_calibration_curve_stay_among_the_pass_rates() -> None:
    curve = pd.DataFrame({"arm": "masa", "predicted": [0.1, 0.9], "true": [0.25, 0.75], "low": [-0.5, 0.5],
                          "high": [0.5, 1.5], "problems": 9})
    bars = named(gate_figures.calibration_curve(curve), "masa")[0].error_y
    assert list(bars.arrayminus) == list(bars.array) == [0.25, 0.25]


def test_predicted_and_true_pass_rates_are_drawn_for_arms_that_predict(gated: dict[str, go.Figure]) -> None:
    assert titles(gated["pass rates"]) == ["masa", "masa-efficient"]
    assert [trace.customdata[-1] for trace in named(gated["pass rates"], "predicted")] == [1.0, 1.0]
    assert [trace.customdata[-1] for trace in named(gated["pass rates"], "true")] == [0.5, 0.5]


def test_gates_are_drawn_for_the_arms_that_have_one(gated: dict[str, go.Figure]) -> None:
    assert titles(gated["gate"]) == ["precision of the gate", "share of candidates dropped"]
    precision, dropped = named(gated["gate"], "masa-efficient")
    assert precision.customdata[-1] == 1.0
    assert list(dropped.customdata) == [0.3] * STEPS
    assert not named(gated["gate"], "masa")


def test_shares_of_tokens_add_up_to_what_the_arm_spends(gated: dict[str, go.Figure]) -> None:
    bars = {trace.name: dict(zip(trace.y, trace.x, strict=True)) for trace in gated["shares"].data}
    assert list(bars) == ["solutions", "re-checks", "predictions"]
    assert sum(bar["grpo"] for bar in bars.values()) == pytest.approx(100)
    assert sum(bar["masa-efficient"] for bar in bars.values()) == pytest.approx(
        100 * (155 / 100) * (bars["solutions"]["masa"] / 100))
