"""Figures as SVG, and the pages that hold them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from bs4 import BeautifulSoup, Tag

from masa_lib.analysis import figures, pages, svg
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
    first, second = (texts(panel)[:-1] for panel in drawn(two_panels()).select(".panels > svg"))
    assert first == second and {"0", "2", "4"} <= set(first)


def test_the_same_figure_is_drawn_by_the_same_letters_and_its_text_is_text_as_the_page_styles_it() -> None:
    assert svg.draw(two_panels()) == svg.draw(two_panels())
    assert not re.search("font-family|fill", drawn(two_panels()).find("text", string="share")["style"])


def test_hovering_shows_what_the_template_says() -> None:
    figure = go.Figure().add_scatter(x=[2000], y=[0.12345], customdata=[[7, "a"]], mode="markers", name="n", text=["t"],
                                     hovertemplate="<b>%{text}</b><br>%{x:,.0f}, %{y:.3~g}, %{customdata[0]} of "
                                                   "%{customdata[1]}<extra>no</extra>")
    assert tips(drawn(figure)) == ["t\n2,000, 0.123, 7 of a"]


def test_a_line_is_broken_where_a_value_is_missing() -> None:
    figure = go.Figure().add_scatter(x=[0, 1, 2, 3], y=[0, 1, None, 1], mode="lines", line={"color": "#ff0000"})
    line = drawn(figure).select_one('path[style*="fill: none; stroke: #ff0000"]')
    assert line["d"].count("M") == 2


def test_what_is_stacked_stands_on_what_lies_below() -> None:
    figure = go.Figure(layout={"barmode": "stack"})
    for value in (3.0, 1.0):
        figure.add_bar(x=[value], y=["arm"], orientation="h", name=f"b{value}")
    first, second = (sorted({float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", bar["d"])})
                     for bar in drawn(figure).select("path[data-tip]"))
    assert second[0] == pytest.approx(first[1], abs=0.02)
    assert first[1] - first[0] == pytest.approx(3 * (second[1] - second[0]), rel=0.01)


def test_a_logarithmic_axis_puts_equal_factors_at_equal_distances() -> None:
    figure = go.Figure().add_scatter(x=[1, 2, 4], y=[0, 1, 2]).update_xaxes(type="log", tickvals=[1, 2, 4])
    one, two, four = (float(drawn(figure).find("text", string=tick)["x"]) for tick in "124")
    assert two - one == pytest.approx(four - two, abs=0.02)


def test_error_bars_reach_from_low_to_high() -> None:
    figure = go.Figure().add_scatter(x=[0, 1], y=[0.5, 0.5], mode="markers", line={"color": "#ff0000"},
                                     error_y={"array": [0.1, 0.1], "arrayminus": [0.2, 0.2]})
    bar = drawn(figure).select_one('path[style*="stroke: #ff0000"]')["d"]
    below, above = (float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", bar))
    at = float(drawn(figure).select_one("[data-tip]")["y"])
    assert below - at == pytest.approx(2 * (at - above), abs=0.1)


def test_a_line_at_a_value_is_drawn_across_with_its_text() -> None:
    figure = go.Figure().add_scatter(x=[0, 1], y=[0, 1]).add_hline(0.5, annotation_text="target")
    assert len(drawn(figure).select('path[style*="stroke-dasharray"]')) == 1 and "target" in texts(drawn(figure))


def test_the_legend_names_each_arm_once_and_one_arm_needs_none() -> None:
    figure = go.Figure()
    for name in ("a", "b", "a"):
        figure.add_scatter(x=[0], y=[0], name=name)
    assert [entry.text.split()[-1] for entry in drawn(figure).select(".key li")] == ["a", "b"]
    assert drawn(two_panels()).select(".key") == []


def test_an_empty_panel_says_so() -> None:
    assert "not measured" in texts(drawn(figures.grid(["nothing"], title="T", x="x", y="y")))


def test_names_of_arms_are_text_and_no_tags() -> None:
    figure = go.Figure().add_bar(x=[1, 2], y=["&lt;i&gt;", "b"], orientation="h", name="&lt;i&gt;")
    assert drawn(figure).select("i") == [] and "<i>" in texts(drawn(figure))


def test_another_kind_of_trace_is_refused_in_a_sentence() -> None:
    with pytest.raises(AnalysisError, match="draws scatter and bar traces, and the figure 'Warm' has one of heatmap"):
        svg.draw(go.Figure(go.Heatmap(z=[[1]])).update_layout(title_text="Warm"))


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (500, "500"), (20_000, "20k"), (1.5e6, "1.5M"), (0, "0")])
def test_ticks_are_short(value: float, text: str) -> None:
    figure = go.Figure().add_scatter(x=[0, 1], y=[0, value]).update_yaxes(tickvals=[value])
    assert text in texts(drawn(figure))


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
