"""Clips into a caption store: what is already there, reading ahead, batches of like length, going on past bad clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from capkit.captioning import GREEDY, Captioner, Decoding, DecodingLike
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike, is_out_of_memory
from capkit.runs.clips import Item
from capkit.runs.prefetch import Quarantine, memory_budget, read_ahead
from capkit.runs.progress import Progress
from capkit.runs.store import CaptionStore, new_record, request_settings, sha256_if_there
from capkit.video import Clip, FrameSampling

BATCHES_TO_CHOOSE_FROM = 4  # so many batches of clips are held, to find those of like length


def caption_clips(
    captioner: Captioner,
    items: Iterable[Item],
    store: CaptionStore,
    prompt: PromptLike = DEFAULT_PROMPT,
    decoding: DecodingLike = GREEDY,
    frame_sampling: FrameSampling | str | dict[str, Any] = "chat",
    batch_size: int = 1,
    retry_errors: bool = False,
    timeout_seconds: float | None = 60.0,
) -> list[dict[str, Any]]:
    """Caption every clip that the store has no caption of yet; each result is on disk before the next batch begins.

    Clips are read ahead of the model. One that cannot be read, or does not fit into memory, gets a record that says
    why, and the others go on. Clips of like length share a batch, so that records are not in the order of items.

    Args:
        captioner: from `load_captioner`.
        items: from `find_clips`; the text of an item's own prompt replaces that of `prompt`.
        store: where records and picture strips go, and where what is done is known from.
        prompt, decoding: as in `Captioner.caption`.
        frame_sampling: as in `load_clip`.
        batch_size: clips that go through the model together.
        retry_errors: try again what failed before.
        timeout_seconds: longest time to read one clip; None for no limit.

    Returns:
        The current record of every item, in order, also of those that were there before.

    Raises:
        ValueError: settings that no clip could be captioned with.
        OSError: the store cannot be written, on a full disk perhaps; what it holds is whole.
    """
    planned = plan_clips(captioner, items, prompt, decoding, frame_sampling)
    caption_planned(captioner, planned, store, batch_size, retry_errors, timeout_seconds)
    current = {record["request"]: record for record in store.current()}
    return [current[settings["request"]] for settings in planned]


def plan_clips(
    captioner: Captioner,
    items: Iterable[Item],
    prompt: PromptLike = DEFAULT_PROMPT,
    decoding: DecodingLike = GREEDY,
    frame_sampling: FrameSampling | str | dict[str, Any] = "chat",
) -> list[dict[str, Any]]:
    """What is asked of each item, as `request_settings` has it. Arguments and errors as in `caption_clips`.

    Args:
        captioner: or anything else with the attributes that `request_settings` reads.
    """
    prompt, decoding, frame_sampling = Prompt.of(prompt), Decoding.of(decoding), FrameSampling.of(frame_sampling)
    planned = []
    for item in items:
        shared = (prompt, decoding, frame_sampling, item.start, item.end)
        planned.append(request_settings(captioner, item.video, *shared, own_text=item.prompt))
        if item.reference is not None:
            planned[-1]["reference"] = item.reference
    return planned


def caption_planned(
    captioner: Captioner,
    planned: Sequence[dict[str, Any]],
    store: CaptionStore,
    batch_size: int = 1,
    retry_errors: bool = False,
    timeout_seconds: float | None = 60.0,
    *,
    other_stores: Sequence[CaptionStore] = (),
    quarantine: Quarantine | None = None,
    heartbeat: Path | None = None,
    label: str = "",
    num_readers: int = 2,
    memory_bytes: int | None = None,
) -> None:
    """Caption the planned clips that are not yet in the store; all must share one decoding.

    Args:
        planned: from `plan_clips`.
        batch_size, retry_errors, timeout_seconds: as in `caption_clips`.
        other_stores: what is done there is done too; nothing is written to them.
        quarantine: clips not to be read, and where to note those that reading does not survive.
        heartbeat, label: as in `Progress`.
        num_readers: clips that are read at the same time, each in a process of its own.
        memory_bytes: about the most memory that clips may take until they are captioned; None for half of what is free,
            at most 8 GiB.

    Raises:
        ValueError, OSError: as in `caption_clips`.
    """
    for name, value in (("batch_size", batch_size), ("num_readers", num_readers)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: must be at least 1")
    todo = missing(planned, [store, *other_stores], retry_errors)
    progress = Progress("clips", len(todo), len(planned) - len(todo), heartbeat, label)
    memory_bytes = memory_bytes or memory_budget()

    def prepare(settings, clip):
        prepare_clip(settings, clip, store, captioner.processor.image_size)

    ahead = (2 * batch_size, num_readers, memory_bytes // 2, quarantine, prepare)
    with progress, closing(read_ahead(todo, timeout_seconds, *ahead)) as pairs:
        for batch in _batches(pairs, batch_size, memory_bytes // 2):
            for record in caption_batch_into(captioner, batch, store):
                progress.update(record)


def missing(planned: Iterable[dict[str, Any]], stores: Iterable[CaptionStore], retry_errors: bool) -> list:
    """What of a plan none of the stores has an answer to, each once."""
    done = set().union(*(store.done(retry_errors) for store in stores))
    return list({settings["request"]: settings for settings in planned if settings["request"] not in done}.values())


def prepare_clip(settings: dict[str, Any], clip: Clip, store: CaptionStore, image_size: int) -> None:
    """What a record needs of a clip and takes time, so that it is done while the model is at work: strip and digest."""
    store.save_strip(settings, clip, image_size)
    settings["video_sha256"] = sha256_if_there(settings["video"])


def caption_batch_into(captioner: Captioner, batch: list, store: CaptionStore) -> list[dict[str, Any]]:
    """Caption (settings, clip or error) pairs together, the clips prepared; returns their records, stored already."""
    readable = [(settings, clip) for settings, clip in batch if isinstance(clip, Clip)]
    outcomes, records = _caption_batch(captioner, readable), []
    for settings, clip in batch:
        is_clip = isinstance(clip, Clip)
        records.append(new_record(settings, next(outcomes), clip) if is_clip else new_record(settings, clip))
        store.append(records[-1])
    return records


def _batches(pairs: Iterator, batch_size: int, memory_bytes: int) -> Iterator[list]:
    """Lists of up to `batch_size` pairs with a clip; an error is a list of its own, at once."""
    held: list = []
    num_held = 1 if batch_size == 1 else BATCHES_TO_CHOOSE_FROM * batch_size
    for settings, clip in pairs:
        if not isinstance(clip, Clip):
            yield [(settings, clip)]
            continue
        held.append((settings, clip))
        del clip  # else this frame would hold it while the model runs
        if len(held) >= num_held or sum(clip.frames.nbytes for _, clip in held) >= memory_bytes:
            yield _take_batch(held, batch_size)
    while held:
        yield _take_batch(held, batch_size)


def _take_batch(held: list, batch_size: int) -> list:
    """Take out the clip that has waited longest, and those nearest to it in length."""
    length = len(held[0][1])
    batch = sorted(held, key=lambda pair: abs(len(pair[1]) - length))[:batch_size]
    taken = set(map(id, batch))
    held[:] = [pair for pair in held if id(pair) not in taken]
    return batch


def _caption_batch(captioner, readable) -> Iterator:
    """A caption for each clip; where one alone has a prompt or a size that the model cannot take, its error."""
    if not readable:
        return iter([])
    try:
        prompts = [Prompt.from_record(settings) for settings, _ in readable]
        return iter(captioner.caption_batch([clip for _, clip in readable], prompts, readable[0][0]["decoding"]))
    except (ValueError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        if len(readable) == 1:
            return iter([ValueError(f"{readable[0][0]['video']}: {error}")])
    return (outcome for pair in readable for outcome in _caption_batch(captioner, [pair]))
