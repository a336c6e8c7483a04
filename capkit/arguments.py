"""What each command takes, as `python -m capkit COMMAND --help` shows it."""

from __future__ import annotations

import argparse
import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capkit import __version__

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_CODES = """\
exit codes, of all commands:
  0    done. A clip that cannot be captioned has a record with its error, is counted in the last line, and is no
       failure: one broken file among thousands stops neither `set -e` nor what waits for a Slurm array (afterok)
  1    failed or incomplete: full disk, damaged checkpoint, no clip captioned at all, missing records, a failed run
  2    wrong arguments, or nothing there under a name that they give
  3    another process is at work on this shard
  130  stopped by Ctrl-C or SIGTERM"""
STORE = "captions.jsonl, or the folder that it is in"
MARKS = ["right", "wrong", "unsure", "outdated"]
NO_DEFAULT: tuple[object, ...] = (None, False, "", [], {})  # the help says in words what happens without


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with the default of each option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.option_strings and action.default not in (*NO_DEFAULT, argparse.SUPPRESS)
        return f"{text}; default: %(default)s" if has_default and "default" not in text else text


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; `command` of what it parses is the command's name."""
    parser = _with_exit_codes(argparse.ArgumentParser, "Caption videos with CogVLM2-Caption.", prog="python -m capkit")
    parser.add_argument("--version", action="version", version=f"capkit {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    _add_caption(commands)
    _add_caption_shard(commands)
    about = "Merge the shards' captions, and check that every clip has exactly one record."
    merge = _command(commands, "merge", about, "merge the captions of all shards")
    merge.add_argument("output", type=_path, metavar="DIR", help="the shards' folder; captions.jsonl is written there")
    _add_show(commands)
    _add_pages(commands)
    _add_replace(commands)
    _add_batch(commands)
    _command(commands, "doctor", "Check the installation: package versions, decord, CUDA.", "check the installation")
    return parser


def _with_exit_codes(make: Callable[..., argparse.ArgumentParser], about: str, **names: str) -> argparse.ArgumentParser:
    return make(description=about, epilog=EXIT_CODES, formatter_class=_Help, **names)


def _command(commands: Subparsers, name: str, about: str, brief: str) -> argparse.ArgumentParser:
    return _with_exit_codes(commands.add_parser, about, name=name, help=brief)


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


def _add_caption(commands: Subparsers) -> None:
    about = "Caption one or a few clips, and print the captions."
    parser = _command(commands, "caption", about, "caption a few clips and print the captions")
    add = parser.add_argument
    add("videos", nargs="+", metavar="CLIP", help="video, folder, glob or manifest")
    add("--output", type=_path, metavar="DIR", help="keep captions.jsonl and pictures of the frames there, where clips "
        "that have a caption are not captioned again; default: keep nothing")  # fmt: skip
    add("--start", type=float, metavar="SECONDS", help="caption the clips from here; default: from their first frame")
    add("--end", type=float, metavar="SECONDS", help="and up to here; default: up to their end")
    _add_model(parser)
    _add_settings(parser)
    add("--batch-size", type=int, default=4, help="clips in a batch of the model")
    add("--timeout-seconds", type=float, default=60.0, help="maximum time for reading a clip")
    add("--retry-errors", action="store_true", help="try clips of --output again that failed before")


def _add_caption_shard(commands: Subparsers) -> None:
    about = "Caption one shard of a data set. Started again, it captions the clips that are still missing."
    parser = _command(commands, "caption-shard", about, "caption one shard of a data set")
    add = parser.add_argument
    add("videos", nargs="+", help="manifest (.csv, .tsv, .jsonl, .json, .parquet), folder, glob or video")
    add("--output", required=True, type=_path, metavar="DIR", help="folder that all shards share")
    environment = "from the environment of Slurm or torchrun, else 0/1"
    add("--shard", type=_text, help=f"such as 2/8, the first is 0/8; default: {environment}")
    _add_model(parser)
    add("--devices", type=_names, help="such as cuda:0,cuda:1: split the shard over one process for each device; "
        "default: one process")  # fmt: skip
    _add_settings(parser)
    add("--window-seconds", type=float, help="caption long videos in windows of this length; default: in full")
    add("--shots", action="store_true", help="caption each shot of a film; needs pip install -e '.[shots]'")
    trainers = (
        "cogvideo, cogkit, diffusers, cogvideox-factory, finetrainers, sat, videox-fun, diffsynth, musubi, ltx-2, "
        "diffusion-pipe, fastvideo, ai-toolkit, simpletuner, onetrainer, videotuna or open-sora"
    )
    add("--trainer", type=_text, help=f"caption only the part of each video that this trainer trains on: {trainers}; "
        "default: all of it")  # fmt: skip
    add("--trainer-num-frames", type=int, help="number of frames that the trainer is set to; default: 49")
    rate = "that sat is set to, 8 or 16, or open-sora, as fps_max; default: 8 and 24"
    add("--trainer-frames-per-second", type=float, help=rate)
    stride = "that videox-fun is set to, or videotuna, as frame_interval; default: 3 and 1"
    add("--trainer-stride", type=int, help=stride)
    add("--batch-size", type=int, default=8, help="clips in a batch of the model")
    add("--num-readers", type=int, default=2, help="clips that are read in parallel")
    add("--timeout-seconds", type=float, default=60.0, help="maximum time for reading a clip")
    add("--retry-errors", action="store_true", help="retry clips whose record is an error, except quarantined ones")
    add("--retry-quarantined", action="store_true", help="retry clips on which the reader process hung or crashed, too")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=_text, default="demo", help='"demo", a folder, or a name on the Hugging Face hub')
    add("--revision", type=_text, help="branch, tag or commit on the hub; default: main")
    add("--quantization", choices=["4bit", "8bit"], help="of the weights; default: none")
    add("--dtype", type=_text, default="auto", help="of the model, such as bfloat16")
    features = "keep what the vision tower made of each frame, for later runs; default: keep nothing"
    add("--features-dir", type=_path, metavar="DIR", help=features)
    add("--device", type=_text, default="auto", help="such as cuda:1; default: the GPU of this local rank, or the CPU")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what is asked, what is seen and how words are chosen."""
    add = parser.add_argument
    prompt = "for clips without a prompt in a manifest, whose columns it may name, as in 'Who is {name}?'"
    add("--prompt", default="Please describe this video in detail.", help=prompt)  # as capkit.DEFAULT_PROMPT
    steps = "question asked before the prompt, which sees its answer; give it several times for several; default: none"
    add("--step", action="append", default=[], type=_text, help=steps)
    add("--template", default="chat", choices=["chat", "vqa", "base"], help="form of the prompt, as in the original")
    numbers = "what stands beside each frame in the prompt: its number, as in the original, or its time"
    add("--frame-numbers", default="index", choices=["index", "seconds"], help=numbers)
    add("--answer-prefix", default="", help="what every caption begins with; default: nothing")
    add("--frame-sampling", default="chat", help="chat, base, uniform or fps")
    add("--num-frames", type=int, default=24, help="maximum number of sampled frames")
    add("--frames-per-second", type=float, help="for --frame-sampling fps, which has no default for it")
    add("--max-new-tokens", type=int, help="longest caption, in tokens; default: 2048")
    add("--decoding", type=_json, default={}, help="JSON, such as '{\"temperature\": 0.7}'; default: greedy")


def _add_show(commands: Subparsers) -> None:
    parser = _command(commands, "show", "Print captions, hand-edited or the model's.", "print the captions in a store")
    parser.add_argument("store", type=_path, help=STORE)
    mark = "only those with this mark; outdated: the text has changed since; default: all"
    parser.add_argument("--mark", choices=MARKS, help=mark)
    _add_where(parser)
    follow = "print the last captions, and then those of a run that is under way as they arrive, until Ctrl-C"
    parser.add_argument("--follow", action="store_true", help=follow)


def _add_where(parser: argparse.ArgumentParser) -> None:
    about = "only captions whose column has this value; * stands for anything; may be given several times; default: all"
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help=about)


def _add_replace(commands: Subparsers) -> None:
    about = "Find and replace in the captions of a store. Prints what would change; with --write it is kept."
    parser = _command(commands, "replace", about, "find and replace in the captions of a store")
    parser.add_argument("store", type=_path, help=STORE)
    parser.add_argument("pattern", nargs="?", help="regular expression, as of Python's re")
    parser.add_argument("replacement", nargs="?", help="text; \\1 stands for what the first group matched")
    _add_where(parser)
    parser.add_argument("--write", action="store_true", help="keep the new texts, as hand edits in one batch")
    parser.add_argument("--undo", type=_text, metavar="BATCH", help="take a batch back; default: none")


def _add_pages(commands: Subparsers) -> None:
    every = "Write every caption of a store beside its clip's frames on a page to search, sort and filter."
    change = "Write what changed from one run to another on a page: captions added, removed and changed, word by word."
    for name, about, stores in (("page", every, ["store"]), ("compare", change, ["old", "new"])):
        parser = _command(commands, name, about, about.split(" on a page")[0].lower())
        for store in stores:
            parser.add_argument(store, type=_path, help=STORE)
        parser.add_argument("--out", required=True, type=_path, metavar="FILE", help="such as page.html")
        if name == "page":
            baseline = "the cell that words are compared with; default: the first"
            parser.add_argument("--baseline", type=_text, help=baseline)


def _add_batch(commands: Subparsers) -> None:
    batch = _command(commands, "batch", "Run what is left to do of a table of notebooks.", "run a table of notebooks")
    add = batch.add_argument
    add("table", type=_path, help="runs.yaml or runs.csv; its relative paths start at its folder")
    add("--output-dir", type=_path, help="folder of all runs; default: the table's output_dir")
    workers = "number of notebooks that run in parallel; default: one for each of --gpus, else as the table says"
    add("--workers", type=int, metavar="N", help=workers)
    add("--gpus", type=_names, default=[], metavar="0,1", help="a GPU for each worker; default: all see all GPUs")
    retry = "rerun the failed runs, or only these of them; default: only runs that have not been tried"
    add("--retry", nargs="*", metavar="NAME", help=retry)
    add("--dry-run", action="store_true", help="check the table and list what would run")
