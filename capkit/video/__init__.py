"""Frame sampling, and reading exactly the sampled frames. Imports no torch; decord and PyAV are used only here."""

from capkit.video.clip import Clip, ClipReader, ReaderHung, ReaderLost, load_clip, memory_budget
from capkit.video.container import VideoError
from capkit.video.flat import is_drawing
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
from capkit.video.seen import (
    MEAN,
    STD,
    STRIP_COLUMNS,
    STRIP_FRAME_PIXELS,
    STRIP_GAP_PIXELS,
    draw_strip,
    model_pixels,
    resized_and_cut,
    strip_frames,
)
from capkit.video.shots import LEAST_SHOT_SECONDS
from capkit.video.worker import WorkerProcess

__all__ = [
    "LEAST_SHOT_SECONDS",
    "MEAN",
    "STD",
    "STRATEGIES",
    "STRIP_COLUMNS",
    "STRIP_FRAME_PIXELS",
    "STRIP_GAP_PIXELS",
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
    "draw_strip",
    "finite_float",
    "is_drawing",
    "load_clip",
    "memory_budget",
    "model_pixels",
    "positive",
    "resized_and_cut",
    "strip_frames",
]
