"""Reading in a worker process, with fake decord packages that hang, crash or have another version."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from video_factory import read_numbers, reason

from capkit.video import ClipReader, FrameSampling, ReaderLost, load_clip


def fake_decord(folder, reading, version="0.6.0", importing="pass"):
    """A package `decord` in `folder` whose `VideoReader` does `reading`, for a worker process to import."""
    package = folder / "decord"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        textwrap.dedent(f"""
            import ctypes, os, signal, sys
            __version__ = {version!r}
            class DECORDError(Exception): pass
            {importing}
            class VideoReader:
                def __init__(self, path):
                    open({str(folder / "pid")!r}, "w").write(str(os.getpid()))
                    {reading}
        """)
    )
    return str(folder)


BY_DECORD = FrameSampling("chat", decoder="decord")
HANG = "ctypes.PyDLL(None).pause()"  # in C, and with the interpreter lock held, as decord does


def test_decord2_is_refused(clips, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "pass", version="3.4.0"))
    with pytest.raises(ImportError, match="needs decord 0.6.0, not 3.4.0: pip uninstall decord2, then pip install"):
        load_clip(clips("plain.mp4"), BY_DECORD)
    assert len(load_clip(clips("plain.mp4"))) == 3  # without it, nothing is imported


@pytest.mark.parametrize("importing", ["raise ImportError('no wheel')", "raise OSError('libdecord.so: cannot open')"])
def test_decord_that_cannot_be_imported(clips, tmp_path, monkeypatch, importing):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, HANG, importing=importing))
    with pytest.raises(ImportError, match="needs decord 0.6.0: (no wheel|libdecord.so: cannot open)"):
        load_clip(clips("plain.mp4"), BY_DECORD)
    assert len(load_clip(clips("plain.mp4"))) == 3


def test_where_decord_fails(clips, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "raise DECORDError('what codec is this?')"))
    assert "decord cannot read it (what codec is this?)" in reason(load_clip, clips("plain.mp4"), BY_DECORD)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # a zombie has ended
    return not (status.exists() and status.read_text().rsplit(")")[-1].split()[0] == "Z")


def wait_until(condition, seconds):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)
    return condition()


def test_the_worker_gives_the_same_clip(clips):
    path = clips("plain.mp4")
    for sampling in ("chat", FrameSampling("fps", 5, 2.5), {"strategy": "base", "num_frames": 3}):
        apart, here = (load_clip(path, sampling, 0.5, 2.0, timeout_seconds=limit) for limit in (60, None))
        assert np.array_equal(apart.frames, here.frames) and apart.frame_indices == here.frame_indices
        assert np.array_equal(apart.timestamps_seconds, here.timestamps_seconds)
        assert (apart.info, apart.frame_sampling) == (here.info, here.frame_sampling)
        assert (apart.start_seconds, apart.end_seconds) == (0.5, 2.0)
    assert "not a video" in reason(load_clip, __file__)


def test_a_timeout_of_more_than_a_lifetime(clips):
    assert len(load_clip(clips("plain.mp4"), timeout_seconds=1e300)) == 3


def test_a_hang_is_ended(clips, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, HANG))
    assert "reading took more than 2 seconds" in reason(load_clip, clips("plain.mp4"), BY_DECORD, timeout_seconds=2)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_one_reader_reads_many_clips_and_outlives_bad_ones(clips, tmp_path, monkeypatch):
    path, text = clips("plain.mp4"), tmp_path / "text.mp4"
    text.write_text("not frames")
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "os.stat(path.replace('plain', 'other')); " + HANG))
    with ClipReader() as reader:
        assert "not a video" in reason(load_clip, text, reader=reader)
        pid = reader.pid
        with pytest.raises(ReaderLost, match="(?s)worker process died .*FileNotFoundError"):
            load_clip(path, BY_DECORD, reader=reader)
        assert not is_alive(pid)
        shutil.copy(path, path.with_name("other.mp4"))
        with pytest.raises(ReaderLost, match="reading took more than 2 seconds"):
            load_clip(path, BY_DECORD, timeout_seconds=2, reader=reader)
    monkeypatch.undo()
    with ClipReader() as reader:
        pids = set()
        for second in range(2):
            clip = load_clip(path, FrameSampling("uniform", 2), second, second + 1, reader=reader)
            assert read_numbers(clip.frames) == clip.frame_indices == [25 * second, 25 * second + 24]
            pids.add(reader.pid)
        os.kill(reader.pid, signal.SIGTERM)
        assert wait_until(lambda: not is_alive(reader.pid), 10)
        time.sleep(0.5)  # its other threads end a little later
        assert len(load_clip(path, reader=reader)) == 3 and reader.pid not in pids and len(pids) == 1
    assert reader.pid is None


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_a_clip_that_needs_more_memory_than_it_may_take(clips):
    path = clips("wide.mp4", numbers=range(24), size=(1080, 1920), fps=1)
    with ClipReader(memory_bytes=2**28) as reader:
        assert "1920 x 1080 pixels take 0.1 GiB" in reason(load_clip, path, reader=reader)
        assert len(load_clip(clips("plain.mp4"), reader=reader)) == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX only")
def test_a_hang_ends_even_if_the_parent_is_killed(clips, tmp_path, monkeypatch):
    folder = fake_decord(tmp_path, HANG)
    script = f"import sys; sys.path[:0] = {[folder, str(ROOT)]}; import capkit.video.clip as f; "
    script += f"f.load_clip({str(clips('plain.mp4'))!r}, {BY_DECORD.to_dict()}, timeout_seconds=2)"
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert wait_until((tmp_path / "pid").exists, 30)
        assert wait_until((tmp_path / "pid").read_text, 5)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())), 30)


@pytest.mark.parametrize(
    "reading, words",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "possibly out of memory"),
        ("sys.stderr.write('out of tape'); sys.stderr.flush(); os._exit(3)", "exit code 3): out of tape"),
        ("raise ZeroDivisionError('by decord')", "ZeroDivisionError: by decord"),
    ],
)
def test_a_worker_that_dies_is_an_error(clips, tmp_path, monkeypatch, reading, words):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, reading))
    message = reason(load_clip, clips("plain.mp4"), BY_DECORD)
    assert "the worker process died" in message and words in message


def test_what_libraries_print_does_not_reach_the_result(clips, tmp_path, monkeypatch):
    noise = "os.write(1, b'noise' * 1000); print('noise')"
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "raise DECORDError('as a test')", importing=noise))
    assert "as a test" in reason(load_clip, clips("plain.mp4"), BY_DECORD)


def test_a_plain_script_runs_once(clips, tmp_path):
    (tmp_path / "script.py").write_text(
        "from capkit import load_clip\nimport sys\nprint('ran')\nprint(load_clip(sys.argv[1]).frame_indices)\n"
    )
    run = subprocess.run(
        [sys.executable, "script.py", str(clips("plain.mp4"))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split("\n") == ["ran", "[0, 25, 50]", ""], run.stderr
