"""Results of `capkit.benchmark`: reading the file, lines, tables, and a table for a README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit.files import read_regular

if TYPE_CHECKING:
    import pandas as pd

_MORE = {
    "captions_an_hour": "{:.0f} captions an hour",
    "tokens_per_second": "{:.0f} tokens a second",
    "scorings": "as long as {:.1f} scorings",
    "share_of_bandwidth": "{:.0%} of the memory's rate",
    "share_of_matmul": "{:.0%} of the matrix units' rate",
}


def read_results(path: str | Path) -> dict[str, Any]:
    """The results in a file that `Benchmark.run` wrote.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    try:
        results = json.loads(read_regular(Path(path).expanduser()))
        missing = {"size", "machine", "limits", "rows", "profile", "command"} - set(results)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not results of python -m capkit.benchmark: {error}") from error
    if missing:
        raise ValueError(f"{path}: not results of python -m capkit.benchmark: has no {', '.join(sorted(missing))}")
    return results


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    more = [text.format(row[name]) for name, text in _MORE.items() if name in row]
    more += [f"equal: {row['equal']}"] if row["equal"] else []
    baseline, value = (f"{row[name]:.3g} {row['unit']}" for name in ("baseline_value", "value"))
    return f"{row['name']}: {value} against {baseline}, x {row['ratio']:.2f}" + (f"; {', '.join(more)}" if more else "")


def warning_if_busy(machine: dict[str, Any]) -> str:
    """That other programs took cores that the benchmark needs, or nothing; `machine` as in the results."""
    cores, others = machine["cores"], machine.get("other_cores", 0.0)
    needed = 1 if machine["gpu"] else machine["torch_threads"]
    if others + needed <= cores + 0.2:
        return ""
    return (
        f"The machine was busy: other programs used up to {others:.1f} of {cores} cores, and this benchmark needs "
        f"{needed}. Do not quote these seconds, and take the ratios as rough."
    )


def to_frame(results: dict[str, Any]) -> pd.DataFrame:
    """One row a figure: `part`, `name`, `baseline`, `unit`, `baseline_value`, `value`, `ratio`, `equal`, and more."""
    import pandas as pd

    return pd.DataFrame(results["rows"])


def profile_table(results: dict[str, Any]) -> pd.DataFrame:
    """The operations that took the most time of each stage, plain beside capkit: share in %, calls, operation."""
    import pandas as pd

    table = pd.DataFrame(results["profile"], columns=["stage", "way", "operation", "calls", "share"])
    table["text"] = [
        f"{row.share:.0%} {row.operation.split('::')[-1].removeprefix('_')} ({row.calls} calls)"
        for row in table.itertuples()
    ]
    table["place"] = table.groupby(["stage", "way"]).cumcount() + 1
    return table.pivot(index=["stage", "place"], columns="way", values="text")[["plain", "capkit"]]


def parts_of_a_caption(results: dict[str, Any]) -> pd.DataFrame:
    """Seconds that one caption spends in each stage, by column; rows "plain" and "capkit".

    Raises:
        ValueError: the stages or the captions were not measured.
    """
    import pandas as pd

    starts = {"vision tower": "vision tower", "prefill": "prefill", "decoding": "a token while decoding, 1 "}
    starts["the rest"] = "one caption"
    seconds = {}
    for stage, start in starts.items():
        rows = [row for row in results["rows"] if row["name"].startswith(start)]
        if not rows:
            raise ValueError(f"{stage} was not measured; parts must include stages and captions")
        seconds[stage] = {"plain": rows[0]["baseline_value"], "capkit": rows[0]["value"]}
    table = pd.DataFrame(seconds)
    table["decoding"] *= results["model"]["num_tokens"] - 1
    table["the rest"] = (table["the rest"] - table.drop(columns="the rest").sum(axis="columns")).clip(lower=0)
    return table


def as_markdown(results: dict[str, Any]) -> str:
    """The rows as a Markdown table, with the command and the machine that made them."""
    machine = results["machine"]
    on = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers"))
    lines = [f"`{results['command']}`: {on}, {results['model']['dtype']}, {versions}", ""]
    lines += [warning, ""] if (warning := warning_if_busy(machine)) else []
    lines += ["| | plain | capkit | ratio | memory rate | matrix rate | equal |", "|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        values = [f"{row[name]:.3g} {row['unit']}" for name in ("baseline_value", "value")]
        shares = [f"{row[name]:.0%}" if name in row else "" for name in ("share_of_bandwidth", "share_of_matmul")]
        lines.append(" | ".join([f"| {row['name']}", *values, f"{row['ratio']:.2f}", *shares, f"{row['equal']} |"]))
    return "\n".join(lines)
