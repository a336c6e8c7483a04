"""Time and memory of reading frames, beside decord alone. Part of `capkit.benchmark`.

Each reading runs in its own process, so that only the file is cached, and peak memory is of this reading alone.
"""

from __future__ import annotations

import hashlib
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
    """Arguments of rows: seconds and megabytes to read `num_frames` frames spread over a video, beside decord's own
    `get_batch` of the same frames.

    Raises:
        ImportError: decord or PyAV is not installed.
    """
    import av  # noqa: F401
    import decord  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        path = encode_video(Path(folder) / "video.mp4", num_minutes, height, width)
        indices = _in_child("capkit", path, num_frames)["indices"]
        readers = {"decord": indices, "capkit": num_frames, "watched": num_frames}
        rounds = [{name: _in_child(name, path, frames) for name, frames in readers.items()} for _ in range(repeats)]
    is_equal = len({run["digest"] for runs in rounds for run in runs.values()}) == 1
    equal = f"{num_frames if is_equal else 'not all'} of {num_frames} frames"

    def row(name: str, reader: str, key: str, unit: str) -> dict[str, Any]:
        values = [statistics.median(runs[side][key] for runs in rounds) for side in ("decord", reader)]
        return {"name": name, "baseline": "decord's get_batch", "unit": unit, "values": values, "equal": equal}

    return [
        row(f"read {num_frames} frames of {num_minutes} min at {width} x {height}", "capkit", "seconds", "s"),
        row("the same, in a process that can be killed (the default)", "watched", "seconds", "s"),
        row("memory to read them", "capkit", "peak_mb", "MB"),
    ]


def _in_child(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "capkit.benchmark.video", json.dumps([*map(str, arguments)])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def _read(reader: str, path: str, frames: str) -> dict[str, Any]:
    """Read frames with "decord", "capkit", or in a child process of capkit's that is "watched".

    Args:
        frames: their indices for "decord", else their number.
    """
    import av  # noqa: F401
    import decord

    from capkit.video import FrameSampling, load_clip

    indices = None
    started = time.perf_counter()
    if reader == "decord":
        pixels = decord.VideoReader(path).get_batch(json.loads(frames)).asnumpy()
    else:
        limit = 600.0 if reader == "watched" else None
        clip = load_clip(path, FrameSampling("uniform", int(frames)), timeout_seconds=limit)
        pixels, indices = clip.frames, clip.frame_indices
    seconds = time.perf_counter() - started
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return {"seconds": seconds, "peak_mb": _peak_mb(), "digest": digest, "indices": indices}


def _peak_mb() -> float:
    """This process's resident memory at its highest."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage() would count what the parent held when it started this process
        return next(float(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    print(json.dumps(_read(*json.loads(sys.argv[1]))))
