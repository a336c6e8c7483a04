"""Command line: python -m capkit show captions.jsonl, batch runs.yaml, doctor, caption-shard, merge."""

import argparse
import signal
import sys
from pathlib import Path

from capkit.shard_commands import add_commands


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m capkit", description="Describe videos in words.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the captions in a store, and where everything is")
    show.add_argument("store", type=Path, help="captions.jsonl")
    _add_batch(commands)
    doctor = commands.add_parser("doctor", help="say what is installed, what is missing or conflicts, and what to do")
    doctor.set_defaults(run=_doctor)
    add_commands(commands)
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
    from capkit.records import CaptionStore

    store = CaptionStore(path)
    for record in store.current():
        print(f"\n{record['video']}")
        told = record["text"].strip() if record["status"] == "ok" else f"error: {record['error']}"
        print("  " + "".join(letter if letter.isprintable() else " " for letter in told))
    print(f"\nCaptions:           {store.path.absolute()}\nFrames as seen:     {store.strips.absolute()}/")


if __name__ == "__main__":
    main()
