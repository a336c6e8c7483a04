"""Frame sampling, and reading exactly the sampled frames. Imports no torch; decord and PyAV are used only here."""

from capkit.video.clip import Clip, ClipReader, ReaderHung, ReaderLost, load_clip, memory_budget
from capkit.video.container import VideoError
from capkit.video.pictures import VideoInfo
from capkit.video.sampling import (
    STRATEGIES,
    FrameSampling,
    FrameSamplingLike,
    at_least_one,
    check_window,
    finite_float,
    positive,
)
from capkit.video.worker import WorkerProcess

__all__ = [
    "STRATEGIES",
    "Clip",
    "ClipReader",
    "FrameSampling",
    "FrameSamplingLike",
    "ReaderHung",
    "ReaderLost",
    "VideoError",
    "VideoInfo",
    "WorkerProcess",
    "at_least_one",
    "check_window",
    "finite_float",
    "load_clip",
    "memory_budget",
    "positive",
]
