"""Names of clips in an export that are safe for every trainer, and stable from export to export."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

# load_dataset takes such a word, between "-", "_", digits and the like, for the name of a split.
_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"
SPLIT_WORD = re.compile(rf"(?<![^\W\d_])({_WORDS})(?![^\W\d_])", re.IGNORECASE)
MAX_STEM_LENGTH = 80


def name_clips(clips: Iterable[Path]) -> Iterator[str]:
    """A name for each clip: its own if that is safe, else a similar one.

    Names have only letters, digits, "-" and "_", because some trainers strip lines of lists or cut names at the first
    "."; no word that load_dataset takes for a split; no "videos", which SAT replaces. Clips whose names are equal, but
    for upper and lower case, all get a digest of their path, so that a name does not depend on the order of the clips:
    trainers cache latents by name.

    Args:
        clips: different files; gone through twice.
    """
    count = Counter(safe_stem(clip.stem).lower() for clip in clips)
    for clip in clips:
        stem = safe_stem(clip.stem)
        if not stem or count[stem.lower()] > 1:
            digest = hashlib.sha256(str(clip).encode("utf-8", "surrogateescape")).hexdigest()[:10]
            stem = f"{stem or 'clip'}-x{digest}"
        yield stem + clip.suffix.lower()


def safe_stem(stem: str) -> str:
    """A file's name without suffix, made safe; "" if nothing is left."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:MAX_STEM_LENGTH].strip("_-")
    return re.sub("videos", "clips", SPLIT_WORD.sub(r"\1clip", plain), flags=re.IGNORECASE)
