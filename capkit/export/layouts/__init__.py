"""Layouts of training data, each with its trainer's reading rules."""

from capkit.export.layouts.base import LINE_SEPARATORS, Layout, Pair, shorten
from capkit.export.layouts.lists import CogVideo, CogVideoXFactory, Diffusers
from capkit.export.layouts.tables import (
    CogKit,
    CogKitImageToVideo,
    Finetrainers,
    VideoFolder,
    VideoFolderCSV,
    VideoXFun,
)
from capkit.export.layouts.text_files import SAT, Sidecars

__all__ = ["LAYOUTS", "LINE_SEPARATORS", "Layout", "Pair", "shorten"]

_KINDS = (CogVideo, CogKit, CogKitImageToVideo, Diffusers, Finetrainers, Sidecars, VideoFolder, VideoFolderCSV)
LAYOUTS: dict[str, Layout] = {kind.name: kind() for kind in (*_KINDS, CogVideoXFactory, SAT, VideoXFun)}
"""The layouts by name."""
