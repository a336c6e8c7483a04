"""Index page of a batch: every run with its status, its headline and links to its files."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from capkit import __version__
from capkit.batch.table import Run, Table
from capkit.files import now, write_page
from capkit.text import escape

COLOURS = {"done": "#009e73", "failed": "#d55e00", "running": "#0072b2"}


def write_index(table: Table) -> Path:
    """Write the index page into the table's output folder; returns its path."""
    counts = Counter(run.read_status()["status"] for run in table.runs)
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    heads = "".join(f'<th style="text-align:left">{name}</th>' for name in ("run", "status", "headline", "files"))
    body = (
        f"<p>{escape(str(table.path))}: {summary}</p>"
        f'<table cellpadding="6"><tr>{heads}</tr>{"".join(map(_row, table.runs))}</table>'
        f"<p>capkit {__version__}, {now()}</p>"
    )
    return write_page(table.output_dir / "index.html", "Runs", body)


def _row(run: Run) -> str:
    status = run.read_status()
    state = status["status"]
    notebook = run.folder / run.notebook.name
    page = notebook.with_suffix(".html")
    name = _link(page, run, run.name) if page.exists() else escape(run.name)
    varied = ", ".join(f"{key}={json.dumps(run.parameters[key], ensure_ascii=False)}" for key in run.varied)
    duration = f"<br><small>{status['seconds']:g} s</small>" if "seconds" in status else ""
    message = escape(status.get("error") or status.get("headline") or "")
    files = {"notebook": notebook, "log": run.folder / "log.txt", "results": run.results_dir}
    links = " ".join(_link(path, run, text) for text, path in files.items() if path.exists())
    return (
        f'<tr style="vertical-align:top"><td>{name}<br><small>{escape(varied)}</small></td>'
        f'<td style="white-space:nowrap;color:{COLOURS.get(state, "inherit")}">{escape(state)}{duration}'
        f'</td><td style="white-space:pre-wrap;overflow-wrap:anywhere">{message}</td><td>{links}</td></tr>'
    )


def _link(path: Path, run: Run, text: str) -> str:
    target = os.path.relpath(path, run.batch_dir).replace(os.sep, "/")
    return f'<a href="{escape(quote(target))}">{escape(text)}</a>'
