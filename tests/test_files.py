"""Locks: who is kept out, and what a crash or a file system without flock leaves behind."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import capkit.files
from capkit.batch import read_table
from capkit.batch.parameters import code_cells
from capkit.benchmark.results import read_results
from capkit.export import choose_records
from capkit.files import Busy, file_sha256, hold_lock
from capkit.runs import find_clips
from capkit.sweep import read_axes
from capkit.sweep.run import read_captions

HOLDER = """
import errno, fcntl, pathlib, signal, socket, sys, time
import capkit.files
path, has_flock, host = pathlib.Path(sys.argv[1]), sys.argv[2] == "flock", sys.argv[3]
capkit.files.LEASE_SECONDS, capkit.files.RENEWAL_SECONDS = 3.0, 0.2
if host:
    socket.gethostname = lambda: host
if not has_flock:
    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = flock
with capkit.files.hold_lock(path):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock; it is killed at the end."""
    processes = []

    def start(flock="flock", host=""):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "a"), flock, host]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def without_flock(monkeypatch, request):
    """As on a mount without flock: `filelock` calls `fcntl.flock`."""

    def flock(*_):
        raise OSError(getattr(errno, getattr(request, "param", "ENOSYS")), "as on some network file systems")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(capkit.files, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(capkit.files, "RENEWAL_SECONDS", 0.2)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_lock_keeps_other_processes_and_threads_out_and_names_its_holder(tmp_path, hold):
    path = tmp_path / "new" / "b"
    for _ in range(2):  # one after the other
        with hold_lock(path), pytest.raises(Busy, match=r"b: another thread of this process \(since 20") as inner:
            with hold_lock(path):
                pass
        refused = []

        def other(refused=refused):
            try:
                with hold_lock(path):
                    pass
            except Busy as error:
                refused.append(str(error))

        with hold_lock(path):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert refused and "wait for it, or end it" in refused[0] and "wait for it" in str(inner.value)
        assert not list(path.parent.iterdir())
    process = hold()
    name = rf"process {process.pid} on {socket.gethostname()} \(since 20.*\) is at work here; wait for it, or end it"
    with pytest.raises(Busy, match=name), hold_lock(tmp_path / "a"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path, hold):
    kill(hold())
    with hold_lock(tmp_path / "a"):
        assert str(os.getpid()) in (tmp_path / ".a.capkit-lock").read_text()
    assert not list(tmp_path.iterdir())


def test_an_error_within_is_passed_on_and_frees_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), hold_lock(tmp_path / "a"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("without_flock", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"], indirect=True)
def test_without_flock_a_renewed_file_is_the_lock(tmp_path, hold, without_flock):
    path = tmp_path / "a"
    process = hold("none")
    assert (tmp_path / ".a.capkit-lease").exists()
    with pytest.warns(UserWarning, match=f"to see whether process {process.pid} on "):
        with pytest.raises(Busy, match=f"process {process.pid} on .* is at work here"), hold_lock(path):
            pass
    kill(process)
    started = time.monotonic()
    with hold_lock(path):  # at once: on the same host, the process is known to be gone
        assert time.monotonic() - started < 2
    assert not list(tmp_path.iterdir())


def test_without_flock_a_lock_of_a_dead_host_is_taken_over_when_it_is_stale(tmp_path, hold, without_flock):
    process = hold("none", "elsewhere")
    with pytest.warns(UserWarning, match="waiting up to 3 s to see whether process .* on elsewhere"):
        with pytest.raises(Busy, match="on elsewhere"), hold_lock(tmp_path / "a"):
            pass
        kill(process)
        started = time.monotonic()
        with hold_lock(tmp_path / "a"):
            assert time.monotonic() - started > 2.5
    assert not list(tmp_path.iterdir())


def test_a_holder_that_was_taken_for_dead_is_told(tmp_path, without_flock):
    with pytest.warns(UserWarning, match="another process has taken over this lock"), hold_lock(tmp_path / "a"):
        (tmp_path / ".a.capkit-lease").unlink()
        time.sleep(1)


def test_other_errors_of_the_system_name_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), hold_lock(tmp_path / "file" / "a"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("kind", ["file", "link", "hard link", "pipe", "folder", "link to nowhere"])
def test_what_capkit_did_not_write_is_no_lock(tmp_path, kind):
    lock, mine = tmp_path / ".a.capkit-lock", tmp_path / "mine"
    mine.write_text('{"pid": 1, "host": "", "since": ""}' if "link" in kind else "precious")
    make = {
        "file": mine.rename,
        "link": lambda lock: lock.symlink_to(mine),
        "hard link": lambda lock: os.link(mine, lock),
    }
    make |= {"pipe": os.mkfifo, "folder": os.mkdir, "link to nowhere": lambda lock: lock.symlink_to("nowhere")}
    make[kind](lock)
    before = {path: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(OSError, match=r"\.a\.capkit-lock: is in the way of a lock, and not capkit's"):
        with hold_lock(tmp_path / "a"):
            pass
    assert os.path.lexists(lock) and not (tmp_path / "nowhere").exists()
    assert before == {path: path.read_text() for path in tmp_path.iterdir() if path.is_file()}


def test_files_beside_a_lock_stay(tmp_path):
    """Also one that took the lock's place meanwhile."""
    for name in ("a.lock", "a.lease", ".a.lock"):
        (tmp_path / name).write_text("precious")
    with hold_lock(tmp_path / "a"):
        (tmp_path / "moved").write_text("precious")
        (tmp_path / "moved").replace(tmp_path / ".a.capkit-lock")
    assert {path.name for path in tmp_path.iterdir()} == {"a.lock", "a.lease", ".a.lock", ".a.capkit-lock"}
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}


READERS = {
    "a manifest": (find_clips, (".csv", ".tsv", ".jsonl", ".json", ".parquet")),
    "a list with a manifest": (lambda path: find_clips([path, "demo"]), (".csv",)),
    "axes": (read_axes, (".yaml", ".csv")),
    "captions elsewhere": (read_captions, (".csv", ".jsonl")),
    "a table of runs": (read_table, (".yaml", ".csv")),
    "a notebook": (code_cells, (".ipynb",)),
    "results": (read_results, (".json",)),
    "a store": (choose_records, (".jsonl",)),
    "a digest": (file_sha256, (".mp4",)),
}


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals")
@pytest.mark.parametrize("name", READERS)
def test_pipes_and_devices_are_not_read(tmp_path, name):
    def stop(*_):
        raise TimeoutError

    read, suffixes = READERS[name]
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)  # whoever opens a pipe waits
    try:
        for suffix in suffixes:
            os.mkfifo(tmp_path / f"pipe{suffix}")
            (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
            for path in (tmp_path / f"pipe{suffix}", tmp_path / f"device{suffix}"):
                with pytest.raises((ValueError, OSError), match=f"{re.escape(str(path))}: is not a regular file"):
                    read(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_json_and_yaml_nested_too_deeply(tmp_path):
    for name, read in (("a.yaml", read_axes), ("a.yaml", read_table), ("a.json", find_clips), ("a.json", read_results)):
        (tmp_path / name).write_text("[" * 50_000)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            read(tmp_path / name)
