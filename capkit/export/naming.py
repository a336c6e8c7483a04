"""Names of clips in an export, which no trainer stumbles over, and which stay the same from export to export."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# load_dataset takes such a word between "-", "_", digits and the like for the name of a split.
_SPLIT_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"
NAMES_A_SPLIT = re.compile(rf"(?<![^\W\d_])({_SPLIT_WORDS})(?![^\W\d_])", re.IGNORECASE)
MAX_STEM_LENGTH = 80


def name_clips(clips: Sequence[Path]) -> list[str]:
    """A name for each clip: its own where that is harmless, else one near it.

    Letters, digits, "-" and "_" alone, for lists that are stripped and trainers that cut names at the first "."; no
    word that load_dataset takes for a split; no "videos", which SAT replaces. Where names differ in upper and lower
    case only, or not at all, all of them get a digest of their path, so that a clip's name does not depend on the order
    of the clips: trainers keep latents by name.

    Args:
        clips: different files.
    """
    stems = [_harmless(clip.stem) for clip in clips]
    shared = Counter(stem.lower() for stem in stems)
    digests = [hashlib.sha256(str(clip).encode("utf-8", "surrogateescape")).hexdigest()[:10] for clip in clips]
    return [
        f"{stem or 'clip'}{f'-x{digest}' if shared[stem.lower()] > 1 or not stem else ''}{clip.suffix.lower()}"
        for stem, digest, clip in zip(stems, digests, clips, strict=True)
    ]


def _harmless(stem: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:MAX_STEM_LENGTH].strip("_-")
    return re.sub("videos", "clips", NAMES_A_SPLIT.sub(r"\1clip", plain), flags=re.IGNORECASE)
