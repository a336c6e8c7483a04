"""Prompts x decodings x frame samplings x templates over clips: run what a plan says, once, sharing what is the same.

`capkit.sweep.plan` makes the plan; here it is carried out and its results are gathered.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from capkit.captioning import Caption, Captioner, Decoding, SharedVideo
from capkit.cogvlm2 import is_out_of_memory
from capkit.runs import CaptionStore, Progress, new_record, read_ahead, request_settings
from capkit.sweep.plan import Cell, SweepPlan, plan_sweep
from capkit.video import Clip


@dataclass
class SweepResult:
    """What came of a sweep.

    Attributes:
        plan: what was asked.
        records: the current record of every request, in the plan's order.
        elsewhere: by the name of a cell, records of captions that other tools made.
    """

    plan: SweepPlan
    records: list[dict[str, Any]]
    elsewhere: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        errors = sum(record["status"] == "error" for record in self.records)
        return f"SweepResult({len(self.records)} captions in {len(self.plan.cells)} cells, {errors} errors)"

    def to_frame(self) -> pd.DataFrame:
        """One row per caption.

        Columns: `cell` (its label), `cell_number`, `clip` (file name), `video` (path), the axes `prompt`, `decoding`,
        `frame_sampling`, `template`, `frame_numbers`, `sample`; then `text`, `num_tokens`, `mean_logprob`,
        `finish_reason`, `seconds`, `duration_seconds`, `status`, `error`, `request`, and `reference` where clips have
        one. Captions made elsewhere have their cell's name, and no axes.
        """
        kept = ("text", "num_tokens", "mean_logprob", "finish_reason", "seconds", "duration_seconds", "status", "error")
        rows = []
        for (source, cell, sample), record in zip(self.plan.requests(), self.records, strict=True):
            row = {"cell": self.plan.label(cell), "cell_number": self.plan.cells.index(cell)}
            row |= {"clip": Path(record["video"]).name, "video": record["video"], **cell.to_strings(), "sample": sample}
            row |= {} if source.reference is None else {"reference": source.reference}
            rows.append(row | {name: record.get(name) for name in (*kept, "request")})
        references = {row["video"]: row["reference"] for row in rows if "reference" in row}
        for name, records in self.elsewhere.items():
            for record in records:
                row = {"cell": name, "clip": Path(record["video"]).name, "video": record["video"]}
                row |= {"reference": references[row["video"]]} if row["video"] in references else {}
                rows.append(row | {name: record.get(name) for name in kept})
        return pd.DataFrame(rows)

    @property
    def all_records(self) -> list[dict[str, Any]]:
        """A record for each row of `to_frame`."""
        return [*self.records, *(record for records in self.elsewhere.values() for record in records)]

    def with_captions(self, name: str, path: str | Path) -> SweepResult:
        """The same with captions made elsewhere as one more cell, to compare and score without running a model.

        Their records are those of the baseline with another text, so that support is asked for with its prompt.

        Args:
            name: of the cell.
            path: JSONL or CSV with the columns `video` (path or file name) and `text` or `caption`.

        Raises:
            ValueError: not such a file, a name that a cell has, no video of this sweep in it, or a file name that
                several of them have.
        """
        if name in self.elsewhere or name in map(self.plan.label, self.plan.cells):
            raise ValueError(f"name={name!r}: a cell is called so already")
        made = ("text", "num_tokens", "mean_logprob", "finish_reason", "seconds", "request")
        empty = dict.fromkeys(made) | {"status": "ok", "error": None}
        asked = zip(self.plan.requests(), self.records, strict=True)
        records = [record for (_, cell, sample), record in asked if cell == self.plan.baseline and not sample]
        found = []
        for one in read_captions(path):
            named = [record for record in records if record["video"] == one["video"]]
            named = named or [record for record in records if Path(record["video"]).name == Path(one["video"]).name]
            if len(named) > 1:
                raise ValueError(f"{path}: {one['video']!r} may be any of {len(named)} clips of this sweep")
            found += [record | empty | {"text": one["text"]} for record in named]
        if not found:
            raise ValueError(f"{path}: has none of the sweep's videos, such as {records[0]['video']!r}")
        return replace(self, elsewhere={**self.elsewhere, name: found})


def read_captions(path: str | Path) -> list[dict[str, str]]:
    """Captions from another tool's JSONL or CSV: dictionaries of `video` and `text`.

    Raises:
        ValueError: a file that cannot be read so.
    """
    path = Path(path).expanduser()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            is_csv = path.suffix.lower() == ".csv"
            rows = list(csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file)))
        found = [{"video": str(row["video"]), "text": str(row.get("text", row.get("caption")))} for row in rows]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path}: no JSONL or CSV with columns video and text (or caption): {error!r}") from error
    if any(row.get("text", row.get("caption")) is None for row in rows):
        raise ValueError(f"{path}: rows need a column text or caption")
    return found


def run_sweep(
    captioner: Captioner,
    clips: SweepPlan | Sequence,
    store: str | Path | CaptionStore | None = None,
    retry_errors: bool = False,
    timeout_seconds: float | None = 60.0,
    **axes: Any,
) -> SweepResult:
    """Caption every clip in every cell. What the store has already is not done again.

    A clip's frames are read once for each frame sampling and encoded once; all prompts and decodings of a clip go
    through the model together. Each gets what `Captioner.caption` would give (token for token in float32).

    Args:
        captioner: from `load_captioner`.
        clips: a plan; or clips, as in `plan_sweep`, with its `axes`.
        store: where each result goes as it comes, with picture strips beside it. None keeps them in memory alone.
        retry_errors: try again what failed before.
        timeout_seconds: longest time to read one clip; None for no limit.
        axes: `prompts`, `decodings` and all else that `plan_sweep` takes.

    Returns:
        The current record of every request. A clip that cannot be read, or does not fit into memory, has a record that
        says why.

    Raises:
        ValueError: as in `plan_sweep`.
    """
    if isinstance(clips, SweepPlan) and axes:
        raise ValueError(f"{', '.join(axes)}: belong into the plan")
    plan = clips if isinstance(clips, SweepPlan) else plan_sweep(clips, **axes)
    for cell in plan.cells:  # a prompt that this tokenizer cannot take
        captioner.processor.text_ids(cell.prompt)
    store = store if isinstance(store, CaptionStore) or store is None else CaptionStore(store)
    records = {record["request"]: record for record in store.current()} if store else {}
    done = store.done(retry_errors) if store else set()
    order, todo = [], {}
    for clip, cell, sample in plan.requests():
        frames = (cell.frame_sampling, clip.start_seconds, clip.end_seconds)
        settings = request_settings(captioner, clip.video, cell.prompt, cell.sampled(sample), *frames, sample)
        order.append(settings["request"])
        if settings["request"] not in done:
            done.add(settings["request"])  # a clip may be named twice
            todo.setdefault((clip, cell.frame_sampling), []).append((settings, cell, cell.sampled(sample)))
    progress = Progress("captions", sum(map(len, todo.values())), len(order) - sum(map(len, todo.values())))
    for group, clip in _clips(todo, timeout_seconds):
        seen = clip if isinstance(clip, Clip) else None
        for settings, outcome in _caption_group(captioner, clip, group):
            records[settings["request"]] = record = new_record(settings, outcome, seen)
            if store and seen:
                store.save_strip(settings, seen, captioner.processor.image_size)
            if store:
                store.append(record)
            progress.update(record)
    progress.close()
    return SweepResult(plan, [records[request] for request in order])


def _clips(todo, timeout_seconds):
    """Each clip's requests of one frame sampling with its frames, read ahead; or with the error in reading it."""
    in_memory = {
        (source, sampling): source.clip
        for source, sampling in todo
        if source.clip is not None and (source.is_in_memory_only or sampling == source.clip.frame_sampling)
    }
    for key, clip in in_memory.items():
        yield todo[key], clip
    from_files = [group for key, group in todo.items() if key not in in_memory]
    read = read_ahead((group[0][0] for group in from_files), timeout_seconds, num_ahead=2)
    for group, (_, clip) in zip(from_files, read, strict=True):
        yield group, clip


def _caption_group(
    captioner: Captioner, clip: Clip | Exception, group: list[tuple[dict[str, Any], Cell, Decoding]]
) -> Iterator[tuple[dict[str, Any], Caption | Exception]]:
    """(settings, caption or error) of one clip's requests."""
    if isinstance(clip, Exception):
        yield from ((settings, clip) for settings, *_ in group)
        return
    # Cells that share frame numbers stand together, so that the video is prefilled once for each kind of numbers.
    remaining = sorted(group, key=lambda one: (one[1].prompt.template, one[1].prompt.frame_numbers))
    branches = [(cell.prompt, decoding) for _, cell, decoding in remaining]
    try:
        for caption in SharedVideo(captioner, clip).caption(branches):
            yield remaining.pop(0)[0], caption
    except (ValueError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        reason = ValueError(f"{group[0][0]['video']}: {error}")
        yield from ((settings, reason) for settings, *_ in remaining)
