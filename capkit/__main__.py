"""The command line, `python -m capkit`: run a command, and end with an exit code and a line where it fails."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache

from capkit.arguments import EXIT_CODES as EXIT_CODES
from capkit.arguments import make_parser
from capkit.caption_commands import ONE_OF_SEVERAL, caption, caption_shard
from capkit.doctor import run_command as run_doctor
from capkit.store_commands import follow, replace, show, undo, write_page
from capkit.text import plain_text, show_warnings_plainly

STOPPED = "capkit: stopped; all that is written is kept, and the same command continues"
ONLY_PRINT = ("caption", "show", "doctor")  # when they print, all is done: a reader that has enough is no failure
GRACE_SECONDS = 1.5  # from Ctrl-C to the end of the process, even if a library does not return


def main() -> None:
    try:
        code = _run(make_parser().parse_args())
    finally:
        _flush()
    sys.exit(code)


def _run(arguments: argparse.Namespace) -> int:
    """Run a command; returns its exit code."""
    try:
        return COMMANDS[arguments.command](arguments)
    except (ValueError, ImportError) as error:
        return _fail(2, error)
    except BrokenPipeError as error:  # as in `show | head`
        return 0 if arguments.command in ONLY_PRINT else _fail(1, error)
    except OSError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        _say_stopped()
        return 130
    except Exception as error:
        return _fail(_exit_code(error), error)


def _exit_code(error: Exception) -> int:
    """The exit code of an error of capkit's own; any other is raised again, because it is a fault of capkit's."""
    from capkit.cogvlm2 import CheckpointError, CheckpointNotFound
    from capkit.files import Busy

    if isinstance(error, Busy):
        return 3
    if isinstance(error, CheckpointError):
        return 2 if isinstance(error, CheckpointNotFound) else 1
    raise error


def _flush() -> None:
    """Write what is left to print, unless nobody reads it any more; Python would complain of that at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _merge(arguments: argparse.Namespace) -> int:
    from capkit.runs import merge

    print(merged := merge(arguments.output))
    return 1 if merged.problems or not merged.num_ok and merged.num_errors else 0


def _show(arguments: argparse.Namespace) -> int:
    conditions = [*arguments.where, *([f"mark={arguments.mark}"] if arguments.mark else [])]
    return (follow if arguments.follow else show)(arguments.store, conditions)


def _replace(arguments: argparse.Namespace) -> int:
    a = arguments
    if (a.undo is None) == (a.replacement is None) or a.undo and (a.pattern or a.where or a.write):
        raise ValueError("give a pattern and a replacement, or --undo with a batch alone")
    return undo(a.store, a.undo) if a.undo else replace(a.store, a.pattern, a.replacement, a.where, a.write)


def _batch(arguments: argparse.Namespace) -> int:
    from capkit.batch import run_command

    a = arguments
    return run_command(a.table, a.output_dir, a.workers, a.retry, a.gpus, a.dry_run)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "caption": caption,
    "caption-shard": caption_shard,
    "merge": _merge,
    "show": _show,
    "page": lambda arguments: write_page([arguments.store], arguments.out, arguments.baseline),
    "compare": lambda arguments: write_page([arguments.old, arguments.new], arguments.out),
    "replace": _replace,
    "batch": _batch,
    "doctor": lambda arguments: run_doctor(),
}


@cache
def _say_stopped() -> None:
    """Print once that the command was stopped."""
    if ONE_OF_SEVERAL not in os.environ:
        os.write(2, f"{STOPPED}\n".encode())


def _fail(code: int, error: Exception) -> int:
    with suppress(BrokenPipeError):
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
