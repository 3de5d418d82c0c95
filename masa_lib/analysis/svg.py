"""Plotly figures as SVG, for a page that must not carry plotly's five megabytes: a small drawing a panel.

Panels flow beside or below each other as the page is wide, so their text stays readable on a phone. What hovering shows
stands in `data-tip` of each mark, filled from the figure's own hover template. Drawn are scatter and bar traces, lines
across a panel, error bars, linear, logarithmic and category axes; deliberately nothing else: the library's figures
are made of these.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from masa_lib.analysis import figures
from masa_lib.analysis.panels import BOTTOM, RIGHT, TOP, WIDTH, Panel, panels, plain, stacked
from masa_lib.analysis.records import AnalysisError

#: points of a line, at most; hidden marks of all lines of a figure that can be hovered, about
POINTS, MARKS = 90, 300
DASHES = {"dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
#: marks of radius 1 about the origin
SHAPES = {"square": "M-.9-.9h1.8v1.8h-1.8z", "diamond": "M0-1.3L1.3 0 0 1.3-1.3 0z",
          "cross": "M-.4-1.2h.8v.8h.8v.8h-.8v.8h-.8v-.8h-.8v-.8h.8z",
          "x": "M-1-.5L-.5-1 0-.5 .5-1 1-.5 .5 0 1 .5 .5 1 0 .5-.5 1-1 .5-.5 0z",
          "triangle-up": "M0-1.2L1.1 .9h-2.2z", "triangle-down": "M0 1.2L1.1-.9h-2.2z",
          "star": "M0-1.3L.4-.4 1.3-.3 .6.3 .8 1.2 0 .7-.8 1.2-.6.3-1.3-.3-.4-.4z"}


def draw(figure: go.Figure) -> str:
    """The panels of a figure with one legend, as HTML.

    Raises:
        AnalysisError: a trace of it is neither scatter nor bar.
    """
    for trace in figure.data:
        if trace.type not in ("scatter", "scattergl", "bar"):
            raise AnalysisError(f"A page draws scatter and bar traces, and the figure {figure.layout.title.text!r} has "
                                f"one of {trace.type}: make it of these, or write it to a file of its own.")
    drawn = "".join(_panel(panel, figure) for panel in panels(figure))
    return f'<div class="plot">{_legend(figure)}<div class="panels">{drawn}</div></div>'


def _panel(panel: Panel, figure: go.Figure) -> str:
    """One panel as an SVG element."""
    said = ", ".join(filter(None, (plain(figure.layout.title.text or ""), plain(panel.title))))
    parts = [f'<svg viewBox="0 0 {WIDTH} {panel.height}" role="img" aria-label="{html.escape(said)}">']
    parts += [_text(plain(panel.title), panel.x.start, 16, "start", "head"), *_grid(panel), *_lines_across(panel)]
    x, y, wide, high = panel.x.start - 4, TOP - 6, WIDTH - panel.x.start - RIGHT + 10, panel.height - BOTTOM - TOP + 10
    parts.append(f'<svg x="{x}" y="{y}" width="{wide}" height="{high}" viewBox="{x} {y} {wide} {high}">')  # cuts off
    below: dict[Any, np.ndarray] = {}
    if not panel.traces:
        parts.append(_text("not measured", (panel.x.start + WIDTH) / 2, (TOP + panel.height - BOTTOM) / 2, "middle"))
    for trace, numbers in zip(panel.traces, stacked(panel.traces, figure.layout.barmode), strict=True):
        color = _color(trace, figure)
        parts += (_bars(panel, trace, numbers, color) if trace.type == "bar" else
                  _scatter(panel, trace, numbers, color, below, max(2, MARKS // len(figure.data))))
    return "".join([*parts, "</svg></svg>"])


def _text(text: str, x: float, y: float, anchor: str, kind: str = "") -> str:
    """A line of text; nothing where there is none."""
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>' if text else ""


def _grid(panel: Panel) -> list[str]:
    """Frame, ticks and titles of the axes."""
    x, y, bottom = panel.x, panel.y, panel.height - BOTTOM
    kind = "tight" if max((len(text) for _, text in y.ticks()), default=0) > 8 else ""
    parts = [f'<path class="grid" d="{"".join(f"M{panel.x.start} {at:.1f}H{WIDTH - RIGHT}" for at, _ in y.ticks())}'
             f'{"".join(f"M{at:.1f} {TOP}V{bottom}" for at, _ in x.ticks())}"/>',
             f'<path class="axis" d="M{panel.x.start} {TOP}V{bottom}H{WIDTH - RIGHT}"/>']
    parts += [_text(plain(text), at, bottom + 15, "middle") for at, text in x.ticks()]
    parts += [_text(plain(text), panel.x.start - 6, at + 4, "end", kind) for at, text in y.ticks()]
    return [*parts, _text(x.title, (panel.x.start + WIDTH - RIGHT) / 2, panel.height - 8, "middle"),
            f'<g transform="translate(13 {(TOP + bottom) / 2}) rotate(-90)">{_text(y.title, 0, 0, "middle")}</g>']


def _lines_across(panel: Panel) -> list[str]:
    """Dotted lines at one value, and what is written there."""
    parts = []
    for line in panel.lines:
        if line.xref.endswith("domain"):
            at = panel.y.pixels(panel.y.place([line.y0]))[0]
            parts.append(f'<path class="across" d="M{panel.x.start} {at:.1f}H{WIDTH - RIGHT}"/>')
        else:
            at = panel.x.pixels(panel.x.place([line.x0]))[0]
            parts.append(f'<path class="across" d="M{at:.1f} {TOP}V{panel.height - BOTTOM}"/>')
    for note in panel.notes:
        at = panel.y.pixels(panel.y.place([note.y]))[0]
        parts.append(_text(plain(note.text), WIDTH - RIGHT - 4, at + 14, "end"))
    return parts


def _scatter(panel: Panel, trace: Any, numbers: tuple[np.ndarray, ...], color: str, below: dict[Any, np.ndarray],
             hidden: int) -> list[str]:
    """A line, its area, its error bars and its marks, of which so many may be hidden."""
    x, y = (axis.pixels(axis.place(values)) for axis, values in zip((panel.x, panel.y), numbers, strict=False))
    mode, parts = trace.mode or "lines", []
    faint = f' opacity="{trace.opacity}"' if trace.opacity else ""
    kept = figures.thinned(len(x), POINTS)
    if trace.stackgroup:
        ground = below.get(trace.stackgroup, np.full(len(x), panel.y.pixels(np.zeros(1))[0]))
        area = [*zip(x[kept], y[kept], strict=True), *list(zip(x[kept], ground[kept], strict=True))[::-1]]
        parts.append(f'<path d="{_path(area)}Z" fill="{color}" opacity=".35"/>')
        below[trace.stackgroup] = y
    if "lines" in mode:
        parts.append(f'<path class="line" d="{_path(zip(x[kept], y[kept], strict=True))}" stroke="{color}" '
                     f'stroke-width="{0.75 * (trace.line.width or 2):.3g}"{_dash(trace)}{faint}/>')
    low, high = (panel.y.pixels(panel.y.place(values)) for values in numbers[2:])
    parts += [f'<path class="line" d="M{at:.1f} {bottom:.1f}V{top:.1f}" stroke="{color}"/>'
              for at, bottom, top in zip(x, low, high, strict=True) if abs(bottom - top) > 0.1]
    return parts + _marks(trace, x, y, color, None if "markers" in mode else hidden)


def _marks(trace: Any, x: np.ndarray, y: np.ndarray, color: str, hidden: int | None) -> list[str]:
    """The points of a trace; of a line without markers so many that are not seen until they are hovered."""
    shown = hidden is None
    if trace.hoverinfo == "skip" and not shown:
        return []
    places = figures.thinned(len(x), len(x) if shown else hidden)
    faint = f' opacity="{trace.marker.opacity}"' if shown and trace.marker.opacity else ""
    kind, parts = "p" if shown else "p ghost", []
    for place in places[:len(x)]:
        if math.isfinite(x[place]) and math.isfinite(y[place]):
            said = "" if trace.hoverinfo == "skip" else f' data-tip="{html.escape(_tip(trace, place))}"'
            parts.append(_mark(trace.marker.symbol if shown else None, x[place], y[place],
                               (trace.marker.size or 6) / 2, color, f'class="{kind}"{faint}{said}'))
    return parts


def _mark(symbol: str | None, x: float, y: float, size: float, color: str, more: str = "") -> str:
    """A mark at a place; an open one is filled with the page's own colour."""
    name = (symbol or "circle").removesuffix("-open")
    fill = f'fill="Canvas" style="stroke:{color};stroke-width:1.5px"' if name != (symbol or name) else f'fill="{color}"'
    if name not in SHAPES:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {fill} {more}/>'
    return (f'<path transform="translate({x:.1f} {y:.1f}) scale({0.85 * size:g})" d="{SHAPES[name]}" {fill} '
            f'vector-effect="non-scaling-stroke" {more}/>')


def _bars(panel: Panel, trace: Any, numbers: tuple[np.ndarray, ...], color: str) -> list[str]:
    """The bars of a trace, each on what lies below it."""
    flat, parts = trace.orientation == "h", []
    along, across = (panel.x, panel.y) if flat else (panel.y, panel.x)
    tops, own = (numbers[0], trace.x) if flat else (numbers[1], trace.y)
    middle = across.pixels(across.place(numbers[1] if flat else numbers[0]))
    width = 0.7 * (min(np.abs(np.diff(np.unique(middle))), default=40.0) if len(middle) > 1 else 30.0)
    for place, (top, value, at) in enumerate(zip(tops, own, middle, strict=True)):
        ends = sorted(along.pixels(along.place([top - value, top])))
        box = (ends[0], at - width / 2, ends[1] - ends[0], width)
        left, up, wide, high = box if flat else (box[1], box[0], box[3], box[2])
        parts.append(f'<rect class="p" x="{left:.1f}" y="{up:.1f}" width="{wide:.1f}" height="{high:.1f}" '
                     f'fill="{color}" data-tip="{html.escape(_tip(trace, place))}"/>')
    return parts


def _path(points: Iterable[tuple[float, float]]) -> str:
    """A path through points, broken where one is missing."""
    said, on = [], False
    for x, y in points:
        known = math.isfinite(x) and math.isfinite(y)
        said += [f"{'L' if on else 'M'}{x:.1f} {y:.1f}"] if known else []
        on = known
    return "".join(said)


def _legend(figure: go.Figure) -> str:
    """The names of the traces with their colour and mark; nothing where the figure wants none."""
    named: dict[str, str] = {}
    for trace in figure.data:
        if trace.name and trace.showlegend is not False:
            named.setdefault(plain(trace.name), f'<svg viewBox="0 0 24 16" aria-hidden="true">'
                                                f'{_sign(trace, _color(trace, figure))}</svg>')
    if figure.layout.showlegend is False or len(named) < 2:
        return ""
    return f'<ul class="key">{"".join(f"<li>{mark}{html.escape(name)}</li>" for name, mark in named.items())}</ul>'


def _sign(trace: Any, color: str) -> str:
    """What stands for a trace in the legend."""
    if trace.type == "bar" or trace.stackgroup:
        return f'<rect x="6" y="3" width="12" height="10" fill="{color}"/>'
    line = f'<path class="line" d="M0 8H24" stroke="{color}" stroke-width="2"{_dash(trace)}/>'
    return line + (_mark(trace.marker.symbol, 12, 8, 3.5, color) if "markers" in (trace.mode or "") else "")


def _dash(trace: Any) -> str:
    return f' stroke-dasharray="{DASHES[trace.line.dash]}"' if trace.line.dash in DASHES else ""


def _color(trace: Any, figure: go.Figure) -> str:
    marker = trace.marker.color if isinstance(trace.marker.color, str) else None
    line = None if trace.type == "bar" else trace.line.color
    colorway = figure.layout.template.layout.colorway or ("#0072B2",)
    return str(line or marker or colorway[list(figure.data).index(trace) % len(colorway)])


def _tip(trace: Any, place: int) -> str:
    """What hovering a point shows: the trace's hover template with its values, as plain text."""
    template = trace.hovertemplate or f"{trace.name or ''} %{{x}}, %{{y}}"

    def value(found: re.Match[str]) -> str:
        values = getattr(trace, found[1], None)
        entry = None if values is None else values[place] if not isinstance(values, str) else values
        return _formatted(entry[int(found[2])] if found[2] else entry, found[3] or "")

    return plain(re.sub(r"%\{(\w+)(?:\[(\d+)\])?(?::([^}]*))?\}", value, re.sub(r"<extra>.*?</extra>", "", template)))


def _formatted(value: Any, form: str) -> str:
    """A value in a format of plotly, as near as Python has it."""
    if value is None or isinstance(value, str):
        return plain(value or "")
    if form.endswith("s"):
        return f"{value:,.0f}"
    return format(value, form.replace("~g", "g")) if form else f"{value:g}"
