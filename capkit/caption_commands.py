"""The commands that caption: caption and caption-shard."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from capkit.text import plural

if TYPE_CHECKING:
    from capkit.captioning import Captioner
    from capkit.runs import Item, Shard

ONE_OF_SEVERAL = "CAPKIT_ONE_OF_SEVERAL"  # set for the processes of `--devices`: the one that started them speaks
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def caption(arguments: argparse.Namespace) -> int:
    """Caption a few clips and print the captions; returns the exit code, 1 if no clip could be captioned.

    Raises:
        ValueError: an argument that is wrong for every clip, before a model is loaded.
        StoreBusy: another run is captioning into the same folder.
    """
    from capkit.runs import CaptionStore, caption_clips, check_fields, check_numbers, find_clips, output_folder
    from capkit.store_commands import print_captions
    from capkit.video import check_window

    settings = _settings(arguments)
    settings |= {name: getattr(arguments, name) for name in ("batch_size", "timeout_seconds", "retry_errors")}
    check_numbers(arguments.batch_size, arguments.timeout_seconds)
    check_window(arguments.start or 0.0, arguments.end)
    if arguments.retry_errors and not arguments.output:
        raise ValueError("--retry-errors: errors are kept in the folder of --output; give that too")
    window = {name: getattr(arguments, name) for name in ("start", "end") if getattr(arguments, name) is not None}
    items = [replace(item, **window) for item in find_clips(_videos(arguments))]
    check_fields(settings["prompt"], items)
    with TemporaryDirectory(prefix="capkit-") as temporary:
        folder = output_folder(arguments.output or temporary)
        store = CaptionStore(folder / "captions.jsonl")
        records = caption_clips(_load(arguments), items, store, **settings)
        print_captions(store, records)
    if arguments.output:
        print(f"\nCaptions: {store.path.absolute()}")
    return 0 if any(record["status"] == "ok" for record in records) else 1


def caption_shard(arguments: argparse.Namespace) -> int:
    """Caption a shard; returns the exit code, 1 if no clip could be captioned.

    Raises:
        ValueError: an argument that is wrong for every clip, before a model is loaded.
        ShardBusy: another process is working on this shard.
        OSError: writing fails; earlier captions are kept.
    """
    from capkit.runs import Shard, caption_shard, check_numbers, find_clips

    shard = Shard.parse(arguments.shard) if arguments.shard else Shard.from_environment()
    settings = _settings(arguments)
    names = ("batch_size", "num_readers", "timeout_seconds", "retry_errors", "retry_quarantined")
    settings |= {name: getattr(arguments, name) for name in names}
    check_numbers(*(settings[name] for name in ("batch_size", "timeout_seconds", "num_readers")))
    cut = _cut(arguments)
    items = find_clips(_videos(arguments))
    if arguments.devices and ONE_OF_SEVERAL not in os.environ:
        return _one_process_each(shard, arguments.devices)
    try:
        records = caption_shard(lambda: _load(arguments), items, arguments.output, shard, cut=cut, **settings)
    except OSError as error:
        if error.errno in NO_SPACE:
            advice = "captions written so far are kept: make room, and the same command continues"
            raise OSError(f"{error}; {advice}") from error
        raise
    num_errors = sum(record["status"] == "error" for record in records)
    counts = f"{plural(len(records), 'clip')}, {num_errors} with an error"
    print(f"shard {shard}: {counts}, in {arguments.output.absolute()}")
    return 1 if records and num_errors == len(records) else 0


def _videos(arguments: argparse.Namespace) -> str | list[str]:
    return arguments.videos[0] if len(arguments.videos) == 1 else arguments.videos


def _load(arguments: argparse.Namespace) -> Captioner:
    from capkit.captioning import load_captioner

    device = _local_device() if arguments.device == "auto" else arguments.device
    names = ("dtype", "quantization", "revision", "features_dir")
    return load_captioner(arguments.model, device, **{name: getattr(arguments, name) for name in names})


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompt, frame sampling and decoding, as arguments of `caption_clips` and `caption_shard`."""
    from capkit.captioning import Decoding
    from capkit.cogvlm2 import Prompt
    from capkit.video import FrameSampling

    a = arguments
    named = {"frame_numbers": a.frame_numbers, "answer_prefix": a.answer_prefix}
    prompt = Prompt(a.prompt, a.template, **named, steps=a.step)
    sampling = FrameSampling(a.frame_sampling, a.num_frames, a.frames_per_second)
    decoding = Decoding.of(a.decoding)  # checked as it is given
    if a.max_new_tokens is not None:
        if "max_new_tokens" in a.decoding:
            raise ValueError("--max-new-tokens: --decoding has max_new_tokens too; give one of them")
        decoding = Decoding.of(a.decoding | {"max_new_tokens": a.max_new_tokens})
    decoding.check_prefix(prompt.answer_prefix)
    return {"prompt": prompt, "frame_sampling": sampling, "decoding": decoding}


def _cut(arguments: argparse.Namespace) -> Callable[[list[Item]], list[Item]]:
    """Function from clips to the windows of them that the arguments ask for."""
    from capkit.runs import cut_into

    a = arguments
    settings = (a.trainer_num_frames, a.timeout_seconds, a.trainer_frames_per_second, a.trainer_stride)
    parts = (a.window_seconds, a.trainer or "", *settings, a.shots)
    cut_into([], *parts)  # wrong arguments are an error before anything starts
    return lambda items: cut_into(items, *parts, a.output / "cuts.jsonl")


def _local_device() -> str:
    """The GPU of torchrun's or Slurm's local rank; "auto" without a rank or a GPU."""
    import torch

    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    num_devices = torch.cuda.device_count()
    return f"cuda:{int(rank) % num_devices}" if rank and num_devices else "auto"


def _one_process_each(shard: Shard, devices: list[str]) -> int:
    """Run this command in a process for each device, with its part of the shard; returns the highest exit code."""
    from capkit.cogvlm2 import loading
    from capkit.runs import Shard

    for device in devices:
        loading.choose_device(device)  # raises for one that is not there
    command, processes = [sys.executable, "-m", "capkit", *sys.argv[1:]], []
    try:
        for index, device in enumerate(devices):
            part = shard.split(Shard(index, len(devices)))
            arguments = [*command, "--device", device, "--shard", str(part)]
            processes.append(subprocess.Popen(arguments, env=os.environ | {ONE_OF_SEVERAL: "1"}))
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    return max(code if code >= 0 else 1 for code in codes)  # below 0: ended by a signal
