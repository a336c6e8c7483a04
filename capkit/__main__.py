"""The command line, `python -m capkit`: caption-shard, merge, show, batch and doctor."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit.doctor import run_command as run_doctor
from capkit.text import plain_text

if TYPE_CHECKING:
    from capkit.captioning import Captioner
    from capkit.runs import Item, Shard

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m capkit", description="Caption videos with CogVLM2-Caption.")
    commands = parser.add_subparsers(required=True)
    _add_caption_shard(commands)
    merge = commands.add_parser(
        "merge",
        help="merge the shards' captions and check that no clip is missing",
        epilog="Exit code: 0 every clip has exactly one record; 1 records are missing, as listed; 2 wrong arguments; "
        "3 a run is captioning into captions.jsonl.",
    )
    merge.add_argument("output", type=Path, metavar="DIR", help="the shards' folder; captions.jsonl is written there")
    merge.set_defaults(run=_merge)
    show = commands.add_parser("show", help="print the captions in a store")
    show.add_argument("store", type=Path, help="captions.jsonl")
    show.set_defaults(run=_show)
    _add_batch(commands)
    doctor = commands.add_parser("doctor", help="check the installation: package versions, decord, CUDA")
    doctor.set_defaults(run=lambda arguments: run_doctor())
    arguments = parser.parse_args()
    sys.exit(arguments.run(arguments))


def _add_caption_shard(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "caption-shard",
        help="caption one shard of a data set",
        description="Caption one shard of a data set. Started again, it captions the clips that are still missing.",
        epilog="Exit code: 0 every clip has a record, a caption or an error; 1 the run was aborted; 2 wrong arguments; "
        "3 another process is captioning this shard.",
    )
    add = parser.add_argument
    add("videos", nargs="+", help="manifest (.csv, .tsv, .jsonl, .json, .parquet), folder, glob or video")
    add("--output", required=True, type=Path, metavar="DIR", help="folder that all shards share")
    add("--shard", help="such as 2/8, the first is 0/8; default: from the environment of Slurm or torchrun, else 0/1")
    add("--model", default="demo", help='"demo", a folder, or a name on the Hugging Face hub')
    add("--revision", help="branch, tag or commit on the hub")
    add("--quantization", choices=["4bit", "8bit"])
    add("--dtype", default="auto")
    add("--device", default="auto", help="such as cuda:1; default: the GPU of this local rank, or the CPU")
    add("--devices", default="", help="such as cuda:0,cuda:1: split the shard over one process for each device")
    add("--prompt", help="for clips without a prompt in the manifest")
    add("--template", default="chat", choices=["chat", "vqa", "base"])
    add("--frame-numbers", default="index", choices=["index", "seconds"])
    add("--frame-sampling", default="chat", help="chat, base, uniform or fps")
    add("--num-frames", type=int, default=24, help="maximum number of sampled frames")
    add("--frames-per-second", type=float, help="for --frame-sampling fps")
    add("--window-seconds", type=float, help="caption long videos in windows of this length")
    add("--trainer", help="caption only the part of each video that cogvideo, cogkit, diffusers or sat trains on")
    add("--trainer-num-frames", type=int, default=49, help="number of frames that the trainer is set to")
    add("--decoding", type=json.loads, default={}, help="JSON, such as '{\"max_new_tokens\": 300}'")
    add("--batch-size", type=int, default=8, help="clips in a batch of the model")
    add("--num-readers", type=int, default=2, help="clips that are read in parallel")
    add("--timeout-seconds", type=float, default=60.0, help="maximum time for reading a clip")
    add("--retry-errors", action="store_true", help="retry clips whose record is an error, except quarantined ones")
    add("--retry-quarantined", action="store_true", help="retry clips on which the reader process hung or crashed, too")
    parser.set_defaults(run=_caption_shard)


def _add_batch(commands: Subparsers) -> None:
    batch = commands.add_parser("batch", help="run a table of notebooks")
    batch.add_argument("table", type=Path, help="runs.yaml or runs.csv; its relative paths start at its folder")
    batch.add_argument("--output-dir", type=Path, help="folder of all runs, in place of the table's output_dir")
    batch.add_argument("--workers", type=int, metavar="N", help="number of notebooks that run in parallel")
    batch.add_argument("--gpus", default="", metavar="0,1", help="a GPU for each worker")
    batch.add_argument("--retry", nargs="*", metavar="NAME", help="rerun the failed runs, or only these of them")
    batch.add_argument("--dry-run", action="store_true", help="check the table and list what would run")
    batch.set_defaults(run=_batch)


def _batch(arguments: argparse.Namespace) -> int:
    from capkit.batch import run_command

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as with Ctrl-C
    gpus = [name for name in arguments.gpus.split(",") if name]
    a = arguments
    return run_command(a.table, a.output_dir, a.workers, a.retry, gpus, a.dry_run)


def _show(arguments: argparse.Namespace) -> int:
    from capkit.runs import CaptionStore

    if not arguments.store.is_file():
        return _fail(2, f"{arguments.store}: no such file")
    store = CaptionStore(arguments.store)
    for record in store.current():
        start, end = record.get("start_seconds"), record.get("end_seconds")
        is_window = bool(start) or end is not None
        window = f" ({start or 0:g} s to {'the end' if end is None else f'{end:g} s'})" if is_window else ""
        print("\n" + plain_text(f"{record['video']}{window}"))
        text = f"error: {record['error']}" if record["status"] != "ok" else record["text"].strip()
        text = record.get("edited_text", text)
        print(plain_text(f"  {' '.join(text.split())}"))
    print(f"\nCaptions:           {store.path.absolute()}\nFrames as seen:     {store.strips.absolute()}/")
    return 0


def _caption_shard(arguments: argparse.Namespace) -> int:
    from capkit.captioning import load_captioner
    from capkit.cogvlm2 import CheckpointError
    from capkit.runs import Shard, ShardBusy, caption_shard, find_clips

    try:
        shard = Shard.parse(arguments.shard) if arguments.shard else Shard.from_environment()
        if arguments.devices:
            return _one_process_each(shard, arguments.devices.split(","))
        settings = _settings(arguments)
        items = find_clips(arguments.videos[0] if len(arguments.videos) == 1 else arguments.videos)

        def load() -> Captioner:
            device = _local_device() if arguments.device == "auto" else arguments.device
            return load_captioner(arguments.model, device, arguments.dtype, arguments.quantization, arguments.revision)

        names = ("batch_size", "num_readers", "timeout_seconds", "retry_errors", "retry_quarantined")
        settings |= {name: getattr(arguments, name) for name in names}
        records = caption_shard(load, items, arguments.output, shard, cut=_cut(arguments), **settings)
    except (ValueError, ImportError) as error:
        return _fail(2, error)
    except CheckpointError as error:
        return _fail(1, error)
    except ShardBusy as error:
        return _fail(3, error)
    except OSError as error:
        return _fail(1, f"{error}; captions written so far are kept, and the same command continues")
    num_errors = sum(record["status"] == "error" for record in records)
    print(f"shard {shard}: {len(records)} clips, {num_errors} with an error, in {arguments.output.absolute()}")
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompt, frame sampling and decoding, as arguments of `caption_shard`."""
    from capkit.captioning import Decoding
    from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt
    from capkit.video import FrameSampling

    text = DEFAULT_PROMPT if arguments.prompt is None else arguments.prompt
    prompt = Prompt(text, arguments.template, frame_numbers=arguments.frame_numbers)
    sampling = FrameSampling(arguments.frame_sampling, arguments.num_frames, arguments.frames_per_second)
    return {"prompt": prompt, "frame_sampling": sampling, "decoding": Decoding.of(arguments.decoding)}


def _cut(arguments: argparse.Namespace) -> Callable[[list[Item]], list[Item]]:
    """Function from clips to the windows of them that the arguments ask for."""
    from capkit.runs import cut_into

    parts = (arguments.window_seconds, arguments.trainer or "", arguments.trainer_num_frames, arguments.timeout_seconds)
    cut_into([], *parts)  # wrong arguments are an error before anything starts
    return lambda items: cut_into(items, *parts)


def _local_device() -> str:
    """The GPU of torchrun's or Slurm's local rank; "auto" without a rank or a GPU."""
    import torch

    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    num_devices = torch.cuda.device_count()
    return f"cuda:{int(rank) % num_devices}" if rank and num_devices else "auto"


def _one_process_each(shard: Shard, devices: list[str]) -> int:
    """Run this command in a process for each device, with its part of the shard; returns the highest exit code."""
    from capkit.runs import Shard

    command, processes = [sys.executable, "-m", "capkit", *sys.argv[1:], "--devices", ""], []
    try:
        for index, device in enumerate(devices):
            part = shard.split(Shard(index, len(devices)))
            processes.append(subprocess.Popen([*command, "--device", device, "--shard", str(part)]))
        return max(abs(process.wait()) for process in processes)
    finally:
        for process in processes:
            process.terminate()


def _merge(arguments: argparse.Namespace) -> int:
    from capkit.runs import StoreBusy, merge

    try:
        merged = merge(arguments.output)
    except ValueError as error:
        return _fail(2, error)
    except StoreBusy as error:
        return _fail(3, error)
    except OSError as error:
        return _fail(1, error)
    print(merged)
    return 1 if merged.problems else 0


def _fail(code: int, error: Exception | str) -> int:
    print(plain_text(f"capkit: {error}"), file=sys.stderr)
    return code


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of capkit's as a plain line, others as Python prints them."""
    if Path(__file__).parent in Path(filename).parents:
        return plain_text(f"capkit: {message}") + "\n"
    return _format_python_warning(message, category, filename, lineno, line)


if __name__ == "__main__":
    _format_python_warning, warnings.formatwarning = warnings.formatwarning, _format_warning
    main()
