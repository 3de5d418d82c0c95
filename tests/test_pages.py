"""Figures as SVG, and the pages that hold them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from bs4 import BeautifulSoup, Tag

from masa_lib.analysis import figures, pages, panels, svg
from masa_lib.analysis.records import AnalysisError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def drawn(figure: go.Figure) -> BeautifulSoup:
    return BeautifulSoup(svg.draw(figure), "html.parser")


def tips(soup: BeautifulSoup) -> list[str]:
    return [mark["data-tip"] for mark in soup.select("[data-tip]")]


def texts(soup: BeautifulSoup | Tag) -> list[str]:
    return [text.text for text in soup.select("text")]


def two_panels() -> go.Figure:
    figure = figures.grid(["left", "right"], title="Both", x="step", y="share", columns=2, shared=True)
    for column, height in ((1, 1.0), (2, 5.0)):
        figure.add_scatter(x=[0, 10], y=[0, height], name="up", mode="lines", row=1, col=column,
                           hovertemplate="%{x}: %{y:.1f}<extra></extra>")
    return figure


def test_each_panel_is_a_drawing_with_its_title_and_the_titles_of_its_axes() -> None:
    panel = drawn(two_panels()).select(".panels > svg")
    assert [one["aria-label"] for one in panel] == ["Both, left", "Both, right"]
    assert all({"step", "share"} <= set(texts(one)) for one in panel)


def test_panels_that_share_a_scale_have_the_same_ticks() -> None:
    ticks = [panel.y.ticks() for panel in panels.panels(two_panels())]
    assert ticks[0] == ticks[1] and [text for _, text in ticks[0]] == ["0", "1", "2", "3", "4", "5"]


def test_hovering_shows_what_the_template_says() -> None:
    figure = go.Figure().add_scatter(x=[2000], y=[0.12345], customdata=[[7, "a"]], mode="markers", name="n", text=["t"],
                                     hovertemplate="<b>%{text}</b><br>%{x:,.0f}, %{y:.3~g}, %{customdata[0]} of "
                                                   "%{customdata[1]}<extra>no</extra>")
    assert tips(drawn(figure)) == ["t\n2,000, 0.123, 7 of a"]


def test_a_line_is_broken_where_a_value_is_missing() -> None:
    figure = go.Figure().add_scatter(x=[0, 1, 2, 3], y=[0, 1, None, 1], mode="lines")
    assert drawn(figure).select_one("path.line")["d"].count("M") == 2


def test_what_is_stacked_stands_on_what_lies_below() -> None:
    figure = go.Figure(layout={"barmode": "stack"})
    for value in (3.0, 1.0):
        figure.add_bar(x=[value], y=["arm"], orientation="h", name=f"b{value}")
    first, second = drawn(figure).select("rect[data-tip]")
    assert float(second["x"]) == pytest.approx(float(first["x"]) + float(first["width"]), abs=0.11)
    assert float(first["width"]) == pytest.approx(3 * float(second["width"]), rel=0.01)
    assert panels.panels(figure)[0].x.high == pytest.approx(4.16)


def test_a_logarithmic_axis_puts_equal_factors_at_equal_distances() -> None:
    figure = go.Figure().add_scatter(x=[1, 2, 4], y=[0, 1, 2]).update_xaxes(type="log", tickvals=[1, 2, 4])
    (one, _), (two, _), (four, label) = panels.panels(figure)[0].x.ticks()
    assert two - one == pytest.approx(four - two) and label == "4"


def test_error_bars_reach_from_low_to_high() -> None:
    figure = go.Figure().add_scatter(x=[0], y=[0.5], error_y={"array": [0.1], "arrayminus": [0.2]}, mode="markers")
    low, high = panels.stacked(figure.data, None)[0][2:]
    assert (low[0], high[0]) == pytest.approx((0.3, 0.6))


def test_a_line_at_a_value_is_drawn_across_with_its_text() -> None:
    figure = go.Figure().add_scatter(x=[0, 1], y=[0, 1]).add_hline(0.5, annotation_text="target")
    soup = drawn(figure)
    assert soup.select("path.across") and "target" in texts(soup)


def test_the_legend_names_each_arm_once_and_one_arm_needs_none() -> None:
    figure = go.Figure()
    for name in ("a", "b", "a"):
        figure.add_scatter(x=[0], y=[0], name=name)
    assert [entry.text for entry in drawn(figure).select(".key li")] == ["a", "b"]
    assert drawn(two_panels()).select(".key") == []


def test_an_empty_panel_says_so() -> None:
    assert "not measured" in texts(drawn(figures.grid(["nothing"], title="T", x="x", y="y")))


def test_names_of_arms_are_text_and_no_tags() -> None:
    figure = go.Figure().add_bar(x=[1, 2], y=["&lt;i&gt;", "b"], orientation="h", name="&lt;i&gt;")
    assert drawn(figure).select("i") == [] and "<i>" in texts(drawn(figure))


def test_another_kind_of_trace_is_refused_in_a_sentence() -> None:
    with pytest.raises(AnalysisError, match="draws scatter and bar traces, and the figure 'Warm' has one of heatmap"):
        svg.draw(go.Figure(go.Heatmap(z=[[1]])).update_layout(title_text="Warm"))


@pytest.mark.parametrize(("ends", "labels"), [
    ((0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]), ((0, 2.1e6), ["0", "0.5M", "1M", "1.5M", "2M"]),
    ((0, 180), ["0", "50", "100", "150"]), ((-1, 1), ["-1", "-0.5", "0", "0.5", "1"])])
def test_ticks_are_round_numbers(ends: tuple[float, float], labels: list[str]) -> None:
    assert [text for _, text in panels.Axis("linear", "", 0, 400, *ends).ticks()] == labels


def test_a_long_line_keeps_its_first_and_last_point_and_stays_small() -> None:
    figure = go.Figure().add_scatter(x=np.arange(5000), y=np.arange(5000), mode="lines", name="long")
    assert len(svg.draw(figure)) < 40_000 and {"long 0, 0", "long 4999, 4999"} <= set(tips(drawn(figure)))


def test_a_page_shows_a_tip_where_it_is_pointed_at_and_is_as_wide_as_a_phone(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; .ci/run installs it")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; .ci/run installs it")
    wide = [["measure", *(f"arm number {number}" for number in range(12))]] * 3
    pages.write(tmp_path / "page.html", "Title", [
        pages.paragraphs(["word " * 50]), pages.numbers([("share", "0.5", "of all")] * 4), pages.table(wide),
        pages.shown([(two_panels(), ["Said."])]), pages.fold("More", "<p>Folded.</p>")])
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page(
            viewport={"width": 390, "height": 800})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert not page.get_by_text("Folded.").is_visible()
        page.locator("[data-tip]").last.hover(force=True)
        assert page.locator("#tip").inner_text() == "10: 5.0"
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
