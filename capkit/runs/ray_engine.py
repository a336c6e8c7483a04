"""Caption on a Ray cluster: clips are read on CPUs and stream into captioners on GPUs (`pip install -e '.[ray]'`).

Ray moves the clips and keeps nothing: each captioner writes its records to a store of its own in the output folder,
which all nodes share, and `merge` combines them. So a lost node costs the batch in hand, which Ray does again
elsewhere, and a restarted run does what is missing.
"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capkit.captioning import DEMO_CHECKPOINT, GREEDY, DecodingLike, load_captioner
from capkit.cogvlm2 import DEFAULT_PROMPT, CogVLM2VideoProcessor, Prompt, PromptLike, fingerprint, loading
from capkit.files import output_folder, unused_name
from capkit.runs.caption import (
    caption_batch_into,
    check_numbers,
    counts_before,
    current_records,
    missing,
    plan_clips,
    prepare_clip,
)
from capkit.runs.digests import digest_once
from capkit.runs.fields import check_fields
from capkit.runs.manifests import Item
from capkit.runs.prefetch import Quarantine, read_clip
from capkit.runs.progress import Progress
from capkit.runs.shards import Shard, ShardBusy, heartbeat_path, shard_store, shard_stores, write_plan
from capkit.runs.store import CaptionStore, ModelIdentity
from capkit.text import encodable
from capkit.video import Clip, ClipReader, FrameSamplingLike

Batch = dict[str, np.ndarray]  # Ray's
SHARD = Shard()  # on Ray a folder is one shard, in several stores


def caption_on_ray(
    items: Iterable[Item],
    output_dir: str | os.PathLike[str],
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
    frame_sampling: FrameSamplingLike = "chat",
) -> list[dict[str, Any]]:
    """Caption items on the connected Ray cluster, or on this machine if `ray.init` was not called.

    A clip that cannot be read, or does not fit into memory, gets a record with the error, and the others go on.

    Args:
        items: from `find_clips`; every node must reach the files under the same names.
        output_dir: a folder that every node reaches under this name; its layout is that of `capkit.runs.shards`.
        model, device, dtype, quantization, revision: arguments of `load_captioner`, for each captioner.
        batch_size: clips that go through a model together.
        retry_errors: try clips again that failed before, except those in quarantine.
        retry_quarantined: those, too.
        timeout_seconds: longest time to read one clip.
        num_captioners: models to load, each on its own GPU.
        cpus_per_captioner, gpus_per_captioner: resources that Ray reserves for each; gpus None: 1 if the cluster has
            GPUs, else 0.
        cpus_per_reader: CPUs that Ray reserves for each process that reads clips.
        prompt, decoding, frame_sampling: settings of every caption, see `caption_clips`.

    Returns:
        The current record of every item, in order.

    Raises:
        ImportError: Ray is not installed.
        ShardBusy: another process is working in the folder, on Ray or as its only shard.
        ValueError: settings that are invalid for every clip.
        OSError: the folder cannot be written; earlier captions are kept.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("captioning on Ray needs Ray: pip install -e '.[ray]'") from error
    check_numbers(batch_size, timeout_seconds)
    folder = output_folder(output_dir).absolute()
    items = list(dict.fromkeys(items))
    check_fields(Prompt.of(prompt), items)
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    if gpus_per_captioner is None:
        gpus_per_captioner = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    if retry_quarantined:
        for path in folder.glob("*.quarantine.jsonl"):
            path.rename(unused_name(Path(f"{path}.old")))
    resources = {"num_cpus": cpus_per_captioner, "num_gpus": gpus_per_captioner}
    model_arguments = (model, device, dtype, quantization, revision)
    with shard_store(folder, SHARD).hold(ShardBusy):
        identity, image_size = ray.get(ray.remote(_identify).options(**resources).remote(*model_arguments))
        planned = plan_clips(identity, items, prompt, decoding, frame_sampling)
        write_plan(folder, SHARD, items, planned, Prompt.of(prompt))
        stores = [*map(CaptionStore, shard_stores(folder))]
        todo = missing(planned, stores, retry_errors or retry_quarantined)
        num_before = counts_before(planned, stores, len(todo))
        with Progress(("clip", "caption"), len(todo), *num_before, heartbeat_path(folder, SHARD)) as progress:
            pool = ray.data.ActorPoolStrategy(size=num_captioners)
            captioning = {"batch_size": batch_size, "compute": pool, **resources}
            read = functools.partial(_read, folder=folder, timeout_seconds=timeout_seconds, image_size=image_size)
            for record in _stream(todo, folder, model_arguments, read, cpus_per_reader, captioning):
                progress.update(record)
    return current_records(planned, map(CaptionStore, shard_stores(folder)))


def _identify(
    model: str, device: str, dtype: str, quantization: str | None, revision: str | None
) -> tuple[ModelIdentity, int]:
    """A model's identity and image size, without loading it. Run it where the model will: the dtype depends on it."""
    place = loading.choose_device(device)
    chosen = loading.choose_dtype(dtype, place)
    if quantization is not None:
        loading.quantization_config(quantization, chosen, place)  # raises before anything is downloaded
    folder = loading.find(DEMO_CHECKPOINT if model == "demo" else model, revision)
    image_size = CogVLM2VideoProcessor.from_pretrained(folder).image_size
    return ModelIdentity(model, fingerprint(folder), str(chosen).removeprefix("torch."), quantization), image_size


def _stream(
    todo: Sequence[dict[str, Any]],
    folder: Path,
    model_arguments: tuple[Any, ...],
    read: Callable[[Batch], Batch],
    cpus_per_reader: float,
    captioning: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield the status, error and video of each record as it comes; full records are in the stores."""
    import ray.data

    if not todo:
        return
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    # Blocks of one row: Ray passes results on once a block is full, and repeats all of a lost block.
    context.target_max_block_size, context.enable_progress_bars = 200, False
    try:
        rows = [{"settings": pickle.dumps(settings)} for settings in todo]
        data: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(todo))
        data = data.map_batches(read, batch_size=1, num_cpus=cpus_per_reader)
        data = data.map_batches(_CaptionerActor, fn_constructor_args=(folder, model_arguments), **captioning)
        yield from data.iter_rows()
    finally:
        context.target_max_block_size, context.enable_progress_bars = before


@functools.cache
def _reader() -> tuple[ClipReader, Callable[[str], str | None]]:
    """The clip reader of this worker process, which Ray reuses, and the digests of the files that it read."""
    return ClipReader(), digest_once()


def _read(batch: Batch, folder: Path, timeout_seconds: float, image_size: int) -> Batch:
    """On a CPU: read clips, or get the errors, which Ray would drop the block for; pickled with their settings."""
    (reader, digest), store = _reader(), shard_store(folder, SHARD)  # whose strips all share
    own = folder / f"ray-{socket.gethostname()}.quarantine.jsonl"
    quarantine = Quarantine(own, folder.glob("*.quarantine.jsonl"))
    pairs = []
    for settings in map(pickle.loads, batch["settings"]):
        clip = read_clip(settings, timeout_seconds, reader, quarantine, image_size, store)
        if isinstance(clip, Clip):
            prepare_clip(settings, clip, store, image_size, digest)
        pairs.append((settings, clip))
    return {"pair": np.array([pickle.dumps(pair, protocol=5) for pair in pairs], dtype=object)}


class _CaptionerActor:
    """On a GPU: a model, and a store that only this actor writes."""

    def __init__(self, folder: Path, model_arguments: tuple[Any, ...]):
        self.captioner = load_captioner(*model_arguments)
        self.store = CaptionStore(folder / f"ray-{uuid.uuid4().hex}.jsonl")

    def __call__(self, batch: Batch) -> dict[str, list[str]]:
        pairs = [pickle.loads(pair) for pair in batch["pair"]]
        records = caption_batch_into(self.captioner, pairs, self.store)
        names = ("status", "error", "video")
        return {name: [encodable(record[name] or "") for record in records] for name in names}
