"""Run a sweep: caption clips with every combination of settings, each clip read and encoded once."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit.captioning import Caption, Captioner, Decoding, SharedVideo
from capkit.cogvlm2 import is_out_of_memory
from capkit.runs import (
    MARK_FIELDS,
    CaptionStore,
    Progress,
    check_numbers,
    choose_columns,
    clip_id,
    digest_once,
    filled_prompt,
    new_record,
    read_ahead,
    read_rows,
    request_settings,
    to_frame,
)
from capkit.sweep.plan import Source, SweepPlan, plan_sweep
from capkit.text import plural, warn
from capkit.video import Clip, FrameSampling

if TYPE_CHECKING:
    import pandas as pd

CAPTION_COLUMNS = {
    **{"video": ("video", "file_name", "filename", "path"), "text": ("text",), "caption": ("caption",)},
    **{"start": ("start",), "end": ("end",)},
}
WINDOW = ("start_seconds", "end_seconds")
FRAMES = ("video", "frame_sampling", *WINDOW, "strip", "error")  # what tells which frames a request sees
Request = tuple[dict[str, Any], Decoding]  # settings of a record, and what they were made from


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
        return f"SweepResult({self.counts})"

    @property
    def counts(self) -> str:
        """How many captions, errors and cells, in words."""
        records = self.all_records
        num_errors = sum(record["status"] == "error" for record in records)
        made = f"{plural(len(records) - num_errors, 'caption')} and {plural(num_errors, 'error')}"
        return f"{made} in {plural(len(self.plan.cells) + len(self.elsewhere), 'cell')}"

    def to_frame(self) -> pd.DataFrame:
        """One row per caption.

        Columns: `cell` (its label), `cell_number`, `clip` (see `clip_id`: windows of a video are clips of their own,
        and of `copies` the first one's name stands, so that they count once),
        `video` (path), `start_seconds`, `end_seconds`, the axes `prompt`, `decoding`, `frame_sampling`, `template`,
        `frame_numbers`, `answer_prefix`, `sample`; then `text`, `num_tokens`, `mean_logprob`, `finish_reason`,
        `seconds`, `duration_seconds`, `status`, `error`, `request`, `reference` where clips have one, and `mark`,
        `wrong_words` and `remark` where captions were marked (none of an edited one: `text` is the model's). Captions
        made elsewhere have their cell's name, and no axes.
        """
        where = ("video", *WINDOW)
        names = "text num_tokens mean_logprob finish_reason seconds duration_seconds status error".split()
        numbers = {cell: number for number, cell in enumerate(self.plan.cells)}
        axes = {cell: cell.to_strings() for cell in self.plan.cells}
        references: dict[str, str] = {}
        rows: list[dict[str, Any]] = []
        copies = self.copies
        for (source, cell, sample), record in zip(self.plan.requests(), self.records, strict=True):
            clip = clip_id(record)
            row = {"cell": self.plan.labels[cell], "cell_number": numbers[cell], "clip": copies.get(clip, clip)}
            row |= {name: record[name] for name in where} | axes[cell] | {"sample": sample}
            if source.reference is not None:
                row["reference"] = references[clip] = source.reference
            is_edited = "edited_text" in record  # then its mark is of another text than the model's
            marks = {name: record[name] for name in MARK_FIELDS if name in record and not is_edited}
            if marks:
                marks["wrong_words"] = ", ".join(marks["wrong_words"])
            rows.append(row | {name: record.get(name) for name in [*names, "request"]} | marks)
        for label, records in self.elsewhere.items():
            for record in records:
                clip = clip_id(record)
                row = {"cell": label, "clip": copies.get(clip, clip)} | {name: record[name] for name in where}
                if clip in references:
                    row["reference"] = references[clip]
                rows.append(row | {name: record.get(name) for name in names})
        return to_frame(rows)

    @property
    def copies(self) -> dict[str, str]:
        """Clips with the content and window of an earlier one, by name, each with the first of them."""
        first: dict[tuple[Any, ...], str] = {}
        copies = {}
        for record in self.records:
            if content := record.get("video_sha256"):
                clip = clip_id(record)
                original = first.setdefault((content, *(record[name] for name in WINDOW)), clip)
                if clip != original:
                    copies[clip] = original
        return copies

    @property
    def all_records(self) -> list[dict[str, Any]]:
        """A record for each row of `to_frame`."""
        return [*self.records, *(record for records in self.elsewhere.values() for record in records)]

    def with_captions(self, name: str, path: str | Path) -> SweepResult:
        """Add captions made elsewhere as one more cell, to compare and score them without running a model.

        Their records are those of the baseline with another text, so that support is computed with its prompt, without
        its answer prefix.

        Args:
            name: of the cell.
            path: a table (.csv, .tsv, .jsonl, .json, .parquet) with the columns `video`, `file_name` or `path` (a path
                or file name), and `text` or `caption`; and `start` and `end`, in seconds as in a manifest, where
                several windows of a video are in this sweep.

        Returns:
            A new result; this one stays as it is.

        Raises:
            ValueError: not such a file, a name that a cell already has, no video of this sweep in it, or a caption that
                may be of several of its clips.
        """
        if name in self.elsewhere:
            raise ValueError(f"name={name!r}: a cell already has this name")
        requests = zip(self.plan.requests(), self.records, strict=True)
        baseline = [record for (_, cell, sample), record in requests if cell == self.plan.baseline and not sample]
        empty = dict.fromkeys(("num_tokens", "mean_logprob", "finish_reason", "seconds", "request", "error"))
        added = [
            baseline[number] | empty | {"text": text, "status": "ok", "answer_prefix": ""}
            for number, text in _match_captions(self.plan, name, path)
        ]
        return replace(self, elsewhere={**self.elsewhere, name: added})


def _match_captions(plan: SweepPlan, name: str, path: str | Path) -> list[tuple[int, str]]:
    """Captions made elsewhere: of each the number of its clip in the plan, and the text."""
    if name in plan.labels.values():
        raise ValueError(f"name={name!r}: a cell already has this name")
    by_video: defaultdict[str, dict[str, int]] = defaultdict(dict)  # then by clip
    for number, source in enumerate(plan.sources):
        video = Path(os.path.expanduser(source.video)).absolute()
        window = {"start_seconds": source.start, "end_seconds": source.end}
        for key in {str(video), video.name}:
            by_video[key].setdefault(clip_id({"video": str(video)} | window), number)
    matched = []
    for caption in read_captions(path):
        key = caption["video"] if caption["video"] in by_video else Path(caption["video"]).name
        numbers = list(by_video.get(key, {}).values())
        if WINDOW[0] in caption:
            of_caption = (caption[WINDOW[0]], caption[WINDOW[1]])
            numbers = [n for n in numbers if (plan.sources[n].start, plan.sources[n].end) == of_caption]
        if len(numbers) > 1:
            raise ValueError(
                f"{path}: {caption['video']!r} may be any of {len(numbers)} clips of this sweep; name it by its path, "
                "and a window of it by start and end"
            )
        matched += [(number, caption["text"]) for number in numbers]
    if not matched:
        raise ValueError(f"{path}: has none of the sweep's videos, such as {plan.sources[0].video!r}")
    return matched


def check_comparison(plan: SweepPlan, measure: str, captions_elsewhere: dict[str, Any]) -> None:
    """Check before a sweep what its cells are to be compared by, and with.

    Args:
        measure: "supported_words", "support", "agreement", or a column of numbers in `SweepResult.to_frame` or
            `describe`.
        captions_elsewhere: names and files for `SweepResult.with_captions`.

    Raises:
        ValueError: another measure, or as in `SweepResult.with_captions`.
        ImportError: as in `describe`.
    """
    import pandas as pd

    from capkit.sweep.diagnostics import describe  # needs pandas, which a bare GPU machine lacks

    for name, path in captions_elsewhere.items():
        _match_captions(plan, name, path)
    references = [source.reference for source in plan.sources if source.reference is not None]
    example = pd.DataFrame({"text": ["x"]} | ({"reference": ["x"]} if references else {}))
    columns = describe(example).select_dtypes("number", exclude=["boolean"])
    measures = ["supported_words", "support", "agreement", "num_tokens", "mean_logprob", "seconds", *columns]
    if measure not in measures:
        raise ValueError(f"measure={measure!r}: must be one of {', '.join(measures)}")


def read_captions(path: str | Path) -> list[dict[str, Any]]:
    """Read captions of another tool from a table, see `capkit.runs.read_rows`: dictionaries of `video` and `text`.

    Those of rows with a `start` or an `end` also have `start_seconds` and `end_seconds`, as a record has them. The
    columns are those of `SweepResult.with_captions`; a warning names the others, which are ignored.

    Raises:
        ValueError: a file that cannot be read so, or a row without a video or a text, with its place.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"{path!r}: must be the name of a file of captions")
    rows = read_rows(Path(path).expanduser(), "captions")
    rows, _, note = choose_columns(rows, CAPTION_COLUMNS, str(path))
    captions: list[dict[str, Any]] = []
    for row in rows:
        text = row.text("text" if row.cells.get("text") is not None else "caption")
        captions.append({"video": row.text("video"), "text": text})
        if window := row.window():
            captions[-1] |= {WINDOW[0]: window[0], WINDOW[1]: window[1]}
    if note:
        warn(note, stacklevel=2)
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
        StoreBusy: another run is captioning into this store.
        ValueError: as in `plan_sweep`, or axes beside a plan.
    """
    if isinstance(clips, SweepPlan) and axes:
        raise ValueError(f"{', '.join(axes)}: cannot be set beside a SweepPlan; pass them to plan_sweep")
    plan = clips if isinstance(clips, SweepPlan) else plan_sweep(clips, **axes)
    for cell in plan.cells:  # refuse prompts that this tokenizer cannot take
        captioner.processor.text_ids(cell.prompt.after([""] * len(cell.prompt.steps)))
    check_numbers(timeout_seconds=timeout_seconds)
    store = None if store is None else CaptionStore.of(store)
    with nullcontext() if store is None else store.hold():
        return _run_plan(captioner, plan, store, retry_errors, timeout_seconds)


def _run_plan(
    captioner: Captioner,
    plan: SweepPlan,
    store: CaptionStore | None,
    retry_errors: bool,
    timeout_seconds: float | None,
) -> SweepResult:
    done = store.done(retry_errors) if store else set()
    failed = done - store.done(retry_errors=True) if store else set()
    digest, image_size = digest_once(), captioner.processor.image_size
    order: list[str] = []
    todo: dict[tuple[Source, FrameSampling], list[Request]] = {}
    for source, cell, sample in plan.requests():
        decoding = cell.sampled(sample)
        frames = (cell.frame_sampling, source.start, source.end)
        own: dict[str, Any] = {"error": source.error, "columns": source.values, "only_frames": source.only_frames}
        settings = request_settings(captioner, source.video, cell.prompt, decoding, *frames, sample, **own)
        order.append(settings["request"])
        if settings["request"] not in done:
            done.add(settings["request"])  # a clip may be named twice
            todo.setdefault((source, cell.frame_sampling), []).append((settings, decoding))
    todo = dict(sorted(todo.items(), key=lambda group: group[0][0].error is not None))  # as in `runs.caption.missing`
    records = {record["request"]: record for record in store.latest(dict.fromkeys(order))} if store else {}
    num_todo = sum(len(group) for group in todo.values())
    num_failed = len(failed.intersection(order))

    def prepare(settings: dict[str, Any], _: Clip) -> None:
        digest(settings["video"])  # while the model is busy

    with (
        Progress(("caption", "make"), num_todo, len(order) - num_todo - num_failed, num_failed) as progress,
        closing(_read_clips(todo, timeout_seconds, image_size, store, prepare)) as clips_read,
    ):
        for group, clip in clips_read:
            seen = clip if isinstance(clip, Clip) else None
            for settings, outcome in _caption_group(captioner, clip, group):
                if seen:
                    settings["video_sha256"] = digest(settings["video"])
                records[settings["request"]] = record = new_record(settings, outcome, seen)
                if store and seen:
                    store.save_strip(settings, seen, image_size)
                if store:
                    store.append(record)
                progress.update(record)
    return SweepResult(plan, [records[request] for request in order])


def _read_clips(
    todo: dict[tuple[Source, FrameSampling], list[Request]],
    timeout_seconds: float | None,
    image_size: int,
    store: CaptionStore | None,
    prepare: Callable[[dict[str, Any], Clip], None],
) -> Generator[tuple[list[Request], Clip | Exception]]:
    """The requests for each clip and frame sampling, with its frames, or the error in reading it; files read ahead."""
    from_files = []
    for (source, sampling), group in todo.items():
        if source.clip is not None and (source.is_in_memory_only or sampling == source.clip.frame_sampling):
            yield group, source.clip
        else:
            from_files.append(group)
    # Without a prompt: that of one request may be wrong for this clip, and the others' right.
    frames = ({name: group[0][0][name] for name in FRAMES if name in group[0][0]} for group in from_files)
    ahead = read_ahead(frames, timeout_seconds, num_ahead=2, image_size=image_size, store=store, prepare=prepare)
    with closing(ahead) as clips:
        for group, (_, clip) in zip(from_files, clips, strict=True):
            yield group, clip


def _caption_group(
    captioner: Captioner, clip: Clip | Exception, group: list[Request]
) -> Iterator[tuple[dict[str, Any], Caption | Exception]]:
    """(settings, caption or error) of each request for one clip's frames."""
    if isinstance(clip, Exception):
        yield from ((settings, clip) for settings, *_ in group)
        return
    remaining = []
    for settings, decoding in group:
        try:
            prompt = filled_prompt(settings, clip)
            captioner.tokens_that_fit(clip, prompt)
            remaining.append((settings, prompt, decoding))
        except ValueError as error:  # this prompt is too long for this clip; others may not be
            yield settings, ValueError(f"{settings['video']}: {error}")
    # Sorted by frame numbers, so that the video is prefilled once for each kind of numbers.
    remaining.sort(key=lambda request: (request[1].template, request[1].frame_numbers))
    video, num_together = SharedVideo(captioner, clip), len(remaining)
    while remaining:
        together = remaining[:num_together]
        try:
            for caption in video.caption([(prompt, decoding) for _, prompt, decoding in together]):
                yield remaining.pop(0)[0], caption
        except (ValueError, TypeError, RuntimeError, MemoryError) as error:
            if not isinstance(error, (ValueError, TypeError)) and not is_out_of_memory(error):
                raise
            num_failed = len(remaining) if is_out_of_memory(error) else 1 if len(together) == 1 else 0
            yield from (
                (settings, ValueError(f"{settings['video']}: {error}")) for settings, *_ in remaining[:num_failed]
            )
            del remaining[:num_failed]
            num_together = 1  # one by one, to tell which it is
