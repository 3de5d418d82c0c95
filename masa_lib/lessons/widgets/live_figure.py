"""The figure of the training panel and the meter of costs below it, renewed in place while a run grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from masa_lib.analysis.costs import totals
from masa_lib.lessons.widgets import ghost as ghosts
from masa_lib.lessons.widgets import knobs
from masa_lib.lessons.widgets import training_view as view
from masa_lib.lessons.widgets.training_records import Records


class LiveFigure:
    """`figure` and `meter` are widgets.

    Args:
        records: to begin with.
        ghost: recorded runs of one arm, a seed each, that are drawn behind; none for none.
    """

    def __init__(self, records: Records, ghost: Sequence[str | Path] = ()) -> None:
        self._paths, self._ghost, self._asked = tuple(ghost), None, None
        self.figure, self.meter = go.FigureWidget(view.figure(records)), knobs.text("110px")

    def draw(self, records: Records) -> None:
        """Show these records: the numbers in place where the curves are the same as before."""
        self._find_ghost(records)
        drawn = view.figure(records, self._ghost)
        if [trace.name for trace in drawn.data] == [trace.name for trace in self.figure.data]:
            self._renew(drawn)
        else:
            self.figure.data = ()
            self.figure.add_traces(drawn.data)
            self.figure.layout = drawn.layout
        self.meter.value = self._metered(records)

    def clear(self) -> None:
        """Forget the curves: those of another run come in their place."""
        self.figure.data = ()

    def bundle(self, records: Records) -> dict[str, Any]:
        """The figure for a page without widgets."""
        return view.figure(records, self._ghost)._repr_mimebundle_()

    def _renew(self, drawn: go.Figure) -> None:
        with self.figure.batch_update():
            for old, new in zip(self.figure.data, drawn.data, strict=True):
                old.update(x=new.x, y=new.y, text=new.text, customdata=new.customdata, showlegend=new.showlegend)
                if new.name == "belief":
                    old.marker.size = new.marker.size
            self.figure.layout.annotations = drawn.layout.annotations
            self.figure.layout.shapes = drawn.layout.shapes
            accuracy = f"xaxis{view.ACCURACY + 1}"
            self.figure.layout[accuracy].range = drawn.layout[accuracy].range

    def _find_ghost(self, records: Records) -> None:
        """The ghost on the problems of the newest evaluation; read again only where these are others."""
        if self._paths:
            tables = records.tables
            asked = tuple(tables[max(tables)]["problem_id"]) if tables else ()
            if asked != self._asked:
                self._ghost, self._asked = ghosts.read(self._paths, asked), asked

    def _metered(self, records: Records) -> str:
        """What was spent by now, beside what the ghost had spent for as much."""
        if records.metrics.empty:
            return ""
        spent = totals(records.metrics)[list(ghosts.SHOWN)].iloc[-1]
        return ghosts.meter_html(ghosts.curve(records.metrics, records.evaluations), spent, self._ghost)
