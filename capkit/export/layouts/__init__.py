"""Layouts of training data, each with its trainer's reading rules."""

from capkit.export.layouts.archives import VideoFolderParquet, WebDataset
from capkit.export.layouts.base import LINE_SEPARATORS, Layout, Pair, shorten
from capkit.export.layouts.beside_clips import AIToolkit, Musubi, OneTrainer, SimpleTuner
from capkit.export.layouts.lists import CogVideo, CogVideoXFactory, Diffusers
from capkit.export.layouts.rows import (
    LTX2,
    LTX2CSV,
    DiffSynth,
    DiffSynthCSV,
    DiffSynthJSON,
    DiffusionPipe,
    FastVideo,
    MusubiRows,
    OpenSora,
    VideoTuna,
)
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

_KINDS: tuple[type[Layout], ...] = (
    *(CogVideo, CogKit, CogKitImageToVideo, Diffusers, Finetrainers, CogVideoXFactory, SAT, VideoXFun),
    *(DiffSynth, DiffSynthJSON, DiffSynthCSV, LTX2, LTX2CSV, Musubi, MusubiRows, SimpleTuner, DiffusionPipe),
    *(AIToolkit, OneTrainer, FastVideo, VideoTuna, OpenSora),
    *(Sidecars, VideoFolder, VideoFolderCSV, VideoFolderParquet, WebDataset),
)
LAYOUTS: dict[str, Layout] = {kind.name: kind() for kind in _KINDS}
"""The layouts by name."""
