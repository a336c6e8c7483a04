"""Which frames of a video, and reading exactly those. Imports no torch; decord and PyAV live here only."""

from capkit.video.clip import Clip, ClipReader, ReaderHung, ReaderLost, load_clip
from capkit.video.reading import VideoError, VideoInfo
from capkit.video.sampling import STRATEGIES, FrameSampling
from capkit.video.worker import Child

__all__ = [
    "Clip",
    "ClipReader",
    "ReaderHung",
    "ReaderLost",
    "load_clip",
    "VideoError",
    "VideoInfo",
    "STRATEGIES",
    "FrameSampling",
    "Child",
]
