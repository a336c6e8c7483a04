"""Keys of the panels: a script in the page presses the button that a key stands for."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
from IPython.display import Javascript, display

from capkit.playground.kept import Kept

# ipywidgets tells the kernel of no keys. A key counts in the panel that has the focus, or that was clicked last where
# the focus fell back to what surrounds it: to a page whose focused button was disabled, or to the notebook. It never
# reaches Lab, which would run the cell again (Ctrl+Enter), or add one (A, B).
_SCRIPT = """
window.capkitKeys ??= (() => {
  const panelOf = node => node.closest?.(".capkit-keys"), boxes = "input, textarea, select, [contenteditable=true]";
  let last = null;
  document.addEventListener("pointerdown", event => { last = panelOf(event.target); }, true);
  document.addEventListener("focusin", event => {
    last = panelOf(event.target) ?? (event.target.contains(last) ? last : null);
  }, true);
  window.addEventListener("keydown", event => {
    const at = event.target, panel = panelOf(at) ?? (last && at.contains(last) ? last : null);
    if (!panel || event.isComposing || event.altKey || event.shiftKey) return;
    const key = (event.ctrlKey || event.metaKey ? "ctrl-" : "") + event.key.toLowerCase();
    const isTyped = at.matches(boxes) || (at.matches("[role=slider], video") && key.startsWith("arrow"));
    if (isTyped && key != "ctrl-enter" && key != "escape") return;
    const button = panel.querySelector(".capkit-key-" + CSS.escape(key));
    if (!button ? !/^[a-z0-9]$/.test(key) : key == "escape" && button.disabled) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (!button || button.disabled || event.repeat) return;
    if (at.matches(boxes)) at.dispatchEvent(new Event("change", {bubbles: true}));  // some tell the kernel when left
    button.click();
  }, true);
  return true;
})();
"""


class KeyPanel(Kept):
    """A panel whose buttons have keys: a button gets one from `with_key`."""

    def __init__(self, children: Any, **settings: Any) -> None:
        super().__init__(children, tabbable=True, **settings)
        self.add_class("capkit-keys")

    def _ipython_display_(self) -> None:
        super()._ipython_display_()
        display(Javascript(_SCRIPT))


def with_key(button: widgets.Button, *keys: str) -> widgets.Button:
    """The button, pressed by these keys too, named as in `KeyboardEvent.key`, such as "a", "escape", "ctrl-enter"."""
    for key in keys:
        button.add_class(f"capkit-key-{key}")
    return button
