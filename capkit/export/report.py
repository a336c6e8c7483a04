"""Report of an export: every clip with its caption before and after, and what was refused and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from capkit import __version__
from capkit.files import atomic_writer, now
from capkit.text import escape, plain_text

OPENING_WORDS = 4
COLUMNS = (
    *("video", "file", "status", "reason", "text", "original", "edited", "changed_by", "num_words", "num_t5_tokens"),
    *("t5_is_estimate", "over_limit", "boilerplate_opening", "near_duplicate", "same_file_as", "store", "request"),
)


@dataclass(frozen=True, repr=False)
class ExportReport:
    """What was exported, and what was refused.

    Attributes:
        layout: its name.
        output_dir: the trainer's root.
        table: a row for each clip of the stores:
            video, store, request: where the caption is from;
            file: the clip in the export, relative to `output_dir`; "" if refused;
            status, reason: "exported" or "refused", and why;
            original, text: the caption before and after cleaning; with the trigger word unless the trainer adds it;
            edited: it was edited by hand;
            changed_by: cleaning rules that changed it, and "trimmed";
            num_words, num_t5_tokens, t5_is_estimate, boilerplate_opening: as in `describe`, with the trigger word
                counted as tokens; of exported clips only, like all that follows;
            over_limit: more tokens than `threshold`;
            near_duplicate: nearly the caption of another clip;
            same_file_as: another clip with the same content, or "".
        shared_openings: the first four words that several captions share: opening, num_captions.
        token_limit: T5 tokens that the trainer keeps.
        threshold: where captions count as too long: `token_limit`, or a tenth less if tokens are estimated.
        read_back: result of reading the folder as the trainer does.
        command: how to start the trainer.
        options: the other arguments of the export.
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
        """JSON file of the report; beside the root, because a trainer might take it for data inside."""
        return self.output_dir.with_name(f"{self.output_dir.name}.export.json")

    @property
    def exported(self) -> pd.DataFrame:
        """The rows of clips that were exported."""
        return self.table[self.table["status"] == "exported"]

    @property
    def refused(self) -> pd.DataFrame:
        """The rows of clips that were refused."""
        return self.table[self.table["status"] == "refused"]

    def save(self) -> Path:
        """Write the report to `path` atomically, clip by clip; returns the path."""
        content = vars(self) | {
            "output_dir": str(self.output_dir),
            "shared_openings": self.shared_openings.to_dict("records"),
            "capkit_version": __version__,
            "created": now(),
        }
        del content["table"]
        head = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1).removesuffix("\n}")
        with atomic_writer(self.path) as file:
            file.write(f'{head},\n "clips": ['.encode(errors="backslashreplace"))
            for start in range(0, len(self.table), 1000):
                for number, row in enumerate(self.table[start : start + 1000].to_dict("records"), start):
                    values = {name: None if value is pd.NA else value for name, value in row.items()}
                    clip = json.dumps(values, ensure_ascii=False, allow_nan=False)
                    file.write(f"{',' * (number > 0)}\n  {clip}".encode(errors="backslashreplace"))
            file.write(b"\n ]\n}\n")
        return self.path

    def __str__(self) -> str:
        return "\n".join(map(plain_text, self._lines()))

    __repr__ = __str__

    def _lines(self) -> list[str]:
        """The report in sentences."""
        table = self.exported
        is_estimate = bool(table["t5_is_estimate"].any())
        if num_over := int(table["over_limit"].sum()):
            limit = f"{self.threshold} T5 tokens (estimated)" if is_estimate else f"{self.token_limit} T5 tokens"
            tokens = f"{num_over} captions have more than {limit}: training may cut their ends off"
        else:
            tokens = f"the longest caption has {int(table['num_t5_tokens'].max())} T5 tokens "
            tokens += f"({'estimated' if is_estimate else 'counted'}); {self.token_limit} are kept"
        counts = {
            "captions were edited by hand": table["edited"],
            "captions nearly repeat another clip's": table["near_duplicate"],
            "captions were changed by cleaning; the originals are in the report": table["changed_by"].ne(""),
            "clips are copies of another": table["same_file_as"].ne(""),
        }
        return [
            f"{len(table)} clips exported for {self.layout} to {self.output_dir}, {len(self.refused)} refused",
            self.read_back,
            tokens,
            *(f"{int(mask.sum())} {description}" for description, mask in counts.items() if mask.any()),
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


def shared_openings(texts: Sequence[str]) -> pd.DataFrame:
    """The first four words that several texts share, in lower case, and how many do; the most frequent first."""
    starts = Counter(" ".join(re.findall(r"\w+(?:['’-]\w+)*", text.lower())[:OPENING_WORDS]) for text in texts)
    rows = [(opening, count) for opening, count in starts.most_common(20) if count > 1 and opening]
    return pd.DataFrame(rows, columns=["opening", "num_captions"])
