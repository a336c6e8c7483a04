"""How fast frames are read, and in how much memory, beside decord alone. Part of `capkit.benchmark`.

Each reading is a process of its own, so that nothing is warm but the file and peak memory is its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FPS, KEYFRAME_INTERVAL = 25, 250


def encode_video(path: str | Path, num_minutes: int, height: int = 480, width: int = 854) -> Path:
    """Write an H.264 video: a minute of a drifting pattern, encoded once and repeated."""
    import av

    path = Path(path)
    minute = path.with_name("minute.mp4")
    tiles = np.random.default_rng(0).integers(0, 256, (height // 16 + 1, width // 16 + 100, 3), dtype=np.uint8)
    pattern = tiles.repeat(16, 0).repeat(16, 1)
    with av.open(str(minute), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = KEYFRAME_INTERVAL
        for number in range(60 * FPS):
            pixels = np.ascontiguousarray(pattern[:height, number : number + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(minute)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number in range(num_minutes):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                ticks = round(60 * number / packet.time_base)
                copy.pts, copy.dts, copy.duration = packet.pts + ticks, packet.dts + ticks, packet.duration
                target.mux(copy)
    return path


def measure_reading(
    num_minutes: int, num_frames: int, repeats: int, height: int = 480, width: int = 854
) -> list[dict[str, Any]]:
    """Rows of the benchmark: seconds and megabytes for `num_frames` frames spread over a video, beside decord's own
    `get_batch` of the same frames.

    Raises:
        ImportError: decord or PyAV is not installed.
    """
    import av  # noqa: F401
    import decord  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        path = encode_video(Path(folder) / "video.mp4", num_minutes, height, width)
        indices = _in_child("capkit", path, num_frames)["indices"]
        ways = {"decord": ("decord", path, indices), "capkit": ("capkit", path, num_frames)}
        ways |= {"watched": ("watched", path, num_frames)}
        runs = {name: [] for name in ways}
        for _ in range(repeats):
            for name, arguments in ways.items():
                runs[name].append(_in_child(*arguments))
    middle = {
        name: {key: statistics.median(run[key] for run in some) for key in ("seconds", "peak_mb")}
        for name, some in runs.items()
    }
    equal = all(run["digest"] == runs["decord"][0]["digest"] for some in runs.values() for run in some)
    equal = f"{num_frames if equal else 'not all'} of {num_frames} frames"
    what = f"{num_frames} frames of {num_minutes} min at {width} x {height}"
    told = [
        (f"read {what}", "capkit", "seconds", "s"),
        ("the same, in a process that can be killed (the default)", "watched", "seconds", "s"),
        ("memory to read them", "capkit", "peak_mb", "MB"),
    ]
    return [
        {
            "name": name,
            "baseline": "decord's get_batch",
            "unit": unit,
            "baseline_value": middle["decord"][key],
            "value": middle[way][key],
            "equal": equal,
        }
        for name, way, key, unit in told
    ]


def _in_child(*arguments) -> dict[str, Any]:
    command = [sys.executable, "-m", "capkit.benchmark.video", json.dumps([str(one) for one in arguments])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def _read(way: str, path: str, wanted: str) -> dict[str, Any]:
    """What a child does."""
    import hashlib

    import av  # noqa: F401
    import decord

    indices = None
    if way == "decord":
        started = time.perf_counter()
        frames = decord.VideoReader(path).get_batch(json.loads(wanted)).asnumpy()
    else:
        from capkit.video import FrameSampling, load_clip

        started = time.perf_counter()
        limit = 600.0 if way == "watched" else None
        clip = load_clip(path, FrameSampling("uniform", int(wanted)), timeout_seconds=limit)
        frames, indices = clip.frames, clip.frame_indices
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_mb": _peak_mb(),
        "digest": hashlib.sha256(frames.tobytes()).hexdigest(),
        "indices": indices,
    }


def _peak_mb() -> float:
    """This process's resident memory at its highest."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage() would count what the parent held when it started this process
        return next(float(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    print(json.dumps(_read(*json.loads(sys.argv[1]))))
