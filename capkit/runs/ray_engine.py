"""Captioning on a Ray cluster: clips are read on CPUs and stream into captioners on GPUs (`pip install 'capkit[ray]'`).

Ray moves the clips; it keeps nothing. Each captioner writes its records to a store of its own in the output folder,
which all nodes share, with the functions that a local shard uses; `merge` puts them together. So a lost
node costs the batch in hand, Ray does that again elsewhere, and a run started again does what is missing.
"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from capkit.captioning import DEMO_CHECKPOINT, GREEDY, DecodingLike, load_captioner
from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike, loading
from capkit.runs.caption import caption_batch_into, missing, plan_clips, prepare_clip
from capkit.runs.clips import Item
from capkit.runs.prefetch import Quarantine, memory_budget, read_clip
from capkit.runs.progress import Progress
from capkit.runs.shards import Shard, hold_shard, shard_stores, write_plan
from capkit.runs.store import CaptionStore
from capkit.video import Clip, ClipReader, FrameSampling

SHARD = Shard()  # for Ray a folder is one shard, in several stores


def caption_on_ray(
    items: Iterable[Item],
    output_dir: str | os.PathLike,
    model: str = "demo",
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    batch_size: int = 8,
    retry_errors: bool = False,
    retry_quarantined: bool = False,
    timeout_seconds: float = 60.0,
    num_captioners: int = 1,
    cpus_per_captioner: float = 1.0,
    gpus_per_captioner: float | None = None,
    cpus_per_reader: float = 1.0,
    prompt: PromptLike = DEFAULT_PROMPT,
    decoding: DecodingLike = GREEDY,
    frame_sampling: FrameSampling | str | dict[str, Any] = "chat",
) -> list[dict[str, Any]]:
    """Caption items on the Ray cluster at hand, or on this machine where `ray.init` was told of none.

    Clips reach the captioners in the order in which they are read. One that cannot be read, or does not fit into
    memory, gets a record that says why, and the others go on.

    Args:
        items: from `find_clips`; every node must reach the files under the same names.
        output_dir: a folder that every node reaches under this name; the layout is that of `capkit.runs.shards`.
        model, device, dtype, quantization, revision: as in `load_captioner`, for each captioner.
        batch_size: clips that go through a model together.
        retry_errors: try again what failed before, but for clips in quarantine.
        retry_quarantined: also these.
        timeout_seconds: longest time to read one clip.
        num_captioners: how many models are loaded; a GPU each.
        cpus_per_captioner, gpus_per_captioner: what Ray sets aside for one; None: a GPU where the cluster has any.
        cpus_per_reader: what Ray sets aside for a process that reads clips.
        prompt, decoding, frame_sampling: as in `caption_clips`.

    Returns:
        The current record of every item, in order.

    Raises:
        ImportError: Ray is not installed.
        ShardBusy: another process is at work in the folder, on Ray or as its only shard.
        ValueError, OSError: as in `caption_shard`.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("captioning on Ray needs it: pip install 'capkit[ray]'") from error
    folder = Path(output_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    items = list(dict.fromkeys(items))
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    if gpus_per_captioner is None:
        gpus_per_captioner = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    if retry_quarantined:
        for path in folder.glob("*.quarantine.jsonl"):
            os.replace(path, f"{path}.old")
    resources = {"num_cpus": cpus_per_captioner, "num_gpus": gpus_per_captioner}
    settings = (model, device, dtype, quantization, revision)
    with hold_shard(folder, SHARD) as heartbeat:
        who = ray.get(ray.remote(**resources)(_describe).remote(*settings))
        planned = plan_clips(SimpleNamespace(**who), items, prompt, decoding, frame_sampling)
        write_plan(folder, SHARD, items, planned, Prompt.of(prompt))
        todo = missing(
            planned, [CaptionStore(path) for path in shard_stores(folder)], retry_errors or retry_quarantined
        )
        with Progress("clips", len(todo), len(planned) - len(todo), heartbeat) as progress:
            if todo:
                reading = (timeout_seconds, cpus_per_reader)
                captioning = {"batch_size": batch_size, **resources}
                for record in _stream(ray, todo, folder, settings, *reading, num_captioners, captioning):
                    progress.update(record)
    current = {}
    for path in shard_stores(folder):
        current |= {record["request"]: record for record in CaptionStore(path).current()}
    return [current[settings["request"]] for settings in planned]


def _describe(model, device, dtype, quantization, revision) -> dict[str, Any]:
    """What `request_settings` wants to know of a captioner, found out where one will run, without loading it."""
    folder = loading.find(DEMO_CHECKPOINT if model == "demo" else model, revision)
    chosen = loading.choose_dtype(dtype, loading.choose_device(device))
    name = str(chosen).removeprefix("torch.")
    return {"fingerprint": loading.fingerprint(folder), "dtype": name, "name": model, "quantization": quantization}


def _stream(ray, todo, folder, settings, timeout_seconds, cpus_per_reader, num_captioners, captioning):
    """Records as they come, shortened to what `Progress` wants to know; whole they stand in the stores."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    # Blocks of a row: Ray hands results on when a block is full, and does again what was in the blocks that it lost.
    context.target_max_block_size, context.enable_progress_bars = 200, False
    try:
        data = ray.data.from_items([{"asked": pickle.dumps(asked)} for asked in todo], override_num_blocks=len(todo))
        reading = {"fn_args": (str(folder), timeout_seconds), "batch_size": 1, "num_cpus": cpus_per_reader}
        data = data.map_batches(_read, **reading)
        pool = ray.data.ActorPoolStrategy(size=num_captioners)
        made = {"fn_constructor_args": (str(folder), settings), "compute": pool}
        for row in data.map_batches(_CaptionerActor, **made, **captioning).iter_rows():
            yield {"status": row["status"], "error": row["error"], "video": row["video"]}
    finally:
        context.target_max_block_size, context.enable_progress_bars = before


@functools.cache
def _reader():
    """Of this process, which Ray uses again and again."""
    return ClipReader(memory_budget())


def _read(batch, folder, timeout_seconds):
    """On a CPU: clips, or the errors in reading them, pickled; Ray would drop a whole block for an exception."""
    own = Path(folder) / f"ray-{socket.gethostname()}.quarantine.jsonl"
    quarantine = Quarantine(own, Path(folder).glob("*.quarantine.jsonl"))
    pairs = []
    for content in batch["asked"]:
        asked = pickle.loads(content)
        pairs.append(pickle.dumps((asked, read_clip(asked, timeout_seconds, _reader(), quarantine)), protocol=5))
    return {"pair": np.array(pairs, dtype=object)}


class _CaptionerActor:
    """On a GPU: a model, and a store that nobody else writes."""

    def __init__(self, folder, settings):
        self.captioner = load_captioner(*settings)
        self.store = CaptionStore(Path(folder) / f"ray-{uuid.uuid4().hex}.jsonl", Path(folder) / "captions_strips")

    def __call__(self, batch):
        pairs = [pickle.loads(pair) for pair in batch["pair"]]
        for settings, clip in pairs:
            if isinstance(clip, Clip):
                prepare_clip(settings, clip, self.store, self.captioner.processor.image_size)
        records = caption_batch_into(self.captioner, pairs, self.store)
        return {name: [record[name] or "" for record in records] for name in ("status", "error", "video")}
