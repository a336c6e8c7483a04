"""Show where the model looked for each word of a caption, and where it never looked."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from capkit.captioning import ACCURACY, LOOKED_AT, AttentionMap
from capkit.cogvlm2 import pixels_to_frames, preprocess_frames
from capkit.sweep import STOP_WORDS
from capkit.text import escape
from capkit.video import STRIP_FRAME_PIXELS, Clip
from capkit.views.html import CARD, HTML, MUTED, ORANGE, picture, to_webp

MOST_WORDS = 60  # that have pictures; captions of some hundred words would make pages of many megabytes
_GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:6px"
_IMAGE = "display:block;width:100%;max-width:112px;border-radius:3px"
_LEGEND = (
    "A frame is bright where a word attends to it, dark and grey where it does not; a box marks the patch that it "
    "attends to most. A second frame is the one that it attends to most as a whole. Where the model looked need not be "
    "why it chose the word, and it also looks at what it does not name. "
)


def show_attention(looked: AttentionMap, clip: Clip) -> HTML:
    """Show for each content word the frame where the model looked most, and for all words where they never looked.

    Beside the frame with the patch that a word attends to most stands the one that it attends to most as a whole, which
    is when an event happens, if that is another.

    Args:
        looked: from `attend`.
        clip: the same clip.

    Raises:
        ValueError: the clip has another number of frames.
    """
    frames, words = _frames(looked, clip), content_words(looked)
    cells = [_word_cell(looked, frames, at) for at in words[:MOST_WORDS]]
    more = f" {len(words) - MOST_WORDS} more words are left out." if len(words) > MOST_WORDS else ""
    never = looked.never_looked_at
    unseen = [
        _cell(frame, ~dark, f"{seconds:.2f} s, {_percent(dark.mean())}")
        for frame, dark, seconds in zip(frames, never, looked.timestamps_seconds, strict=True)
    ]
    return HTML(
        f'<div style="{CARD}"><b>Where it looked</b><div style="{MUTED}">{_LEGEND}{escape(ACCURACY)}{more}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:8px;margin:8px 0">{"".join(cells)}</div><hr>'
        f"<b>Where it never looked:</b> {_percent(never.mean())} of all patches, here dark and grey. "
        f'<span style="{MUTED}">No word gives them {LOOKED_AT:g} times an even share of its attention.</span>'
        f'<div style="{_GRID}">{"".join(unseen)}</div></div>'
    )


def content_words(looked: AttentionMap) -> list[int]:
    """The places of the words that are not function words, such as "the", nor signs."""
    words = ["".join(filter(str.isalnum, word.lower())) for word, _ in looked.words]
    return [at for at, word in enumerate(words) if word and word not in STOP_WORDS]


def word_frames(looked: AttentionMap, clip: Clip, at: int) -> HTML:
    """Show all frames, bright where the word at this place attends to them.

    Raises:
        ValueError: the clip has another number of frames.
    """
    weights, shares = looked.weights[at], looked.frame_shares[at]
    cells = [
        _cell(frame, heat, f"{seconds:.2f} s, {_percent(share)}")
        for frame, heat, seconds, share in zip(
            _frames(looked, clip), weights / weights.max(), looked.timestamps_seconds, shares, strict=True
        )
    ]
    word = escape(_bare(looked, at))
    note = f'<div style="{MUTED}"><b dir="auto">{word}</b>: below each frame, its share of the attention</div>'
    return HTML(f'{note}<div style="{_GRID}">{"".join(cells)}</div>')


def _frames(looked: AttentionMap, clip: Clip) -> np.ndarray:
    """The frames as the model sees them, small: uint8 (T, S, S, 3)."""
    if len(clip) != len(looked.timestamps_seconds):
        raise ValueError(f"attention to {len(looked.timestamps_seconds)} frames, but a clip of {len(clip)}")
    return pixels_to_frames(preprocess_frames(clip.frames, STRIP_FRAME_PIXELS))


def _bare(looked: AttentionMap, at: int) -> str:
    """The word at this place, without punctuation at its ends."""
    word = looked.words[at][0]
    return word.strip(".,;:!?\"'()") or word


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _word_cell(looked: AttentionMap, frames: np.ndarray, at: int) -> str:
    """A word below the frame with the patch that it attends to most, and the frame that it attends to most."""
    weights, (place, row, column), when = looked.weights[at], looked.places[at], looked.frames[at]
    pictures = []
    for frame in dict.fromkeys((int(place), int(when))):
        box = (int(row), int(column)) if frame == place else None
        label = f"{looked.timestamps_seconds[frame]:.2f} s{'' if box else ', as a whole'}"
        pictures.append(_cell(frames[frame], weights[frame] / weights.max(), label, box))
    word = f'<b dir="auto">{escape(_bare(looked, at))}</b>'
    return f'<div>{word}<div style="display:flex;gap:2px">{"".join(pictures)}</div></div>'


def _cell(frame: np.ndarray, heat: np.ndarray, label: str, box: tuple[int, int] | None = None) -> str:
    """A frame that is bright where the heat (G, G) is 1, dark and grey where it is 0, above a label."""
    image = Image.fromarray(frame)
    mask = Image.fromarray((heat * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    drawn = Image.composite(image, ImageOps.grayscale(image).point(lambda level: level * 0.35).convert("RGB"), mask)
    if box is not None:
        side = image.width / len(heat)
        top, left = box[0] * side, box[1] * side
        ImageDraw.Draw(drawn).rectangle((left, top, left + side - 1, top + side - 1), outline=ORANGE, width=2)
    return f'<div>{picture(to_webp(drawn), label, _IMAGE)}<div style="{MUTED};line-height:1.4">{label}</div></div>'
