"""Where a plotly figure's panels, scales and stacked traces lie, in pixels: the arithmetic behind `svg`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go

WIDTH, HEIGHT, SQUARE = 400, 270, 370
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 44


@dataclass
class Axis:
    """A scale from values to pixels.

    Attributes:
        kind: linear, log or category.
        names: of a category axis, in their order.
        low, high: its ends, as they are placed (logarithms of a log axis).
        start, end: their pixels.
        title: beside it.
        fixed: tick values that the figure asks for.
    """

    kind: str
    title: str
    start: float
    end: float
    low: float = 0.0
    high: float = 1.0
    names: list[str] = field(default_factory=list)
    fixed: list[float] = field(default_factory=list)

    def place(self, values: Any) -> np.ndarray:
        """Values as they are placed, before they are scaled; NaN where there is nothing."""
        if self.kind == "category":
            return np.array([self.names.index(str(value)) for value in values], dtype=float)
        numbers = np.array([math.nan if value is None else value for value in values], dtype=float)
        return np.log10(np.where(numbers > 0, numbers, math.nan)) if self.kind == "log" else numbers

    def pixels(self, placed: np.ndarray) -> np.ndarray:
        """Where what was placed is drawn."""
        return self.start + (placed - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixel and text of each tick."""
        if self.kind == "category":
            return list(zip(self.pixels(np.arange(len(self.names), dtype=float)), self.names, strict=True))
        values = [value for value in self.fixed or _round_steps(self.low, self.high)
                  if self.low <= (math.log10(value) if self.kind == "log" else value) <= self.high]
        step = min(np.diff(values), default=1.0)
        return list(zip(self.pixels(self.place(values)), (_short(value, step) for value in values), strict=True))


@dataclass
class Panel:
    """The traces, shapes and notes of one pair of axes."""

    x: Axis
    y: Axis
    title: str
    height: int
    traces: list[Any]
    lines: list[Any]
    notes: list[Any]


def panels(figure: go.Figure) -> list[Panel]:
    """A figure's panels in their order, their scales set to what they hold."""
    numbers = dict.fromkeys([*(axis.plotly_name[5:] for axis in figure.select_xaxes()),
                             *((trace.xaxis or "x")[1:] for trace in figure.data)])
    return [_panel_of(figure, number) for number in sorted(numbers, key=lambda name: int(name or 1))]


def _panel_of(figure: go.Figure, number: str) -> Panel:
    """The panel of one pair of axes."""
    layout, name = figure.layout, f"x{number}"
    axes = {side: layout[f"{side}axis{number}"] for side in "xy"}
    traces = [trace for trace in _visible(figure) if (trace.xaxis or "x") == name]
    height = _height(list(axes.values()), traces)
    names = [len(name) for trace in traces if trace.orientation == "h" for name in map(str, trace.y)]
    ends = {"x": (max([LEFT, *(12 + 7 * length for length in names)]), WIDTH - RIGHT), "y": (height - BOTTOM, TOP)}
    x, y = (_axis(axis, _title(figure, axis, side), _alike(figure, axis, f"{side}{number}", side), side, ends[side],
                  layout.barmode) for side, axis in axes.items())
    middle, top = sum(axes["x"].domain or (0, 1)) / 2, (axes["y"].domain or (0, 1))[1]
    title = next((note.text for note in layout.annotations if note.xref == "paper" and math.isclose(note.x, middle)
                  and math.isclose(note.y, top)), "")
    lines, notes = ([part for part in parts if part.xref.split(" ")[0] == name] for parts in (
        [shape for shape in layout.shapes if shape.type == "line"], layout.annotations))
    return Panel(x, y, title, height, traces, lines, notes)


def _title(figure: go.Figure, axis: Any, side: str) -> str:
    """The title of an axis; where it has none, as inside of a grid, that of another one."""
    every = figure.select_xaxes() if side == "x" else figure.select_yaxes()
    return axis.title.text or next((other.title.text for other in every if other.title.text), "")


def _alike(figure: go.Figure, axis: Any, own: str, side: str) -> list[Any]:
    """The traces that set an axis's range: its own, and those of the axes that it shares a scale with."""
    shared = {own}
    for other in figure.select_xaxes() if side == "x" else figure.select_yaxes():
        name = other.plotly_name.replace("axis", "")
        if (other.matches or name) == (axis.matches or own):
            shared.add(name)
    return [trace for trace in _visible(figure) if (trace[f"{side}axis"] or side) in shared]


def _visible(figure: go.Figure) -> list[Any]:
    return [trace for trace in figure.data if trace.visible in (None, True)]


def _height(axes: Sequence[Any], traces: Sequence[Any]) -> int:
    """Of a panel: more where both sides have one scale or there are many bars."""
    if axes[0].range and axes[0].range == axes[1].range:
        return SQUARE
    bars = len({str(name) for trace in traces if trace.type == "bar" and trace.orientation == "h" for name in trace.y})
    return max(HEIGHT if not bars else TOP + BOTTOM + 40, TOP + BOTTOM + 26 * bars)


def _axis(axis: Any, title: str, traces: Sequence[Any], side: str, ends: tuple[float, float], barmode: str | None,
          ) -> Axis:
    """The scale of an axis from its range, or from its traces."""
    given = [value for trace in traces for value in (() if trace[side] is None else trace[side])]
    kind = "log" if axis.type == "log" else "category" if any(isinstance(value, str) for value in given) else "linear"
    scale = Axis(kind, plain(title), *ends, names=list(dict.fromkeys(map(str, given))) if kind == "category" else [],
                 fixed=list(axis.tickvals if axis.tickvals is not None else ()))
    if axis.range:
        scale.low, scale.high = axis.range
    elif kind == "category":
        scale.low, scale.high = -0.5, len(scale.names) - 0.5
    else:
        scale.low, scale.high = _reach(scale, traces, side, barmode, axis.rangemode == "tozero")
    if axis.dtick and kind == "linear":
        scale.fixed = list(np.arange(math.ceil(scale.low / axis.dtick), scale.high / axis.dtick + 1e-9) * axis.dtick)
    if side == "y" and kind == "category" and axis.autorange == "reversed":
        scale.low, scale.high = scale.high, scale.low
    return scale


def _reach(scale: Axis, traces: Sequence[Any], side: str, barmode: str | None, to_zero: bool) -> tuple[float, float]:
    """The ends of what is drawn, with a little room."""
    values = [np.zeros(1)] if to_zero else []
    for trace, (x, y, low, high) in zip(traces, stacked(traces, barmode), strict=True):
        bar = trace.type == "bar" and (trace.orientation == "h") == (side == "x")
        values += [np.append(x if side == "x" else high, 0 if bar else math.nan)]
        values += [low] if side == "y" and not bar else [np.array([math.nan])] if side == "x" else [y]
    known = np.concatenate([scale.place(part) for part in values] or [np.array([0.0, 1.0])])
    known = known[np.isfinite(known)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    room = 0.04 * (high - low) or 0.5
    return float(low - room * bool(low)), float(high + room)


def stacked(traces: Sequence[Any], barmode: str | None) -> list[tuple[np.ndarray, ...]]:
    """Of each trace x, y, and the ends of its error bars; what is stacked stands on what was before it."""
    ground: dict[Any, float] = {}
    found = []
    for trace in traces:
        x, y = (np.array([] if trace[side] is None else trace[side], dtype=object) for side in "xy")
        flat = trace.type == "bar" and trace.orientation == "h"
        if trace.stackgroup if trace.type != "bar" else barmode in ("stack", "relative", None):
            keys = [(trace.xaxis, trace.yaxis, key) for key in (y if flat else x)]
            own = x if flat else y
            top = np.array([ground.get(key, 0.0) + (value or 0) for key, value in zip(keys, own, strict=True)])
            ground |= dict(zip(keys, top, strict=True))
            x, y = (top, y) if flat else (x, top)
        words = not len(y) or any(isinstance(value, str) for value in y)
        found.append((x, y, y, y) if words else (x, y, *_error(trace, _floats(y))))
    return found


def _error(trace: Any, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the error bars about y; y itself where there are none."""
    up = trace.error_y.array
    if up is None:
        return y, y
    down = up if trace.error_y.arrayminus is None else trace.error_y.arrayminus
    return y - np.nan_to_num(_floats(down)), y + np.nan_to_num(_floats(up))


def _floats(values: Iterable[Any]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def plain(text: str) -> str:
    """Text without tags; a break becomes a line's end."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br ?/?>", "\n", text)))


def _round_steps(low: float, high: float) -> list[float]:
    """Six or so round values between two ends."""
    raw = (high - low) / 6 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= raw * 0.999)
    return [round(float(step * place), 12) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float, step: float) -> str:
    """A tick's text: 2k, 1.5M, 0.25."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size or (value and abs(value) >= size / 2 and step >= size / 10):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
