"""Caption clips into a store: skip what it has, read ahead, batch clips of similar length, record errors and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from capkit.captioning import GREEDY, Caption, Captioner, Decoding, DecodingLike
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike, is_out_of_memory
from capkit.runs.digests import digest_once
from capkit.runs.fields import filled_prompt
from capkit.runs.index import is_complete, is_row_error
from capkit.runs.manifests import Item, check_items
from capkit.runs.prefetch import Quarantine, read_ahead
from capkit.runs.progress import Progress
from capkit.runs.store import (
    CaptionStore,
    CaptionStoreLike,
    ModelIdentity,
    new_record,
    request_settings,
)
from capkit.video import Clip, FrameSampling, FrameSamplingLike, at_least_one, memory_budget, positive

BATCHES_TO_CHOOSE_FROM = 4  # batches of clips held, to find those of similar length


def caption_clips(
    captioner: Captioner,
    items: Iterable[Item],
    store: CaptionStoreLike,
    prompt: PromptLike = DEFAULT_PROMPT,
    decoding: DecodingLike = GREEDY,
    frame_sampling: FrameSamplingLike = "chat",
    batch_size: int = 1,
    retry_errors: bool = False,
    timeout_seconds: float | None = 60.0,
) -> list[dict[str, Any]]:
    """Caption every clip that the store has no caption of yet; each batch is on disk before the next begins.

    A clip that cannot be read, or does not fit into memory, gets a record with the error, and the others go on. Clips
    of similar length share a batch, so the store's order is not that of the items.

    Args:
        captioner: from `load_captioner`.
        items: from `find_clips`; an item's own prompt replaces the text of `prompt`.
        store: where records and picture strips are written; a `CaptionStore` or its path.
        prompt: a text or a `Prompt`; fields such as `{name}` are filled clip by clip, see `capkit.runs.fields`.
        decoding: a `Decoding` or a dictionary of its fields.
        frame_sampling: as in `load_clip`.
        batch_size: clips that go through the model together.
        retry_errors: try clips again that failed before.
        timeout_seconds: longest time to read one clip; None for no limit.

    Returns:
        The current record of every item, in order, old or new.

    Raises:
        StoreBusy: another run is captioning into this store.
        ValueError: settings that are invalid for every clip, or a field of a prompt that a clip has no value for.
        TypeError: `items` holds something else than items, such as a file name.
        OSError: the store cannot be written, for example on a full disk; earlier records are kept.
    """
    store = CaptionStore.of(store)
    planned = plan_clips(captioner, items, prompt, decoding, frame_sampling)
    with store.hold():
        caption_planned(captioner, planned, store, batch_size, retry_errors, timeout_seconds)
    return current_records(planned, [store])


def plan_clips(
    captioner: Captioner | ModelIdentity,
    items: Iterable[Item],
    prompt: PromptLike = DEFAULT_PROMPT,
    decoding: DecodingLike = GREEDY,
    frame_sampling: FrameSamplingLike = "chat",
) -> list[dict[str, Any]]:
    """The `request_settings` of each item.

    Raises:
        ValueError: settings that are invalid for every clip, or a field of a prompt that a clip has no value for.
        TypeError: something else than an item.
    """
    prompt, decoding, frame_sampling = Prompt.of(prompt), Decoding.of(decoding), FrameSampling.of(frame_sampling)
    decoding.check_prefix(prompt.answer_prefix)
    planned = []
    for item in check_items(items):
        shared = (prompt, decoding, frame_sampling, item.start, item.end)
        own: dict[str, Any] = {"own_text": item.prompt, "error": item.error, "columns": item.values}
        own["only_frames"] = item.only_frames
        planned.append(request_settings(captioner, item.video, *shared, **own))
        if item.reference is not None:
            planned[-1]["reference"] = item.reference
    return planned


def caption_planned(
    captioner: Captioner,
    planned: Sequence[dict[str, Any]],
    store: CaptionStore,
    batch_size: int,
    retry_errors: bool,
    timeout_seconds: float | None,
    *,
    other_stores: Sequence[CaptionStore] = (),
    quarantine: Quarantine | None = None,
    heartbeat: Path | None = None,
    label: str = "",
    num_readers: int = 2,
    memory_bytes: int | None = None,
) -> None:
    """Caption the planned clips not yet in the store; all must share one decoding. See `caption_clips`.

    Args:
        planned: from `plan_clips`.
        store: held by the caller, see `CaptionStore.hold`.
        other_stores: their records count as done, too; they are only read.
        quarantine, num_readers: as in `read_ahead`.
        heartbeat, label: as in `Progress`.
        memory_bytes: approximate limit for clips from reading to caption; None: half of free memory, at most 8 GiB.
    """
    check_numbers(batch_size, timeout_seconds, num_readers)
    todo = missing(planned, [store, *other_stores], retry_errors)
    num_before = counts_before(planned, [store, *other_stores], len(todo))
    half_memory = (memory_bytes or memory_budget()) // 2  # for reading ahead, and for choosing batches
    image_size = captioner.processor.image_size
    prepare = partial(prepare_clip, store=store, image_size=image_size, digest=digest_once())
    ahead = (2 * batch_size, num_readers, half_memory, quarantine, image_size, store, prepare)
    with (
        Progress(("clip", "caption"), len(todo), *num_before, heartbeat, label) as progress,
        closing(read_ahead(todo, timeout_seconds, *ahead)) as pairs,
    ):
        for batch in _batches(pairs, batch_size, half_memory):
            for record in caption_batch_into(captioner, batch, store):
                progress.update(record)


def check_numbers(batch_size: int = 1, timeout_seconds: float | None = None, num_readers: int = 1) -> None:
    """Raise ValueError for a number that no run can have, so that it is found before a model is loaded."""
    at_least_one("batch_size", batch_size)
    at_least_one("num_readers", num_readers)
    if timeout_seconds is not None:
        positive("timeout_seconds", timeout_seconds)


def missing(
    planned: Iterable[dict[str, Any]], stores: Iterable[CaptionStore], retry_errors: bool
) -> list[dict[str, Any]]:
    """The planned requests that no store has an answer to, each once.

    Rows that cannot be used come last, so that a caption after such an error is of a later run: see `StoreIndex`.
    """
    done = set().union(*(store.done(retry_errors) for store in stores))
    todo = {settings["request"]: settings for settings in planned if settings["request"] not in done}
    return sorted(todo.values(), key=is_row_error)


def counts_before(planned: Sequence[dict[str, Any]], stores: Iterable[CaptionStore], num_todo: int) -> tuple[int, int]:
    """How many of the planned requests were captioned before, and how many failed and are not tried again."""
    num_failed = len(missing(planned, stores, retry_errors=True)) - num_todo
    return len(planned) - num_todo - num_failed, num_failed


def current_records(planned: Sequence[dict[str, Any]], stores: Iterable[CaptionStore]) -> list[dict[str, Any]]:
    """The current record of each planned request; of several stores' the last complete one, or else the last.

    Raises:
        OSError: records are gone, because a store was taken away or replaced meanwhile.
    """
    requests = list(dict.fromkeys(settings["request"] for settings in planned))
    current: dict[str, dict[str, Any]] = {}
    for store in stores:
        for record in store.latest(requests):
            before = current.get(record["request"])
            if before is None or is_complete(record) or not is_complete(before):
                current[record["request"]] = record
    if gone := [settings["video"] for settings in planned if settings["request"] not in current]:
        reason = "it was deleted or replaced while it was in use"
        raise OSError(f"{store.path}: {len(gone)} records are gone, the first of {gone[0]}; {reason}")
    return [current[settings["request"]] for settings in planned]


def prepare_clip(
    settings: dict[str, Any], clip: Clip, store: CaptionStore, image_size: int, digest: Callable[[str], str | None]
) -> None:
    """Write a clip's picture strip and hash its file: slow work that can run while the model is busy."""
    store.save_strip(settings, clip, image_size)
    settings["video_sha256"] = digest(settings["video"])


Pair = tuple[dict[str, Any], Clip | Exception]  # a request's settings, with its clip or the error in reading it


def caption_batch_into(captioner: Captioner, batch: Sequence[Pair], store: CaptionStore) -> list[dict[str, Any]]:
    """Caption prepared clips together and store the records, errors included; returns the records."""
    outcomes = _caption_batch(captioner, [(settings, clip) for settings, clip in batch if isinstance(clip, Clip)])
    records = []
    for settings, clip in batch:
        outcome = (next(outcomes), clip) if isinstance(clip, Clip) else (clip,)
        records.append(new_record(settings, *outcome))
        store.append(records[-1])
    return records


def _batches(pairs: Iterable[Pair], batch_size: int, memory_bytes: int) -> Iterator[list[Pair]]:
    """Batches of up to `batch_size` clips of similar length; an error is a batch of its own, at once.

    Only rows that cannot be used wait for all clips before them, see `missing`.
    """
    held: list[Any] = []
    num_held = 1 if batch_size == 1 else BATCHES_TO_CHOOSE_FROM * batch_size
    for settings, clip in pairs:
        if not isinstance(clip, Clip):
            while held and is_row_error(settings):
                yield _take_batch(held, batch_size)
            yield [(settings, clip)]
            continue
        held.append((settings, clip))
        del clip  # else this frame would hold it while the model runs
        if len(held) >= num_held or sum(clip.nbytes for _, clip in held) >= memory_bytes:
            yield _take_batch(held, batch_size)
    while held:
        yield _take_batch(held, batch_size)


def _take_batch(held: list[tuple[dict[str, Any], Clip]], batch_size: int) -> list[Pair]:
    """Remove and return the clip that has waited longest, and those nearest to it in length."""
    length = len(held[0][1])
    batch = sorted(held, key=lambda pair: abs(len(pair[1]) - length))[:batch_size]
    taken = set(map(id, batch))
    held[:] = [pair for pair in held if id(pair) not in taken]
    return [*batch]


def _caption_batch(captioner: Captioner, pairs: Sequence[tuple[dict[str, Any], Clip]]) -> Iterator[Caption | Exception]:
    """Yield a caption for each clip, or the error where its own prompt or its size is the problem."""
    if not pairs:
        return
    try:
        prompts = [filled_prompt(settings, clip) for settings, clip in pairs]
        captions = captioner.caption_batch([clip for _, clip in pairs], prompts, pairs[0][0]["decoding"])
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        if not isinstance(error, (ValueError, TypeError)) and not is_out_of_memory(error):
            raise
        reason = f"{pairs[0][0]['video']}: {error}"
        if is_out_of_memory(error):
            num_beams = pairs[0][0]["decoding"].get("num_beams", 1)
            advice = f"lower num_beams={num_beams}" if num_beams > 1 else "sample fewer frames"
            reason = f"{pairs[0][0]['video']}: does not fit into memory; {advice}: {error!r}"
    else:
        yield from captions
        return
    if len(pairs) == 1:
        yield ValueError(reason)
    else:  # one by one
        for pair in pairs:
            yield from _caption_batch(captioner, [pair])
