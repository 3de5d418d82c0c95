"""What panels share that redraw as a whole: many controls set at once are one redraw, and a button acts when pressed.

Deliberately no layout and no numbers: each panel has its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from masa_lib.lessons import environment


class Panel:
    """Observe controls with `_moved`; a panel brings `box`, `presets`, `apply`, `redraw` and `static`."""

    _still = False

    def preset(self, name: str) -> None:
        """Set one of `presets`."""
        self.apply(self.presets[name])

    def _moved(self, change: Any) -> None:
        if not self._still:
            self.redraw()

    @contextlib.contextmanager
    def _one_redraw(self) -> Iterator[None]:
        """Controls change inside without a redraw each; one redraw at the end."""
        outer, self._still = self._still, True
        try:
            yield
        finally:
            self._still = outer
        if not outer:
            self.redraw()

    def _ipython_display_(self) -> None:
        display(self.static() if environment.STATIC else self.box)


def button(label: str, act: Callable[[], Any], **more: Any) -> widgets.Button:
    """A button as wide as its label; `more` goes to ipywidgets."""
    made = widgets.Button(description=label, layout={"width": "auto"}, **more)
    made.on_click(lambda _: act())
    return made
