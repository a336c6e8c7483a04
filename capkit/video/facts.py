"""What a trainer would find in a video file, read in a worker process because decoders can hang or crash."""

from __future__ import annotations

from capkit.video.decord_frames import decord_problem
from capkit.video.pictures import VideoInfo
from capkit.video.reading import Times, read_timestamps


def read_facts(path: str, by_decord: bool = False) -> tuple[Times, VideoInfo, str]:
    """Start times of all frames, float64 (n,), a file's `VideoInfo`, and why a trainer with decord would see others.

    Args:
        by_decord: ask decord; otherwise the third is "".

    Raises:
        VideoError, MemoryError: as `read_timestamps`.
    """
    times, info = read_timestamps(path)
    return times, info, decord_problem(path, info) if by_decord else ""
