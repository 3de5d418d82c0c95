"""The paper's claims as a table that one can filter: by version, by verdict and by words."""

from __future__ import annotations

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML

from masa_lib.lessons import paper_claims
from masa_lib.lessons.widgets.keyboard import Keys
from masa_lib.lessons.widgets.panel import Panel, button

_STYLE, _WIDE = {"description_width": "auto"}, {"width": "auto"}
#: what a menu says where everything is shown
ALL = "all"


class ClaimTable(Panel):
    """Two menus, a field for words, a button that resets them, and the claims that are left.

    Args:
        claims: as `paper_claims.everything` gives them.
    """

    def __init__(self, claims: pd.DataFrame) -> None:
        self.claims = claims
        self.version = widgets.Dropdown(options=[ALL, *dict.fromkeys(claims["version"])], description="version",
                                        style=_STYLE, layout=_WIDE)
        self.verdict = widgets.Dropdown(options=[ALL, *paper_claims.VERDICTS], description="verdict", style=_STYLE,
                                        layout=_WIDE)
        self.words = widgets.Text(description="words", placeholder="for instance: gating", style=_STYLE)
        self.count, self.page = widgets.HTML(), widgets.HTML(layout={"max_height": "420px", "overflow": "auto"})
        self.box = widgets.VBox([
            widgets.HBox([self.version, self.verdict, self.words, button("reset", self.reset, icon="undo")],
                         layout={"flex_flow": "row wrap"}), self.count, self.page, Keys()])
        for control in (self.version, self.verdict, self.words):
            control.observe(self._moved, "value")
        self.redraw()

    def reset(self) -> None:
        """Show all claims again."""
        with self._one_redraw():
            self.version.value, self.verdict.value, self.words.value = ALL, ALL, ""

    def redraw(self) -> None:
        """Put the chosen claims into the page, and say how many there are."""
        picked = [control.value.replace(ALL, "") for control in (self.version, self.verdict)]
        left = paper_claims.chosen(self.claims, *picked, self.words.value)
        self.count.value = f"<span role='status'>{len(left)} of {len(self.claims)} claims</span>"
        self.page.value = paper_claims.as_table(left)

    def static(self) -> HTML:
        """All claims, folded, for a page without widgets."""
        return HTML(f"<details><summary>{len(self.claims)} claims (in JupyterLab: with a filter)</summary>"
                    f"{paper_claims.as_table(self.claims)}</details>")
