"""Run a sweep: caption clips with every combination of settings, each clip read and encoded once."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit.captioning import Caption, Captioner, Decoding, SharedVideo
from capkit.cogvlm2 import Prompt, is_out_of_memory
from capkit.runs import (
    CaptionStore,
    Progress,
    clip_id,
    new_record,
    read_ahead,
    read_rows,
    request_settings,
    sha256_if_there,
)
from capkit.sweep.plan import Source, SweepPlan, plan_sweep
from capkit.video import Clip, FrameSampling

if TYPE_CHECKING:
    import pandas as pd

WINDOW = ("start_seconds", "end_seconds")
Request = tuple[dict[str, Any], Prompt, Decoding]  # settings of a record, and the nouns that they were made from


@dataclass
class SweepResult:
    """Results of a sweep.

    Attributes:
        plan: the plan that was run.
        records: the current record of every request, in the plan's order.
        elsewhere: records of captions that other tools made, by the name of their cell.
    """

    plan: SweepPlan
    records: list[dict[str, Any]]
    elsewhere: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        errors = sum(record["status"] == "error" for record in self.records)
        return f"SweepResult({len(self.records)} captions in {len(self.plan.cells)} cells, {errors} errors)"

    def to_frame(self) -> pd.DataFrame:
        """One row per caption.

        Columns: `cell` (its label), `cell_number`, `clip` (see `clip_id`: windows of a video are clips of their own),
        `video` (path), `start_seconds`, `end_seconds`, the axes `prompt`, `decoding`, `frame_sampling`, `template`,
        `frame_numbers`, `sample`; then `text`, `num_tokens`, `mean_logprob`, `finish_reason`, `seconds`,
        `duration_seconds`, `status`, `error`, `request`, and `reference` where clips have one. Captions made elsewhere
        have their cell's name, and no axes.
        """
        import pandas as pd

        where = ("video", *WINDOW)
        names = "text num_tokens mean_logprob finish_reason seconds duration_seconds status error".split()
        numbers = {cell: number for number, cell in enumerate(self.plan.cells)}
        axes = {cell: cell.to_strings() for cell in self.plan.cells}
        references: dict[str, str] = {}
        rows: list[dict[str, Any]] = []
        for (source, cell, sample), record in zip(self.plan.requests(), self.records, strict=True):
            clip = clip_id(record)
            row = {"cell": self.plan.labels[cell], "cell_number": numbers[cell], "clip": clip}
            row |= {name: record[name] for name in where} | axes[cell] | {"sample": sample}
            if source.reference is not None:
                row["reference"] = references[clip] = source.reference
            rows.append(row | {name: record.get(name) for name in [*names, "request"]})
        for label, records in self.elsewhere.items():
            for record in records:
                clip = clip_id(record)
                row = {"cell": label, "clip": clip} | {name: record[name] for name in where}
                if clip in references:
                    row["reference"] = references[clip]
                rows.append(row | {name: record.get(name) for name in names})
        return pd.DataFrame(rows)

    @property
    def all_records(self) -> list[dict[str, Any]]:
        """A record for each row of `to_frame`."""
        return [*self.records, *(record for records in self.elsewhere.values() for record in records)]

    def with_captions(self, name: str, path: str | Path) -> SweepResult:
        """Add captions made elsewhere as one more cell, to compare and score them without running a model.

        Their records are those of the baseline with another text, so that support is computed with its prompt.

        Args:
            name: of the cell.
            path: JSONL or CSV with the columns `video` (path or file name) and `text` or `caption`; and `start` and
                `end`, in seconds as in a manifest, where several windows of a video are in this sweep.

        Returns:
            A new result; this one stays as it is.

        Raises:
            ValueError: not such a file, a name that a cell already has, no video of this sweep in it, or a caption that
                may be of several of its clips.
        """
        if name in self.elsewhere or name in self.plan.labels.values():
            raise ValueError(f"name={name!r}: a cell already has this name")
        by_video: defaultdict[str, dict[str, dict[str, Any]]] = defaultdict(dict)  # then by clip
        for (_, cell, sample), record in zip(self.plan.requests(), self.records, strict=True):
            if cell == self.plan.baseline and not sample:
                for key in {record["video"], Path(record["video"]).name}:
                    by_video[key][clip_id(record)] = record
        empty = dict.fromkeys(("num_tokens", "mean_logprob", "finish_reason", "seconds", "request", "error"))
        added = []
        for caption in read_captions(path):
            video = caption["video"] if caption["video"] in by_video else Path(caption["video"]).name
            records = [*by_video.get(video, {}).values()]
            if "start_seconds" in caption:
                records = [record for record in records if all(record[name] == caption[name] for name in WINDOW)]
            if len(records) > 1:
                raise ValueError(
                    f"{path}: {caption['video']!r} may be any of {len(records)} clips of this sweep; name it by its "
                    "path, and a window of it by start and end"
                )
            added += [record | empty | {"text": caption["text"], "status": "ok"} for record in records]
        if not added:
            raise ValueError(f"{path}: has none of the sweep's videos, such as {self.records[0]['video']!r}")
        return replace(self, elsewhere={**self.elsewhere, name: added})


def read_captions(path: str | Path) -> list[dict[str, Any]]:
    """Read captions of another tool from JSONL or CSV: dictionaries of `video` and `text`.

    Those of rows with a `start` or an `end` also have `start_seconds` and `end_seconds`, as a record has them.

    Raises:
        ValueError: a file that cannot be read so.
    """
    captions = []
    for number, row in enumerate(read_rows(Path(path).expanduser(), "captions"), 1):
        caption = {"video": row.get("video"), "text": row.get("text", row.get("caption"))}
        if not all(isinstance(value, str) for value in caption.values()):
            raise ValueError(f"{path}, row {number}: needs video, and text or caption, as texts; got {row}")
        if "start" in row or "end" in row:
            try:
                start, end = (float(row.get(name) or 0) for name in ("start", "end"))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, row {number}: start and end must be seconds; got {row}") from error
            caption |= {"start_seconds": start, "end_seconds": end or None}
        captions.append(caption)
    return captions


def run_sweep(
    captioner: Captioner,
    clips: Any,
    store: str | Path | CaptionStore | None = None,
    retry_errors: bool = False,
    timeout_seconds: float | None = 60.0,
    **axes: Any,
) -> SweepResult:
    """Caption every clip in every cell, except what the store already has.

    Each clip is read and encoded once for each frame sampling; all prompts and decodings of a clip go through the model
    together. Each gets what `Captioner.caption` would give (token for token in float32).

    Args:
        captioner: from `load_captioner`.
        clips: a `SweepPlan`; or the clips for `plan_sweep`, with `axes`.
        store: where records and picture strips are written as they come. None keeps them in memory only.
        retry_errors: try captions again that failed before.
        timeout_seconds: longest time to read one clip; None for no limit.
        axes: `prompts`, `decodings` and the other arguments of `plan_sweep`.

    Returns:
        The current record of every request. A clip that cannot be read, or does not fit into memory, has a record with
        the error.

    Raises:
        ValueError: as in `plan_sweep`, or axes beside a plan.
    """
    if isinstance(clips, SweepPlan) and axes:
        raise ValueError(f"{', '.join(axes)}: cannot be set beside a SweepPlan; pass them to plan_sweep")
    plan = clips if isinstance(clips, SweepPlan) else plan_sweep(clips, **axes)
    for cell in plan.cells:  # refuse prompts that this tokenizer cannot take
        captioner.processor.text_ids(cell.prompt)
    store = store if isinstance(store, CaptionStore) or store is None else CaptionStore(store)
    records = {record["request"]: record for record in store.current()} if store else {}
    done = store.done(retry_errors) if store else set()
    hash_once = functools.cache(sha256_if_there)  # a clip is read once for each frame sampling
    order: list[str] = []
    todo: dict[tuple[Source, FrameSampling], list[Request]] = {}
    for source, cell, sample in plan.requests():
        decoding = cell.sampled(sample)
        frames = (cell.frame_sampling, source.start, source.end)
        settings = request_settings(captioner, source.video, cell.prompt, decoding, *frames, sample)
        order.append(settings["request"])
        if settings["request"] not in done:
            done.add(settings["request"])  # a clip may be named twice
            todo.setdefault((source, cell.frame_sampling), []).append((settings, cell.prompt, decoding))
    num_todo = sum(len(group) for group in todo.values())

    def prepare(settings: dict[str, Any], _: Clip) -> None:
        hash_once(settings["video"])  # while the model is busy

    with Progress("captions", num_todo, len(order) - num_todo) as progress:
        for group, clip in _read_clips(todo, timeout_seconds, prepare):
            seen = clip if isinstance(clip, Clip) else None
            for settings, outcome in _caption_group(captioner, clip, group):
                if seen:
                    settings["video_sha256"] = hash_once(settings["video"])
                records[settings["request"]] = record = new_record(settings, outcome, seen)
                if store and seen:
                    store.save_strip(settings, seen, captioner.processor.image_size)
                if store:
                    store.append(record)
                progress.update(record)
    return SweepResult(plan, [records[request] for request in order])


def _read_clips(
    todo: dict[tuple[Source, FrameSampling], list[Request]],
    timeout_seconds: float | None,
    prepare: Callable[[dict[str, Any], Clip], None],
) -> Iterator[tuple[list[Request], Clip | Exception]]:
    """The requests for each clip and frame sampling, with its frames, or the error in reading it; files read ahead."""
    from_files = []
    for (source, sampling), group in todo.items():
        if source.clip is not None and (source.is_in_memory_only or sampling == source.clip.frame_sampling):
            yield group, source.clip
        else:
            from_files.append(group)
    clips = read_ahead((group[0][0] for group in from_files), timeout_seconds, num_ahead=2, prepare=prepare)
    for group, (_, clip) in zip(from_files, clips, strict=True):
        yield group, clip


def _caption_group(
    captioner: Captioner, clip: Clip | Exception, group: list[Request]
) -> Iterator[tuple[dict[str, Any], Caption | Exception]]:
    """(settings, caption or error) of each request for one clip's frames."""
    if isinstance(clip, Exception):
        yield from ((settings, clip) for settings, *_ in group)
        return
    # Sorted by frame numbers, so that the video is prefilled once for each kind of numbers.
    remaining = sorted(group, key=lambda request: (request[1].template, request[1].frame_numbers))
    try:
        for caption in SharedVideo(captioner, clip).caption([(prompt, decoding) for _, prompt, decoding in remaining]):
            yield remaining.pop(0)[0], caption
    except (ValueError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        reason = ValueError(f"{group[0][0]['video']}: {error}")
        yield from ((settings, reason) for settings, *_ in remaining)
