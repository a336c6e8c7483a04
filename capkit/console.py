"""Progress: bars where somebody watches, lines of text elsewhere.

tqdm's own bar for notebooks is a widget, of which a saved notebook keeps only that it began, at 0 %.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0  # least time between lines


def progress_bar() -> type[tqdm]:
    """The class of progress bars that suits where this runs: lines where nobody watches, else bars."""
    if not is_interactive():
        return ProgressLines
    return tqdm if _kernel() is None else NotebookBar


def is_interactive() -> bool:
    """True in a live notebook or a terminal, False under papermill or in a log file."""
    kernel = _kernel()
    if kernel is None:
        return sys.stderr.isatty()
    return bool(kernel.get_parent().get("content", {}).get("allow_stdin"))  # papermill sets it to False


def _kernel() -> Any:
    """The notebook's kernel, or None outside of notebooks."""
    shell = sys.modules["IPython"].get_ipython() if sys.modules.get("IPython") else None
    return getattr(shell, "kernel", None)


class ProgressLines(tqdm):
    """A progress bar of tqdm's that prints a line now and then, and one at the end.

    In a log file, the usual bar is a line of redrawings.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._last_line = time.monotonic()
        text = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left"
        super().__init__(*args, **kwargs | {"bar_format": text, "file": io.StringIO()})

    def display(self, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print()

    def close(self) -> None:
        if not self.disable and self.n:
            self._print()
        super().close()

    def _print(self) -> None:
        self._last_line = time.monotonic()
        text = str(self).replace(": : ", ": ")  # tqdm adds a colon to some descriptions
        print(text, file=sys.stderr if _kernel() is None else sys.stdout, flush=True)


class NotebookBar(tqdm):
    """A progress bar of tqdm's in one output of a notebook, which stays as it was last when the notebook is saved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._handle: Any = None
        super().__init__(*args, **{"ncols": 100} | kwargs | {"file": io.StringIO()})

    def display(self, *args: Any, **kwargs: Any) -> None:
        from IPython.display import display

        shown = {"text/plain": str(self)}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def close(self) -> None:
        if not self.disable:
            self.display()
        super().close()
