"""What an export did: every clip with its caption before and after, what was refused and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from capkit import __version__
from capkit.files import atomic_write

OPENING_WORDS = 4
COLUMNS = (
    *("video", "file", "status", "reason", "text", "original", "edited", "changed_by", "num_words", "num_t5_tokens"),
    *("t5_is_estimate", "over_limit", "boilerplate_opening", "near_duplicate", "same_file_as", "store", "request"),
)


@dataclass(frozen=True, repr=False)
class ExportReport:
    """What was exported, and what was not.

    Attributes:
        layout: its name.
        output_dir: the trainer's root.
        table: a row for each clip of the stores:
            video, store, request: where the caption is from;
            file: the clip in the export, relative to `output_dir`; "" if refused;
            status, reason: "exported" or "refused", and why;
            original, text: the caption before and after cleaning; with the trigger word if no trainer adds it;
            edited: it was written by hand;
            changed_by: cleaning rules that changed it, and "trimmed";
            num_words, num_t5_tokens, t5_is_estimate, boilerplate_opening: as `describe` has them,
                the trigger word counted; of exported clips only, as all that follows;
            over_limit: more tokens than `threshold`;
            near_duplicate: nearly the caption of another clip; same_file_as: another clip with the same content, or "".
        shared_openings: the first four words that several captions share: opening, num_captions.
        token_limit: T5 tokens that the trainer keeps.
        threshold: where captions count as too long: `token_limit`, or a tenth less where tokens are estimated.
        read_back: what reading the folder as the trainer does has shown.
        command: how to start the trainer.
        options: what the export was asked for.
    """

    layout: str
    output_dir: Path
    table: pd.DataFrame
    shared_openings: pd.DataFrame
    token_limit: int
    threshold: int
    read_back: str
    command: str
    options: dict[str, Any]

    @property
    def path(self) -> Path:
        """Where the report is kept as JSON: beside the root, for within it a trainer might take it for data."""
        return self.output_dir.with_name(f"{self.output_dir.name}.export.json")

    @property
    def exported(self) -> pd.DataFrame:
        """The rows of clips that were exported."""
        return self.table[self.table["status"] == "exported"]

    @property
    def refused(self) -> pd.DataFrame:
        """The rows of clips that were not."""
        return self.table[self.table["status"] == "refused"]

    def save(self) -> Path:
        """Write the report to `path`, whole or not at all; returns where."""
        content = {
            **{"layout": self.layout, "output_dir": str(self.output_dir), "read_back": self.read_back},
            **{"token_limit": self.token_limit, "threshold": self.threshold, "command": self.command},
            **{"options": self.options, "shared_openings": self.shared_openings.to_dict("records")},
            "clips": [{k: None if v is pd.NA else v for k, v in row.items()} for row in self.table.to_dict("records")],
            **{"capkit_version": __version__, "created": datetime.now(timezone.utc).isoformat(timespec="seconds")},
        }
        return atomic_write(self.path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1))

    def __str__(self) -> str:
        return "\n".join(self._told())

    __repr__ = __str__

    def _told(self) -> list[str]:
        done = self.exported
        lines = [
            f"{len(done)} clips exported for {self.layout} to {self.output_dir}, {len(self.refused)} refused",
            self.read_back,
        ]
        how = "estimated" if done["t5_is_estimate"].any() else "counted"
        if num_over := int(done["over_limit"].sum()):
            than = f"{self.token_limit} T5 tokens" if how == "counted" else f"{self.threshold} T5 tokens (estimated)"
            lines.append(f"{num_over} captions have more than {than}: training may cut their ends off")
        else:
            longest = int(done["num_t5_tokens"].max())
            lines.append(f"the longest caption has {longest} T5 tokens ({how}); {self.token_limit} are kept")
        told = {"edited": "written by hand", "near_duplicate": "nearly repeat another clip's"}
        lines += [f"{int(done[name].sum())} captions {words}" for name, words in told.items() if done[name].any()]
        if num_changed := int(done["changed_by"].ne("").sum()):
            lines.append(f"{num_changed} captions changed by cleaning; the report has what was there")
        if num_same := int(done["same_file_as"].ne("").sum()):
            lines.append(f"{num_same} clips are copies of another")
        return lines

    def _repr_html_(self) -> str:
        from capkit.views import CARD, MUTED

        listed = "".join(f"<li>{escape(line)}</li>" for line in self._told())
        refused = [f"<li><bdi>{escape(Path(row.video).name)}</bdi>: {escape(row.reason)}</li>" for row in
                   self.refused.head(20).itertuples()]  # fmt: skip
        more = f"<li>{len(self.refused) - 20} more in the report</li>" if len(self.refused) > 20 else ""
        told = f"<b>Refused</b><ul>{''.join(refused)}{more}</ul>" if refused else ""
        return (
            f'<div style="{CARD}"><ul>{listed}</ul>{told}'
            f'<span style="{MUTED}">the whole report: {escape(str(self.path))}</span></div>'
        )


def shared_openings(texts: Sequence[str]) -> pd.DataFrame:
    """The first four words that several texts share, in lower case, and how many do; the most frequent first."""
    starts = Counter(" ".join(re.findall(r"\w+(?:['’-]\w+)*", text.lower())[:OPENING_WORDS]) for text in texts)
    rows = [(opening, count) for opening, count in starts.most_common(20) if count > 1 and opening]
    return pd.DataFrame(rows, columns=["opening", "num_captions"])
