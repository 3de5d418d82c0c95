"""Leaves the keys to the control that has the focus, and names sliders for who hears them: part of each panel.

JupyterLab takes arrow keys, Enter and letters as commands on cells wherever the focus is in no text, so that a menu
could not be opened and a button not pressed. Keys with Ctrl, Alt or Shift, and Escape, stay JupyterLab's. And the label
beside a slider is not that of its handle, which a screen reader would call "slider" only; a player's buttons have none.
"""

from __future__ import annotations

import anywidget

_KEYS = """
window.addEventListener("keydown", (event) => {
  const control = event.target.closest?.(".jupyter-widgets");
  const plain = !(event.ctrlKey || event.altKey || event.metaKey || event.shiftKey || event.key === "Escape");
  if (control) event.target.toggleAttribute("data-lm-suppress-shortcuts", plain);
}, true);
function name() {
  for (const handle of document.querySelectorAll(".widget-slider .noUi-handle:not([aria-label])")) {
    const label = handle.closest(".widget-slider").querySelector(".widget-label");
    if (label) handle.setAttribute("aria-label", label.textContent);
  }
  for (const player of document.querySelectorAll(".widget-play"))
    player.querySelectorAll("button:not([aria-label])").forEach((one, place) =>
      one.setAttribute("aria-label", ["play or pause", "back to the beginning"][place] ?? one.title));
}
window.addEventListener("focusin", name, true);
export default {
  render({ el }) {
    el.style.display = "none";
    for (const wait of [0, 500, 2000]) setTimeout(name, wait);  // the others are drawn before or after this one
  }
};
"""


class Keys(anywidget.AnyWidget):
    """Put it among the children of a panel."""

    _esm = _KEYS
