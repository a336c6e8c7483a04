"""A child process that calls one function again and again, and can be killed: for code in C that hangs or crashes.

Not multiprocessing, which would run the user's script once more.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading

LAST_RESORT_SECONDS = 5  # a child whose parent is gone ends itself this long after its limit
MAIN = (
    "import pickle, sys; sys.path[:], *task = pickle.load(sys.stdin.buffer); "
    "from capkit.video.worker import serve; serve(*task)"
)


class Child:
    """A process of its own for one function. It starts with the first call, and anew after one that it did not survive.

    Not for several threads at once. A child whose parent was killed ends too.

    Args:
        module, function: names; arguments and results must pickle. An exception raised ends the child.
        memory_bytes: most memory that the child may take (POSIX); None for no limit.
    """

    def __init__(self, module: str, function: str, memory_bytes: int | None = None):
        self._task = (module, function, memory_bytes)
        self._process = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return None if self._process is None else self._process.pid

    def call(self, *arguments, timeout_seconds: float):
        """The function's result.

        Raises:
            TimeoutError: it took longer than this, starting the process included; it was killed.
            ChildProcessError: it died; the text says of what.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        process, expired = self._process, threading.Event()
        self._complaints.seek(0)  # the child's too, which shares the position
        self._complaints.truncate()

        def expire():
            expired.set()
            process.kill()

        timer = threading.Timer(timeout_seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump((arguments, timeout_seconds), process.stdin, protocol=5)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            cause = _cause(self._wait(), self._complaints)
            self.close()
            if expired.is_set():
                raise TimeoutError(f"took more than {timeout_seconds:g} seconds") from None
            raise ChildProcessError(cause) from None
        except BaseException:  # interrupted: what the child answers to this call must not be taken for the next one's
            self.close()
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    pipe.close()
                except OSError:  # what was not written yet finds no reader
                    pass
            self._complaints.close()
            self._process = None

    def _wait(self):
        try:
            return self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:  # it closed its output and lives on
            self._process.kill()
            return self._process.wait()

    def _start(self):
        self.close()
        self._complaints = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", MAIN],  # isolated: no pickle.py from the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # numpy starts quicker
        )
        try:
            pickle.dump(([os.path.abspath(entry) for entry in sys.path], *self._task), self._process.stdin)
        except OSError:  # dead already: the call finds out of what
            pass


def _cause(returncode, complaints):
    cause = f"exit code {returncode}"
    if returncode < 0:
        cause = f"{signal.strsignal(-returncode)}{', for want of memory perhaps' if returncode == -9 else ''}"
    complaints.seek(max(complaints.seek(0, os.SEEK_END) - 400, 0))
    told = complaints.read().decode(errors="replace").strip()
    return f"died ({cause})" + (f": {told}" if told else "")


def serve(module, function, memory_bytes):
    """What the child does: answer calls until its input ends."""
    if memory_bytes is not None and os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # C libraries print; none of that may end up among the results
    called = getattr(importlib.import_module(module), function)
    has_alarm = hasattr(signal, "setitimer")
    if has_alarm:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        try:
            arguments, timeout_seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if has_alarm:  # should the parent be killed, nobody else would end a call that hangs
            signal.setitimer(signal.ITIMER_REAL, timeout_seconds + LAST_RESORT_SECONDS)
        pickle.dump(called(*arguments), results, protocol=5)
        results.flush()
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
