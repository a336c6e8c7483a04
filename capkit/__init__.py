"""capkit: describe videos in words with CogVLM2-Caption. The public names, imported when first used."""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Clip": "frames",
    "FrameSampling": "frames",
    "VideoError": "frames",
    "VideoInfo": "frames",
    "load_clip": "frames",
    "Decoding": "decoding",
    "CheckpointError": "cogvlm2",
    "DEFAULT_PROMPT": "cogvlm2",
    "Caption": "generation",
    "Captioner": "captioner",
    "Score": "captioner",
    "load_captioner": "captioner",
    "CaptionStore": "records",
    "plan_sweep": "planning",
    "run_sweep": "sweep",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'capkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"capkit.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
