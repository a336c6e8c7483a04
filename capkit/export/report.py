"""Report of an export: every clip with its caption before and after, and what was refused and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from capkit import __version__
from capkit.export.write import report_of
from capkit.files import atomic_writer, now
from capkit.text import escape, is_formula, plain_text, plural

OPENING_WORDS = 4
_TEXT, _NUMBER, _FLAG = "str", "Int64", "boolean"
COLUMNS = {
    **{"video": _TEXT, "file": _TEXT, "status": _TEXT, "reason": _TEXT, "text": _TEXT, "original": _TEXT},
    **{"edited": "bool", "mark": _TEXT, "changed_by": _TEXT, "num_words": _NUMBER, "num_t5_tokens": _NUMBER},
    **{"over_limit": _FLAG, "boilerplate_opening": _TEXT, "near_duplicate": _FLAG},
    **{"same_file_as": _TEXT, "part": _TEXT, "not_taken": _TEXT, "saw": _TEXT, "csv_cell": _TEXT},
    **{"store": _TEXT, "request": _TEXT},
}
"""The table's columns and their types."""
COUNTED = {
    "edited": ("caption", "edited by hand"),
    "near_duplicate": ("caption", "nearly like another clip's"),
    "changed_by": ("caption", "changed by cleaning; the originals are in the report"),
    "same_file_as": ("clip", "with the content of another"),
    "part": ("caption", "of a part of a file: see `part` in the report"),
    "not_taken": ("file", "of which another part has a caption too, which was not taken"),
    "saw": ("caption", "that saw only some seconds of its clip: see `saw` in the report"),
    "csv_cell": ("caption", "that spreadsheets take for formulas: see `csv_cell` in the report"),
}


@dataclass(frozen=True, repr=False)
class ExportReport:
    """What was exported, and what was refused.

    Attributes:
        layout: its name.
        output_dir: the trainer's root.
        shared_openings: the first four words that several captions share: opening, num_captions.
        token_limit: T5 tokens that the trainer keeps.
        read_back: result of reading the folder as the trainer does.
        command: how to start the trainer.
        options: the other arguments of the export.
        num_left_out: captions that were left out because of their marks; another one of the clip may be there instead.
        counts: how many captions were "exported" and "refused" and, of the former, for how many each column of
            `COUNTED` holds, how many are "over_limit", and the "most_tokens" of one; how many "clips" were exported,
            and how many of them with an "empty" caption.
    """

    layout: str
    output_dir: Path
    shared_openings: pd.DataFrame
    token_limit: int
    read_back: str
    command: str
    options: dict[str, Any]
    num_left_out: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def path(self) -> Path:
        """JSON file of the report, beside the root."""
        return report_of(self.output_dir)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each clip of the stores, or for each of its captions if it has several, as written to `path`.

        A million take gigabytes of memory.

        video, store, request: where the caption is from;
        file: the clip in the export, relative to `output_dir`; "" if refused;
        status, reason: "exported" or "refused", and why;
        original, text: the caption before and after cleaning; with the trigger word unless the trainer adds it;
        edited: it was edited by hand;
        mark: "right", "unsure" ..., see `CaptionStore.mark`, or "";
        changed_by: cleaning rules that changed it, "trimmed", or "emptied": its clip is of the empty share;
        num_words, num_t5_tokens, boilerplate_opening: as in `describe`, with the trigger word counted
            as tokens; of exported clips only, like all that follows;
        over_limit: more tokens than `token_limit`;
        near_duplicate: nearly the caption of another clip;
        same_file_as: another clip with the same content, or "";
        part: what of the clip it is a caption of, unless it is the entire file;
        not_taken: another part of the clip that has a caption too, or "";
        saw: how much of that part the captioner saw, such as "24 of 60 s", unless it is all;
        csv_cell: why a spreadsheet that opens the CSV would misread it, or "".
        """
        rows = json.loads(self.path.read_text(encoding="utf-8"))["clips"]
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)

    @property
    def exported(self) -> pd.DataFrame:
        """The rows of clips that were exported."""
        return self.table[self.table["status"] == "exported"]

    @property
    def refused(self) -> pd.DataFrame:
        """The rows of clips that were refused."""
        return self.table[self.table["status"] == "refused"]

    def save(self, rows: Iterable[dict[str, Any]]) -> Path:
        """Write the report to `path` atomically, and count; returns the path.

        Args:
            rows: of `table`, with `COLUMNS` and others, which are left out; what is missing is null.
        """
        content = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "counts"} | {
            "output_dir": str(self.output_dir),
            "shared_openings": self.shared_openings.to_dict("records"),
            "capkit_version": __version__,
            "created": now(),
        }
        head = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1).removesuffix("\n}")
        with atomic_writer(self.path) as file:
            file.write(f'{head},\n "clips": ['.encode(errors="backslashreplace"))
            for number, row in enumerate(rows):
                clip = json.dumps({name: row.get(name) for name in COLUMNS}, ensure_ascii=False, allow_nan=False)
                file.write(f"{',' * (number > 0)}\n  {clip}".encode(errors="backslashreplace"))
                self._count(row)
            file.write(b"\n ]\n}\n")
        return self.path

    def _count(self, row: dict[str, Any]) -> None:
        self.counts[row["status"]] += 1
        if row["status"] == "exported":
            self.counts.update(name for name in ("over_limit", *COUNTED) if row[name])
            self.counts["clips"] += row["is_first"]
            self.counts["empty"] += row["is_first"] and row["is_empty"]
            self.counts["most_tokens"] = max(self.counts["most_tokens"], row["num_t5_tokens"])

    def __str__(self) -> str:
        return "\n".join(map(plain_text, self._lines()))

    __repr__ = __str__

    def _lines(self) -> list[str]:
        """The report in sentences."""
        if num_over := self.counts["over_limit"]:
            tokens = (
                f"{plural(num_over, 'caption')} of more than {self.token_limit} T5 tokens: training cuts off the rest"
            )
        else:
            tokens = f"the longest caption has {self.counts['most_tokens']} T5 tokens; {self.token_limit} are kept"
        marks = " or ".join(self.options["leave_out"])
        left_out = f"{plural(self.num_left_out, 'caption')} left out, marked {marks}; leave_out=[] exports them, too"
        captions = f" with {plural(self.counts['exported'], 'caption')}" if self.options["several"] else ""
        exported = f"{plural(self.counts['clips'], 'clip')}{captions} exported for {self.layout} to {self.output_dir}"
        return [
            f"{exported}, {self.counts['refused']} refused",
            *([f"{plural(num, 'clip')} with an empty caption"] if (num := self.counts["empty"]) else []),
            self.read_back,
            tokens,
            *(f"{plural(num, noun)} {rest}" for name, (noun, rest) in COUNTED.items() if (num := self.counts[name])),
            *([left_out] if self.num_left_out else []),
        ]

    def _repr_html_(self) -> str:
        from capkit.views import CARD, MUTED  # imports torch and matplotlib

        lines = "".join(f"<li>{escape(line)}</li>" for line in self._lines())
        refused = [
            f"<li><bdi>{escape(Path(row.video).name)}</bdi>: {escape(row.reason)}</li>"
            for row in self.refused.head(20).itertuples()
        ]
        if len(self.refused) > len(refused):
            refused.append(f"<li>{len(self.refused) - len(refused)} more in the report</li>")
        refused_list = f"<b>Refused</b><ul>{''.join(refused)}</ul>" if refused else ""
        return (
            f'<div style="{CARD}"><ul>{lines}</ul>{refused_list}'
            f'<span style="{MUTED}">the full report: {escape(str(self.path))}</span></div>'
        )


def shared_openings(texts: Iterable[str]) -> pd.DataFrame:
    """The first four words that several texts share, in lower case, and how many do; the most frequent first."""
    starts = Counter(" ".join(re.findall(r"\w+(?:['’-]\w+)*", text.lower())[:OPENING_WORDS]) for text in texts)
    rows = [(opening, count) for opening, count in starts.most_common(20) if count > 1 and opening]
    return pd.DataFrame(rows, columns=["opening", "num_captions"])


def csv_cell(text: str) -> str:
    """Why a spreadsheet misreads a text in a CSV, or "".

    It is written as it is: a trainer would learn an apostrophe that keeps a spreadsheet from running it.
    """
    return f"begins with {text[0]!r}: spreadsheets take it for a formula" if is_formula(text) else ""
