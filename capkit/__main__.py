"""The command line, `python -m capkit`: caption-shard, merge, show, page, compare, replace, batch and doctor."""

from __future__ import annotations

import argparse
import errno
import json
import os
import reprlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit.doctor import run_command as run_doctor
from capkit.text import plain_text, plural, show_warnings_plainly

if TYPE_CHECKING:
    from capkit.captioning import Captioner
    from capkit.runs import Item, Shard

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


EXIT_CODES = """\
exit codes, of all commands:
  0    done. A clip that cannot be captioned has a record with its error, is counted in the last line, and is no
       failure: one broken file among thousands stops neither `set -e` nor what waits for a Slurm array (afterok)
  1    failed or incomplete: full disk, damaged checkpoint, no clip captioned at all, missing records, a failed run
  2    wrong arguments, or nothing there under a name that they give
  3    another process is at work on this shard
  130  stopped by Ctrl-C or SIGTERM"""
STOPPED = "capkit: stopped; all that is written is kept, and the same command continues"
ONE_OF_SEVERAL = "CAPKIT_ONE_OF_SEVERAL"  # set for the processes of `--devices`: the one that started them speaks
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
GRACE_SECONDS = 1.5  # from Ctrl-C to the end of the process, even if a library does not return


def main() -> None:
    parser = _with_exit_codes(argparse.ArgumentParser, "Caption videos with CogVLM2-Caption.", prog="python -m capkit")
    commands = parser.add_subparsers(required=True)
    _add_caption_shard(commands)
    about = "Merge the shards' captions, and check that every clip has exactly one record."
    merge = _with_exit_codes(commands.add_parser, about, name="merge", help="merge the captions of all shards")
    merge.add_argument("output", type=_path, metavar="DIR", help="the shards' folder; captions.jsonl is written there")
    merge.set_defaults(run=_merge)
    show = _with_exit_codes(commands.add_parser, "Print captions.", name="show", help="print the captions in a store")
    show.add_argument("store", type=_path, help="captions.jsonl, or the folder that it is in")
    marks = ["right", "wrong", "unsure", "outdated"]
    show.add_argument("--mark", choices=marks, help="only those with this mark; outdated: the text has changed since")
    _add_where(show)
    show.set_defaults(run=_show)
    _add_pages(commands)
    _add_replace(commands)
    _add_batch(commands)
    about = "Check the installation: package versions, decord, CUDA."
    doctor = _with_exit_codes(commands.add_parser, about, name="doctor", help="check the installation")
    doctor.set_defaults(run=lambda arguments: run_doctor())
    arguments = parser.parse_args()
    try:
        code = arguments.run(arguments)
    except (ValueError, ImportError) as error:
        code = _fail(2, error)
    except BrokenPipeError:  # as in `show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _fail(1, error)
    except KeyboardInterrupt:
        _say_stopped()
        code = 130
    sys.exit(code)


def _with_exit_codes(make: Callable[..., argparse.ArgumentParser], about: str, **names: str) -> argparse.ArgumentParser:
    return make(description=about, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter, **names)


def _text(text: str) -> str:
    if not text.strip():  # as of a variable that a script has not set
        raise argparse.ArgumentTypeError("is empty")
    return text


def _path(text: str) -> Path:
    return Path(_text(text)).expanduser()


def _names(text: str) -> list[str]:
    if names := [name.strip() for name in text.split(",") if name.strip()]:
        return names
    raise argparse.ArgumentTypeError(f"{text!r} names none")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        example = '{"max_new_tokens": 300}'
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not JSON, such as {example!r}") from None


def _add_caption_shard(commands: Subparsers) -> None:
    about = "Caption one shard of a data set. Started again, it captions the clips that are still missing."
    names = {"name": "caption-shard", "help": "caption one shard of a data set"}
    parser = _with_exit_codes(commands.add_parser, about, **names)
    add = parser.add_argument
    add("videos", nargs="+", help="manifest (.csv, .tsv, .jsonl, .json, .parquet), folder, glob or video")
    add("--output", required=True, type=_path, metavar="DIR", help="folder that all shards share")
    environment = "from the environment of Slurm or torchrun, else 0/1"
    add("--shard", type=_text, help=f"such as 2/8, the first is 0/8; default: {environment}")
    add("--model", type=_text, default="demo", help='"demo", a folder, or a name on the Hugging Face hub')
    add("--revision", type=_text, help="branch, tag or commit on the hub")
    add("--quantization", choices=["4bit", "8bit"])
    add("--dtype", type=_text, default="auto")
    add(
        "--features-dir",
        type=_path,
        metavar="DIR",
        help="keep what the vision tower made of each frame, for later runs",
    )
    add("--device", type=_text, default="auto", help="such as cuda:1; default: the GPU of this local rank, or the CPU")
    add("--devices", type=_names, help="such as cuda:0,cuda:1: split the shard over one process for each device")
    add(
        "--prompt", help="for clips without a prompt in the manifest, whose columns it may name, as in 'Who is {name}?'"
    )
    steps = "question asked before the prompt, which sees its answer; give it several times for several"
    add("--step", action="append", default=[], type=_text, help=steps)
    add("--template", default="chat", choices=["chat", "vqa", "base"])
    add("--frame-numbers", default="index", choices=["index", "seconds"])
    add("--answer-prefix", default="", help="what every caption begins with")
    add("--frame-sampling", default="chat", help="chat, base, uniform or fps")
    add("--num-frames", type=int, default=24, help="maximum number of sampled frames")
    add("--frames-per-second", type=float, help="for --frame-sampling fps")
    add("--window-seconds", type=float, help="caption long videos in windows of this length")
    add("--shots", action="store_true", help="caption each shot of a film; needs pip install -e '.[shots]'")
    add("--trainer", type=_text, help="caption only the part of each video that a trainer, such as cogkit, trains on")
    add("--trainer-num-frames", type=int, help="number of frames that the trainer is set to; default: 49")
    add("--trainer-frames-per-second", type=float, help="that sat is set to, 8 (default) or 16")
    add("--trainer-stride", type=int, help="that videox-fun is set to; default: 3")
    add("--decoding", type=_json, default={}, help="JSON, such as '{\"max_new_tokens\": 300}'")
    add("--batch-size", type=int, default=8, help="clips in a batch of the model")
    add("--num-readers", type=int, default=2, help="clips that are read in parallel")
    add("--timeout-seconds", type=float, default=60.0, help="maximum time for reading a clip")
    add("--retry-errors", action="store_true", help="retry clips whose record is an error, except quarantined ones")
    add("--retry-quarantined", action="store_true", help="retry clips on which the reader process hung or crashed, too")
    parser.set_defaults(run=_caption_shard)


def _add_where(parser: argparse.ArgumentParser) -> None:
    about = "only captions whose column has this value; * stands for anything; may be given several times"
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help=about)


def _add_replace(commands: Subparsers) -> None:
    about = "Find and replace in the captions of a store. Prints what would change; with --write it is kept."
    names = {"name": "replace", "help": "find and replace in the captions of a store"}
    parser = _with_exit_codes(commands.add_parser, about, **names)
    parser.add_argument("store", type=_path, help="captions.jsonl, or the folder that it is in")
    parser.add_argument("pattern", nargs="?", help="regular expression, as of Python's re")
    parser.add_argument("replacement", nargs="?", help="text; \\1 stands for what the first group matched")
    _add_where(parser)
    parser.add_argument("--write", action="store_true", help="keep the new texts, as hand edits in one batch")
    parser.add_argument("--undo", type=_text, metavar="BATCH", help="take a batch back")
    parser.set_defaults(run=_replace)


def _add_pages(commands: Subparsers) -> None:
    every = "Write every caption of a store beside its clip's frames on a page to search, sort and filter."
    change = "Write what changed from one run to another on a page: captions added, removed and changed, word by word."
    for name, about, stores in (("page", every, ["store"]), ("compare", change, ["old", "new"])):
        parser = _with_exit_codes(commands.add_parser, about, name=name, help=about.split(" on a page")[0].lower())
        for store in stores:
            parser.add_argument(store, type=_path, help="captions.jsonl, or the folder that it is in")
        parser.add_argument("--out", required=True, type=_path, metavar="FILE", help="such as page.html")
        if name == "page":
            parser.add_argument("--baseline", type=_text, help="the cell that words are compared with")
        parser.set_defaults(run=_write_page, stores=stores)


def _add_batch(commands: Subparsers) -> None:
    about = "Run what is left to do of a table of notebooks."
    batch = _with_exit_codes(commands.add_parser, about, name="batch", help="run a table of notebooks")
    batch.add_argument("table", type=_path, help="runs.yaml or runs.csv; its relative paths start at its folder")
    batch.add_argument("--output-dir", type=_path, help="folder of all runs, in place of the table's output_dir")
    batch.add_argument("--workers", type=int, metavar="N", help="number of notebooks that run in parallel")
    batch.add_argument("--gpus", type=_names, default=[], metavar="0,1", help="a GPU for each worker")
    batch.add_argument("--retry", nargs="*", metavar="NAME", help="rerun the failed runs, or only these of them")
    batch.add_argument("--dry-run", action="store_true", help="check the table and list what would run")
    batch.set_defaults(run=_batch)


def _batch(arguments: argparse.Namespace) -> int:
    from capkit.batch import run_command

    a = arguments
    return run_command(a.table, a.output_dir, a.workers, a.retry, a.gpus, a.dry_run)


def _show(arguments: argparse.Namespace) -> int:
    from capkit.store_commands import show

    return show(arguments.store, [*arguments.where, *([f"mark={arguments.mark}"] if arguments.mark else [])])


def _write_page(arguments: argparse.Namespace) -> int:
    from capkit.store_commands import write_page

    paths = [getattr(arguments, name) for name in arguments.stores]
    return write_page(paths, arguments.out, getattr(arguments, "baseline", None))


def _replace(arguments: argparse.Namespace) -> int:
    from capkit.runs import StoreBusy
    from capkit.store_commands import replace, undo

    a = arguments
    if (a.undo is None) == (a.replacement is None) or a.undo and (a.pattern or a.where or a.write):
        raise ValueError("give a pattern and a replacement, or --undo with a batch alone")
    try:
        return undo(a.store, a.undo) if a.undo else replace(a.store, a.pattern, a.replacement, a.where, a.write)
    except StoreBusy as error:
        return _fail(3, error)


def _caption_shard(arguments: argparse.Namespace) -> int:
    from capkit.captioning import load_captioner
    from capkit.cogvlm2 import CheckpointError, CheckpointNotFound
    from capkit.runs import Shard, ShardBusy, caption_shard, check_numbers, find_clips

    shard = Shard.parse(arguments.shard) if arguments.shard else Shard.from_environment()
    settings = _settings(arguments)
    names = ("batch_size", "num_readers", "timeout_seconds", "retry_errors", "retry_quarantined")
    settings |= {name: getattr(arguments, name) for name in names}
    check_numbers(*(settings[name] for name in ("batch_size", "timeout_seconds", "num_readers")))
    cut = _cut(arguments)
    items = find_clips(arguments.videos[0] if len(arguments.videos) == 1 else arguments.videos)
    if arguments.devices and ONE_OF_SEVERAL not in os.environ:
        return _one_process_each(shard, arguments.devices)

    def load() -> Captioner:
        device = _local_device() if arguments.device == "auto" else arguments.device
        names = ("dtype", "quantization", "revision", "features_dir")
        return load_captioner(arguments.model, device, **{name: getattr(arguments, name) for name in names})

    try:
        records = caption_shard(load, items, arguments.output, shard, cut=cut, **settings)
    except CheckpointError as error:
        return _fail(2 if isinstance(error, CheckpointNotFound) else 1, error)
    except ShardBusy as error:
        return _fail(3, error)
    except OSError as error:
        advice = "; captions written so far are kept: make room, and the same command continues"
        return _fail(1, f"{error}{advice if error.errno in NO_SPACE else ''}")
    num_errors = sum(record["status"] == "error" for record in records)
    counts = f"{plural(len(records), 'clip')}, {num_errors} with an error"
    print(f"shard {shard}: {counts}, in {arguments.output.absolute()}")
    return 1 if records and num_errors == len(records) else 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompt, frame sampling and decoding, as arguments of `caption_shard`."""
    from capkit.captioning import Decoding
    from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt
    from capkit.video import FrameSampling

    text = DEFAULT_PROMPT if arguments.prompt is None else arguments.prompt
    named = {"frame_numbers": arguments.frame_numbers, "answer_prefix": arguments.answer_prefix}
    prompt = Prompt(text, arguments.template, **named, steps=arguments.step)
    sampling = FrameSampling(arguments.frame_sampling, arguments.num_frames, arguments.frames_per_second)
    return {"prompt": prompt, "frame_sampling": sampling, "decoding": Decoding.of(arguments.decoding)}


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


def _merge(arguments: argparse.Namespace) -> int:
    from capkit.runs import StoreBusy, merge

    try:
        merged = merge(arguments.output)
    except StoreBusy as error:
        return _fail(3, error)
    print(merged)
    return 1 if merged.problems or not merged.num_ok and merged.num_errors else 0


@cache
def _say_stopped() -> None:
    """Print once that the command was stopped."""
    if ONE_OF_SEVERAL not in os.environ:
        os.write(2, f"{STOPPED}\n".encode())


def _fail(code: int, error: Exception | str) -> int:
    print(plain_text(f"capkit: {error}"), file=sys.stderr)
    return code


def _end_soon_after_ctrl_c() -> None:
    """Have Ctrl-C and SIGTERM end this process and its children after GRACE_SECONDS, whatever the main thread does.

    Python raises KeyboardInterrupt only once a library returns, such as one that computes or waits for a dead disk.
    """

    def stop(number: int, frame: object) -> None:
        for once in (signal.SIGINT, signal.SIGTERM):  # a second one would only interrupt the end
            signal.signal(once, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as shells have it ignored by what runs in the background
            signal.signal(number, stop)
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)

    def end() -> None:
        os.read(signals, 1)
        since = time.monotonic()
        import psutil

        time.sleep(max(since + GRACE_SECONDS - time.monotonic(), 0))
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        _say_stopped()
        os._exit(130)

    threading.Thread(target=end, daemon=True).start()


if __name__ == "__main__":
    _end_soon_after_ctrl_c()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names that are not UTF-8
    show_warnings_plainly()
    main()
