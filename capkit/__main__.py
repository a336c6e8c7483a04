"""Command line: python -m capkit show captions.jsonl; caption-shard and merge are in shard_commands."""

import argparse
import sys
from pathlib import Path

from capkit.shard_commands import add_commands


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m capkit", description="Describe videos in words.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the captions in a store, and where everything is")
    show.add_argument("store", type=Path, help="captions.jsonl")
    add_commands(commands)
    arguments = parser.parse_args()
    if "run" in arguments:
        sys.exit(arguments.run(arguments))
    if not arguments.store.is_file():
        parser.error(f"{arguments.store}: no such file")
    _show(arguments.store)


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
