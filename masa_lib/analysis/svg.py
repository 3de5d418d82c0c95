"""Plotly figures as SVG, for a page that must not carry plotly's five megabytes: matplotlib draws each panel by itself.

Panels flow beside or below each other as the page is wide, so their text stays readable on a phone. What hovering shows
stands in `data-tip` of each mark, filled from the figure's own hover template. Drawn are scatter and bar traces, lines
across a panel, error bars, linear, logarithmic and category axes; deliberately nothing else: the library's figures
are made of these.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, MultipleLocator, NullLocator

from masa_lib.analysis import figures
from masa_lib.analysis.figures import plain
from masa_lib.analysis.records import AnalysisError

#: of a panel, pixels; the height of one with the same scale on both sides, and what a bar adds
WIDTH, HEIGHT, SQUARE, BAR = 400, 270, 370, 26
#: points of a line, at most; marks of all lines of a figure that show themselves when pointed at, about
POINTS, MARKS = 90, 200
DASHES = {"dash": (0, (7, 4)), "dot": (0, (2, 3)), "dashdot": (0, (7, 3, 2, 3))}
#: plotly's marks as matplotlib's, and as a letter for the legend
SHAPES = {"circle": "o●○", "square": "s■□", "diamond": "D◆◇", "cross": "P✚✛", "x": "X✖✕", "triangle-up": "^▲△",
          "triangle-down": "v▼▽", "star": "*★☆"}
#: stand for the page's own colours, which matplotlib does not know
TEXT, PAPER = "#010203", "#fefdfc"
STYLE = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 12, "axes.titlesize": 13,
         "axes.titleweight": 600, "axes.titlelocation": "left", "axes.edgecolor": "#888888", "xtick.color": "#888888",
         "ytick.color": "#888888", "xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT, "axes.labelcolor": TEXT,
         "text.color": TEXT, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.axisbelow": True, "grid.color": "#88888833", "axes.unicode_minus": False,
         "xtick.major.size": 0, "ytick.major.size": 0}
#: what is left out of a drawing, as the page's style says it once for all, and a turn by nothing; a line of the grid
SPARED = re.compile(r'; font-family: [^;"]*|; fill: #010203|; stroke-linecap: square| transform="rotate\(-0 [^"]*"')
GRID = 'style="fill: none; stroke: #888888; stroke-opacity: 0.2; stroke-width: 0.8"'
SVG = "{http://www.w3.org/2000/svg}"
ElementTree.register_namespace("", SVG[1:-1])
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def draw(figure: go.Figure) -> str:
    """The panels of a figure with one legend, as HTML.

    Raises:
        AnalysisError: a trace of it is neither scatter nor bar.
    """
    for trace in figure.data:
        if trace.type not in ("scatter", "scattergl", "bar"):
            raise AnalysisError(f"A page draws scatter and bar traces, and the figure {figure.layout.title.text!r} has "
                                f"one of {trace.type}: make it of these, or write it to a file of its own.")
    with matplotlib.rc_context(STYLE):
        drawn = [Panel(figure, number) for number in _numbers(figure)]
        if any(axis.matches for axis in figure.select_yaxes()):
            ends = [panel.axes.get_ylim() for panel in drawn]
            for panel in drawn:
                panel.axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        shown = "".join(panel.svg() for panel in drawn)
    return f'<div class="plot">{_legend(figure)}<div class="panels">{shown}</div></div>'


def _numbers(figure: go.Figure) -> list[str]:
    """What tells a figure's pairs of axes apart: "", "2", "3", ..."""
    found = {*(axis.plotly_name[5:] for axis in figure.select_xaxes()),
             *((trace.xaxis or "x")[1:] for trace in figure.data)}
    return sorted(found, key=lambda name: int(name or 1))


class Panel:
    """One pair of a figure's axes, drawn by matplotlib; `axes` are its own.

    Args:
        figure: of plotly.
        number: of the pair, as plotly names it.
    """

    def __init__(self, figure: go.Figure, number: str) -> None:
        self.whole, self.name = figure, f"x{number}"
        self.sides = {side: figure.layout[f"{side}axis{number}"] for side in "xy"}
        self.traces = [trace for trace in figure.data
                       if trace.visible in (None, True) and (trace.xaxis or "x") == self.name]
        self.figure = Figure((WIDTH / 72, self._height() / 72), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.title, self.tips, self.ground = self._title(), {}, {}
        self.axes.set_title(self.title)
        if not self.traces:
            self.axes.text(0.5, 0.5, "not measured", ha="center", transform=self.axes.transAxes)
        for side, axis in self.sides.items():
            self._scale(side, axis)
        for trace in self.traces:
            (self._bars if trace.type == "bar" else self._scatter)(trace, _color(trace, figure))
        for side, axis in self.sides.items():
            self._ends(side, axis)
        self._across()

    def svg(self) -> str:
        """The drawing as an element of a page: tips on its marks, the page's colours, nothing that names a file."""
        said = ", ".join(filter(None, (plain(self.whole.layout.title.text or ""), self.title)))
        file = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": f"{said} {self.name}"}):  # marks of a page have names of their own
            self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        root = ElementTree.fromstring(file.getvalue())
        for part in ("metadata", "defs"):  # the latter would style the whole page
            root.remove(root.find(f"{SVG}{part}"))
        for element in root.iter():
            element.text, element.tail = ((text or "").strip() or None for text in (element.text, element.tail))
        for group in root.iter(f"{SVG}g"):
            self._tell(group, *self.tips.get(group.attrib.pop("id", ""), ("", ())))
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": said}
        text = SPARED.sub("", ElementTree.tostring(root, encoding="unicode"))
        text = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
        return text.replace(GRID, 'class="grid"').replace(TEXT, "currentColor").replace(PAPER, "Canvas")

    @staticmethod
    def _tell(group: ElementTree.Element, kind: str, tips: Sequence[str]) -> None:
        """Give the marks of a group their tips, and the group the style that they have in common."""
        marks = [*group.iter(f"{SVG}use")] or [*group.iter(f"{SVG}path")]
        for mark, tip in zip(marks, tips, strict=False):
            mark.attrib["data-tip"] = tip
            group.attrib |= {"class": kind, "style": mark.attrib.pop("style", "")}

    def _height(self) -> int:
        if self.sides["x"].range and self.sides["x"].range == self.sides["y"].range:
            return SQUARE
        bars = len({str(name) for trace in self.traces if trace.orientation == "h" for name in trace.y})
        return 70 + max(40, BAR * bars) if bars else HEIGHT

    def _title(self) -> str:
        """What stands above the panel, among the notes of the figure."""
        x, y = (axis.domain or (0, 1) for axis in self.sides.values())
        return next((plain(note.text) for note in self.whole.layout.annotations if note.xref == "paper"
                     and math.isclose(note.x, sum(x) / 2) and math.isclose(note.y, y[1])), "")

    def _scale(self, side: str, axis: Any) -> None:
        """Title, scale and ticks; an axis without a title, as inside of a grid, has that of another one."""
        every = self.whole.select_xaxes() if side == "x" else self.whole.select_yaxes()
        title = axis.title.text or next((other.title.text for other in every if other.title.text), "")
        self.axes.set(**{f"{side}label": plain(title)})
        own = getattr(self.axes, f"{side}axis")
        if axis.type == "log":
            self.axes.set(**{f"{side}scale": "log"})
            own.set_minor_locator(NullLocator())
        if any(isinstance(value, str) for trace in self.traces for value in _values(trace[side])):
            return  # names, a tick each
        own.set_major_formatter(FuncFormatter(_short))
        if axis.tickvals is not None:
            own.set_major_locator(FixedLocator(axis.tickvals))
        elif axis.dtick:
            own.set_major_locator(MultipleLocator(axis.dtick))
        elif axis.type != "log":
            own.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))

    def _ends(self, side: str, axis: Any) -> None:
        """The range, where the figure gives one; else what matplotlib takes for what is drawn."""
        if axis.range:
            self.axes.set(**{f"{side}lim": [10**end if axis.type == "log" else end for end in axis.range]})
        elif axis.rangemode == "tozero":
            self.axes.set(**{f"{side}lim": (0, None)})
        if axis.autorange == "reversed":
            getattr(self.axes, f"invert_{side}axis")()

    def _across(self) -> None:
        """Dotted lines at one value, and what is written there."""
        style = {"color": "#888888", "linewidth": 1, "linestyle": DASHES["dot"]}
        for line in self.whole.layout.shapes:
            if line.xref == f"{self.name} domain":
                self.axes.axhline(line.y0, **style)
            elif line.xref == self.name:
                self.axes.axvline(line.x0, **style)
        for note in self.whole.layout.annotations:
            if note.xref.split(" ")[0] == self.name:
                self.axes.annotate(plain(note.text), (1, note.y), (-4, -4), ("axes fraction", "data"), ha="right",
                                   va="top", textcoords="offset points")

    def _scatter(self, trace: Any, color: str) -> None:
        """A line, its area, its error bars and its marks, some of which are not seen until they are pointed at."""
        x, y, mode = np.array(_values(trace.x)), _floats(trace.y), trace.mode or "lines"
        kept = figures.thinned(len(x), POINTS)
        if trace.stackgroup:
            ground = self.ground.get(trace.stackgroup, np.zeros(len(y)))
            self.ground[trace.stackgroup] = y = ground + np.nan_to_num(y)
            self.axes.fill_between(x[kept], ground[kept], y[kept], color=color, alpha=0.35, linewidth=0)
        if "lines" in mode:
            self.axes.plot(x[kept], y[kept], color=color, linewidth=0.75 * (trace.line.width or 2), alpha=trace.opacity,
                           linestyle=DASHES.get(trace.line.dash, "-"))
        if trace.error_y.array is not None:
            down = trace.error_y.array if trace.error_y.arrayminus is None else trace.error_y.arrayminus
            self.axes.errorbar(x, y, np.nan_to_num([_floats(down), _floats(trace.error_y.array)]), fmt="none",
                               ecolor=color, elinewidth=1)
        self._marks(trace, x, y, color, "markers" in mode)

    def _marks(self, trace: Any, x: np.ndarray, y: np.ndarray, color: str, shown: bool) -> None:
        """The points of a trace; of a line without markers some that show themselves when pointed at."""
        if trace.hoverinfo == "skip" and not shown:
            return
        places = figures.thinned(len(x), len(x) if shown else max(2, MARKS // len(self.whole.data)))
        places = [place for place in places[:len(x)] if math.isfinite(y[place])]
        shape, open_ = _shape(trace)
        drawn = self.axes.scatter(x[places], y[places], s=((trace.marker.size or 6) * 0.9) ** 2, marker=shape[0],
                                  linewidths=1.5 if open_ else 0, facecolors=PAPER if open_ else color,
                                  edgecolors=color if open_ else "none", alpha=trace.marker.opacity if shown else None,
                                  clip_on=False, zorder=3)
        if trace.hoverinfo != "skip":
            self._tipped(drawn, "p" if shown else "p ghost", [_tip(trace, place) for place in places])

    def _bars(self, trace: Any, color: str) -> None:
        """The bars of a trace, each on what lies below it."""
        flat = trace.orientation == "h"
        names, sizes = (trace.y, trace.x) if flat else (trace.x, trace.y)
        names = [plain(name) if isinstance(name, str) else name for name in names]
        ground = np.array([self.ground.get(name, 0.0) for name in names])
        self.ground |= dict(zip(names, ground + _floats(sizes), strict=True))
        how = {"left": ground} if flat else {"bottom": ground}
        bars = (self.axes.barh if flat else self.axes.bar)(names, _floats(sizes), 0.7, color=color, **how)
        for place, bar in enumerate(bars):
            self._tipped(bar, "p", [_tip(trace, place)])

    def _tipped(self, artist: Any, kind: str, tips: Sequence[str]) -> None:
        """Give an artist a name, by which its marks get their tips once it is drawn."""
        name = f"tips{len(self.tips)}"
        artist.set_gid(name)
        self.tips[name] = kind, tips


def _values(values: Any) -> list[Any]:
    return [] if values is None else list(values)


def _floats(values: Any) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in _values(values)], dtype=float)


def _short(value: float, place: int | None = None) -> str:
    """A tick's text: 20k, 1.5M, 0.25."""
    size, letter = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1, "")
    return f"{value / size:.4g}{letter}"


def _shape(trace: Any) -> tuple[str, bool]:
    """The entry of SHAPES for the marks of a trace, and whether they are open."""
    symbol = trace.marker.symbol or "circle"
    name = symbol.removesuffix("-open")
    return SHAPES.get(name, SHAPES["circle"]), name != symbol


def _legend(figure: go.Figure) -> str:
    """The names of the traces with their colour and mark; nothing where the figure wants none."""
    named: dict[str, str] = {}
    for trace in figure.data:
        if trace.name and trace.showlegend is not False:
            named.setdefault(html.escape(plain(trace.name)), f'<span aria-hidden="true" style="color:'
                             f'{_color(trace, figure)}">{_sign(trace)}</span>')
    if figure.layout.showlegend is False or len(named) < 2:
        return ""
    return f'<ul class="key">{"".join(f"<li>{sign} {name}</li>" for name, sign in named.items())}</ul>'


def _sign(trace: Any) -> str:
    """What stands for a trace in the legend."""
    if trace.type == "bar" or trace.stackgroup:
        return "■"
    line, (shape, open_) = "┅" if trace.line.dash in DASHES else "━", _shape(trace)
    return line + (shape[1 + open_] if "markers" in (trace.mode or "") else line) + line


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
