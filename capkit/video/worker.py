"""A killable worker process that calls one function repeatedly: protection from C code that hangs or crashes.

Not multiprocessing, whose spawned children import the user's main script again.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from capkit.video.container import VideoError

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_SECONDS = 1e9  # more than timers take
ORPHAN_SECONDS = 5  # a worker whose parent was killed during a call ends this long after the call's timeout
MAIN = (
    "import pickle, sys; sys.path[:], *task = pickle.load(sys.stdin.buffer); "
    "from capkit.video.worker import serve; serve(*task)"
)


class WriteError(OSError):
    """A worker's function cannot write its file."""


class WorkerProcess:
    """A process that calls one function. It starts with the first call, and again after a call that ended it.

    Not thread-safe, but for `close`. A worker whose parent is killed ends too. Ctrl-C in a terminal reaches the parent
    only, which closes its workers: a clip that is being read then is not to blame.

    Args:
        module, function: names of the function; its arguments and results are pickled.
        memory_bytes: limit for the worker's memory (POSIX); None: no limit.
    """

    def __init__(self, module: str, function: str, memory_bytes: int | None = None) -> None:
        self._task = (module, function, memory_bytes)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._is_closed = threading.Lock(), False

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id, None while there is no process."""
        return None if self._process is None else self._process.pid

    def call(self, *arguments: Any, timeout_seconds: float) -> Any:
        """The function's result.

        Raises:
            VideoError, ImportError, MemoryError, WriteError: raised by the function.
            TimeoutError: it took longer than this, including the start of the process, which was killed.
            ChildProcessError: the process died, for example of another exception; the message has the exit code or
                signal, and the end of stderr.
            CancelledError: the worker was closed, also if that happens meanwhile.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin and process.stdout  # both are pipes
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timeout_seconds = min(timeout_seconds, MAX_SECONDS)
        timer = threading.Timer(timeout_seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            self._stderr.seek(0)  # moves the worker's position too, which is shared
            self._stderr.truncate()
            pickle.dump((arguments, timeout_seconds), process.stdin, protocol=5)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):  # ValueError: a pipe was closed meanwhile
            if self._is_closed:
                raise CancelledError("the worker process was closed") from None
            cause = _cause_of_death(process, self._stderr)
            self._kill()
            if expired.is_set():
                raise TimeoutError(f"took more than {timeout_seconds:g} seconds") from None
            raise ChildProcessError(cause) from None
        except BaseException:  # interrupted: the result of this call must not be taken for that of the next
            self._kill()
            raise
        finally:
            timer.cancel()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Kill the process for good. A call that another thread waits for ends at once, with CancelledError."""
        self._is_closed = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            # Leaving the with statement waits and closes the pipes, where data that was never sent is an OSError.
            with suppress(OSError), process:
                process.kill()
            self._stderr.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self._kill()
        with self._lock:
            if self._is_closed:
                raise CancelledError("the worker process was closed")
            self._stderr = tempfile.TemporaryFile()
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", "-c", MAIN],  # isolated: no pickle.py from the working directory
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # numpy starts faster
                start_new_session=True,
            )
        assert process.stdin
        with suppress(OSError, ValueError):  # dead or closed already: the call reports the cause
            pickle.dump(([os.path.abspath(entry) for entry in sys.path], *self._task), process.stdin)
        return process


def _cause_of_death(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> str:
    try:
        returncode = process.wait(timeout=1)
    except subprocess.TimeoutExpired:  # it closed its output but still runs
        process.kill()
        returncode = process.wait()
    cause = f"exit code {returncode}"
    if returncode < 0:
        cause = f"{signal.strsignal(-returncode)}{', possibly out of memory' if returncode == -9 else ''}"
    stderr.seek(max(stderr.seek(0, os.SEEK_END) - 400, 0))
    output = stderr.read().decode(errors="replace").strip()
    return f"died ({cause})" + (f": {output}" if output else "")


def serve(module: str, function: str, memory_bytes: int | None) -> None:
    """The worker's main loop: call the function with each set of arguments from stdin until that ends."""
    if memory_bytes is not None and os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what C libraries print goes to stderr, not among the results
    called = getattr(importlib.import_module(module), function)
    has_alarm = hasattr(signal, "setitimer")
    if has_alarm:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        try:
            arguments, timeout_seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if has_alarm:  # if the parent is killed, nothing else ends a call that hangs
            signal.setitimer(signal.ITIMER_REAL, timeout_seconds + ORPHAN_SECONDS)
        try:
            result = called(*arguments)
        except (VideoError, ImportError, MemoryError, WriteError) as error:
            result = error.with_traceback(None)
        pickle.dump(result, results, protocol=5)
        results.flush()
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
