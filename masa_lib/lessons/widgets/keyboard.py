"""Leaves the keys to the control that has the focus: part of each panel, drawn nowhere.

JupyterLab takes arrow keys, Enter and letters as commands on cells wherever the focus is in no text, so that a menu
could not be opened and a button not pressed. Keys with Ctrl, Alt or Shift, and Escape, stay JupyterLab's.
"""

from __future__ import annotations

import anywidget

_KEYS = """
window.addEventListener("keydown", (event) => {
  const control = event.target.closest?.(".jupyter-widgets");
  const plain = !(event.ctrlKey || event.altKey || event.metaKey || event.shiftKey || event.key === "Escape");
  if (control) event.target.toggleAttribute("data-lm-suppress-shortcuts", plain);
}, true);
export default { render({ el }) { el.style.display = "none"; } };
"""


class Keys(anywidget.AnyWidget):
    """Put it among the children of a panel."""

    _esm = _KEYS
