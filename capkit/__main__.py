"""Command line: python -m capkit show captions.jsonl, batch runs.yaml, doctor, caption-shard, merge."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m capkit", description="Describe videos in words.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the captions in a store, and where everything is")
    show.add_argument("store", type=Path, help="captions.jsonl")
    _add_batch(commands)
    doctor = commands.add_parser("doctor", help="say what is installed, what is missing or conflicts, and what to do")
    doctor.set_defaults(run=_doctor)
    _add_shard_commands(commands)
    arguments = parser.parse_args()
    if "run" in arguments:
        sys.exit(arguments.run(arguments))
    if not arguments.store.is_file():
        parser.error(f"{arguments.store}: no such file")
    _show(arguments.store)


def _add_batch(commands) -> None:
    batch = commands.add_parser("batch", help="run a table of notebooks, each once")
    batch.add_argument("table", type=Path, help="runs.yaml or runs.csv; relative paths in it begin at its folder")
    batch.add_argument("--output-dir", type=Path, help="where the runs' folders go, instead of where the table says")
    batch.add_argument("--workers", type=int, metavar="N", help="runs at a time")
    batch.add_argument("--gpus", default="", metavar="0,1", help="a GPU for each worker")
    batch.add_argument("--retry", nargs="*", metavar="NAME", help="run again what failed, or of it only these runs")
    batch.add_argument("--dry-run", action="store_true", help="check the table and say what would be run")
    batch.set_defaults(run=_batch)


def _batch(arguments) -> int:
    from capkit.batch import run_command

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    gpus = [name for name in arguments.gpus.split(",") if name]
    a = arguments
    return run_command(a.table, a.output_dir, a.workers, a.retry, gpus, a.dry_run)


def _doctor(arguments) -> int:
    from capkit.doctor import run_command

    return run_command()


def _show(path: Path) -> None:
    from capkit.runs import CaptionStore

    store = CaptionStore(path)
    for record in store.current():
        print(f"\n{record['video']}")
        told = record["text"].strip() if record["status"] == "ok" else f"error: {record['error']}"
        print("  " + "".join(letter if letter.isprintable() else " " for letter in told))
    print(f"\nCaptions:           {store.path.absolute()}\nFrames as seen:     {store.strips.absolute()}/")


def _add_shard_commands(commands) -> None:
    """Add `caption-shard` and `merge` to argparse's subcommands; each sets `run`, to be called with the arguments."""
    add = commands.add_parser(
        "caption-shard",
        help="caption one shard of a data set",
        description="Caption one shard of a data set. Killed and started again, it does what is missing.",
        epilog="Exit code: 0 every clip has a record, a caption or an error; 1 it could not go on; 2 wrong arguments; "
        "3 another process is at work on this shard.",
    )
    add.add_argument("videos", nargs="+", help="manifest (.csv, .jsonl), folder, glob or video")
    add.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder that all shards share")
    add.add_argument("--shard", help="such as 2/8, the first is 0/8; by default what Slurm or torchrun says, else 0/1")
    add.add_argument("--model", default="demo", help='"demo", a folder, or a name on the Hugging Face hub')
    add.add_argument("--revision", help="branch, tag or commit on the hub")
    add.add_argument("--quantization", choices=["4bit", "8bit"])
    add.add_argument("--dtype", default="auto")
    add.add_argument("--device", default="auto", help="such as cuda:1; by default this local rank's GPU, or the CPU")
    add.add_argument("--devices", default="", help="such as cuda:0,cuda:1: the shard is split over a process for each")
    add.add_argument("--prompt", help="a manifest's own prompts go before it")
    add.add_argument("--template", default="chat", choices=["chat", "vqa", "base"])
    add.add_argument("--frame-numbers", default="index", choices=["index", "seconds"])
    add.add_argument("--frame-sampling", default="chat", help="chat, base, uniform or fps")
    add.add_argument("--num-frames", type=int, default=24)
    add.add_argument("--frames-per-second", type=float, help="with --frame-sampling fps")
    add.add_argument("--window-seconds", type=float, help="caption long videos in windows of this length")
    add.add_argument("--trainer", help="caption only the part that cogvideo, cogkit, diffusers or sat looks at")
    add.add_argument("--trainer-num-frames", type=int, default=49, help="how many frames that trainer is set to")
    add.add_argument("--decoding", type=json.loads, default={}, help="JSON, such as '{\"max_new_tokens\": 300}'")
    add.add_argument("--batch-size", type=int, default=8, help="clips that go through the model together")
    add.add_argument("--num-readers", type=int, default=2, help="clips that are read at the same time")
    add.add_argument("--timeout-seconds", type=float, default=60.0, help="longest time to read one clip")
    add.add_argument("--retry-errors", action="store_true", help="try again what failed, but for clips in quarantine")
    add.add_argument("--retry-quarantined", action="store_true", help="also clips that hung or killed their reader")
    add.set_defaults(run=caption_shard_command)

    add = commands.add_parser(
        "merge",
        help="put the shards' captions together and see that every clip is accounted for",
        epilog="Exit code: 0 every clip has exactly one record; 1 something is missing, and said.",
    )
    add.add_argument("output", type=Path, metavar="DIR", help="the shards' folder; captions.jsonl is written there")
    add.set_defaults(run=merge_command)


def caption_shard_command(arguments: argparse.Namespace) -> int:
    """Do what `caption-shard` was asked; returns the exit code."""
    from capkit.captioning import load_captioner
    from capkit.cogvlm2 import CheckpointError
    from capkit.runs import Shard, ShardBusy, caption_shard, find_clips

    try:
        shard = Shard.parse(arguments.shard) if arguments.shard else Shard.from_environment()
        if arguments.devices:
            return _one_process_each(shard, arguments.devices.split(","))
        asked = _asked(arguments)
        items = find_clips(arguments.videos[0] if len(arguments.videos) == 1 else arguments.videos)

        def load():
            device = local_device() if arguments.device == "auto" else arguments.device
            return load_captioner(arguments.model, device, arguments.dtype, arguments.quantization, arguments.revision)

        names = ("batch_size", "num_readers", "timeout_seconds", "retry_errors", "retry_quarantined")
        how = {name: getattr(arguments, name) for name in names}
        records = caption_shard(load, items, arguments.output, shard, cut=_cut(arguments), **how, **asked)
    except (ValueError, ImportError) as error:
        return _fail(2, error)
    except CheckpointError as error:
        return _fail(1, error)
    except ShardBusy as error:
        return _fail(3, error)
    except OSError as error:
        return _fail(1, f"{error}\nWhat is captioned is kept; start it again once that is mended.")
    num_errors = sum(record["status"] == "error" for record in records)
    print(f"shard {shard}: {len(records)} clips, {num_errors} with an error, in {arguments.output.absolute()}")
    return 0


def _asked(arguments):
    from capkit.captioning import Decoding
    from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt
    from capkit.video import FrameSampling

    text = DEFAULT_PROMPT if arguments.prompt is None else arguments.prompt
    prompt = Prompt(text, arguments.template, frame_numbers=arguments.frame_numbers)
    sampling = FrameSampling(arguments.frame_sampling, arguments.num_frames, arguments.frames_per_second)
    return {"prompt": prompt, "frame_sampling": sampling, "decoding": Decoding.of(arguments.decoding)}


def _cut(arguments):
    """From items to the parts of them that are asked for."""
    from capkit.runs import cut_into

    parts = (arguments.window_seconds, arguments.trainer or "", arguments.trainer_num_frames, arguments.timeout_seconds)
    cut_into([], *parts)  # nonsense is told before anything starts
    return lambda items: cut_into(items, *parts)


def local_device() -> str:
    """The GPU of torchrun's or Slurm's local rank, "auto" where there is no rank or no GPU."""
    import torch

    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    num_devices = torch.cuda.device_count()
    return f"cuda:{int(rank) % num_devices}" if rank and num_devices else "auto"


def _one_process_each(shard, devices) -> int:
    """This command once for each device, each with its part of the shard; the worst of their exit codes."""
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


def merge_command(arguments: argparse.Namespace) -> int:
    """Do what `merge` was asked; returns the exit code."""
    from capkit.runs import merge

    try:
        merged = merge(arguments.output)
    except ValueError as error:
        return _fail(2, error)
    except OSError as error:
        return _fail(1, error)
    print(merged)
    return 1 if merged.problems else 0


def _fail(code, error) -> int:
    print(f"capkit: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
