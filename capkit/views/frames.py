"""A clip as the model sees it: whole frames with the square that is left of them, their numbers, what lies between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from capkit.cogvlm2 import Prompt, resized_and_cut
from capkit.video import Clip
from capkit.views.html import CARD, HTML, MUTED, ORANGE, RED, SKY, picture, to_webp

FRAME_PIXELS = 240  # longer side of a frame's picture
NEAR_SECONDS = 0.5  # a moment this near to a sampled frame counts as seen: at one frame a second, all do
LISTED_STRETCHES = 4
_GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax({}px,1fr));gap:10px 8px;margin:8px 0"

DEFAULT = Prompt()


def show_clip(clip: Clip, prompt: Prompt = DEFAULT, image_size: int = 224) -> HTML:
    """The clip as the model sees it, in a picture for each frame, and on a time line what it never sees.

    Each frame is shown whole. The box is what the model is given of it; what is cut away is grey and dark. Below stand
    the number that the frame carries in the prompt and its true time; they are marked where one is not the other.

    Args:
        clip: from a file or from memory, whole or a window.
        prompt: its template and frame numbers decide which number each frame carries.
        image_size: side in pixels of the square that the model takes (`captioner.processor.image_size`).
    """
    numbers = prompt.numbers(clip)
    box = crop_box(*clip.frames.shape[1:3], image_size)
    cells = []
    for place, (frame, number) in enumerate(zip(clip.frames, numbers, strict=True)):
        again = " · same frame again" if clip.frame_indices[place] in clip.frame_indices[:place] else ""
        told = frame_label(clip, place, number)
        image = picture(to_webp(draw_crop(frame, box), 70), f"frame {place}", "width:100%;border-radius:3px")
        cells.append(f'<div>{image}<div>{told}<span style="{MUTED}">{again}</span></div></div>')
    narrow = 110 if box[2] < clip.frames.shape[1] else 150
    warning = numbers_warning(clip, numbers)
    return HTML(
        f'<div style="{CARD}">{_heading(clip, box)}'
        + (
            f'<div style="border-left:4px solid {RED};padding:4px 8px;margin:8px 0">⚠ {warning}</div>'
            if warning
            else ""
        )
        + f'<div style="{_GRID.format(narrow)}">{"".join(cells)}</div>{_time_line(clip)}'
        f'<div style="{MUTED}">{_explained(clip, prompt.template, box)}</div></div>'
    )


def crop_box(height: int, width: int, image_size: int = 224) -> tuple[float, float, float, float]:
    """What `preprocess_frames` cuts out of a frame: top, left, height and width of it in the frame's own pixels."""
    resized, (top, left) = resized_and_cut(height, width, image_size)
    down, across = height / resized[0], width / resized[1]
    return top * down, left * across, image_size * down, image_size * across


def draw_crop(frame: np.ndarray, box: Sequence[float]) -> Image.Image:
    """A small picture of a frame with a box drawn into it; outside of the box it is grey and dark.

    Args:
        frame: uint8 RGB (H, W, 3).
        box: from `crop_box`.
    """
    image = Image.fromarray(frame)
    scale = FRAME_PIXELS / max(image.size)
    image = image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.LANCZOS)
    top, left, height, width = (side * scale for side in box)
    corners = [round(left), round(top), round(left + width), round(top + height)]
    shown = ImageOps.grayscale(image).point(lambda level: level * 0.35).convert("RGB")
    shown.paste(image.crop(corners), corners[:2])
    outline = [corners[0], corners[1], min(corners[2], image.width) - 1, min(corners[3], image.height) - 1]
    ImageDraw.Draw(shown).rectangle(outline, outline=ORANGE, width=2)
    return shown


def frame_label(clip: Clip, place: int, number: int | None) -> str:
    """A frame's number and its time in the file, as HTML; "≠" where the number is not the time in whole seconds."""
    time = float(clip.timestamps_seconds[place])
    if number is None:
        return f"{time:.2f} s"
    if number == round(time - clip.start_seconds):
        return f"<b>{number}</b> · {time:.2f} s"
    return f'<span style="border-bottom:2px solid {RED}"><b>{number}</b> ≠ {time:.2f} s</span>'


def numbers_warning(clip: Clip, numbers: Sequence[int | None]) -> str:
    """What to beware of where the numbers that frames carry are not seconds of the clip or window; "" where they are.

    Args:
        numbers: from `Prompt.numbers`.
    """
    seconds = [round(float(time - clip.start_seconds)) for time in clip.timestamps_seconds]
    wrong = [(number, second) for number, second in zip(numbers, seconds, strict=True) if number not in (None, second)]
    if not wrong:
        return ""
    number, second = wrong[-1]
    return (
        f"<b>The numbers are not seconds.</b> The model reads {number} beside a frame from second {second} and takes "
        "it for a time: what it says of when and how long is wrong. <code>frame_numbers=&quot;seconds&quot;</code> "
        "tells it the true times; <code>frame_sampling=&quot;chat&quot;</code> takes one frame a second."
    )


def unsampled_stretches(clip: Clip) -> list[tuple[float, float]]:
    """Where the model saw nothing: (from, to) in the file's seconds, with no sampled frame within half a second.

    Outside of a window nothing counts. Gaps shorter than a frame do not count either.
    """
    begin, end = _window(clip)
    lasts = _frame_seconds(clip)
    gaps, seen_to = [], begin
    for time in sorted(map(float, clip.timestamps_seconds)):
        gaps.append((seen_to, time - NEAR_SECONDS))
        seen_to = max(seen_to, time + max(NEAR_SECONDS, lasts))
    gaps.append((seen_to, end))
    return [(first, last) for first, last in gaps if last - first > max(lasts, 0.01)]


def _extent(clip):
    """First and last moment of the whole clip; a clip from memory begins with its first frame."""
    begin = float(min(clip.timestamps_seconds)) if clip.info.path is None else 0.0
    last = float(max(clip.timestamps_seconds))
    end = last + _frame_seconds(clip)
    return begin, end if clip.info.path is None else max(clip.info.duration_seconds, end)


def _frame_seconds(clip):
    """How long a frame is shown; of frames from memory, which may lie far apart, no longer than a second."""
    lasts = 1 / clip.info.average_fps
    return min(lasts, 1.0) if clip.info.path is None else lasts


def _window(clip):
    begin, end = _extent(clip)
    return max(begin, clip.start_seconds), end if clip.end_seconds is None else min(end, clip.end_seconds)


def _heading(clip, box):
    info, (height, width) = clip.info, clip.frames.shape[1:3]
    name = "frames from memory" if info.path is None else f"<bdi>{escape(Path(info.path).name)}</bdi>"
    begin, end = _window(clip)
    facts = [f"{width} × {height}", f"{info.duration_seconds:.4g} s", f"{info.average_fps:.4g} frames a second"]
    facts += [f"window {begin:.4g} to {end:.4g} s"] if (begin, end) != _extent(clip) else []
    facts += [f"sampling {clip.frame_sampling.strategy!r}"] if clip.frame_sampling else []
    frames = "1 frame" if len(clip) == 1 else f"{len(clip)} frames"
    lost = 1 - box[2] * box[3] / (height * width)
    cut = f"; {lost:.0%} of each picture is cut away" if lost >= 0.005 else "; nothing is cut away"
    return f'<b>{name}</b> <span style="{MUTED}">{escape(", ".join(facts))}</span><br>The model sees {frames}{cut}.'


def _explained(clip, template, box):
    start, said = clip.start_seconds, []
    said.append("The box is what the model is given of a frame; the grey rest never reaches it.")
    if template != "chat":
        said.append(f"Below each frame, its time. Under template {template!r} frames carry no numbers.")
    elif start:
        said.append(f"Bold, the number that it carries in the prompt, counted from {start:g} s; then its time.")
    else:
        said.append("Bold, the number that it carries in the prompt; then its true time.")
    return escape(" ".join(said), quote=False)


# ---- the time line -------------------------------------------------------------------------------------------------


def _time_line(clip):
    """The whole clip from left to right: tall what was seen, thin what was not, dotted what lies outside the window."""
    begin, end = _extent(clip)
    first, last = _window(clip)
    gaps = unsampled_stretches(clip)

    def at(time):
        return f"left:{100 * (time - begin) / (end - begin):.3f}%"

    def bar(start, stop, style):
        width = f"width:{100 * (stop - start) / (end - begin):.3f}%"
        return f'<div style="position:absolute;{at(start)};{width};{style}"></div>'

    seen = zip([first, *(stop for _, stop in gaps)], [*(start for start, _ in gaps), last], strict=True)
    parts = [bar(*stretch, f"top:4px;height:20px;background:{SKY}66") for stretch in seen if stretch[1] > stretch[0]]
    parts += [bar(*stretch, f"top:12px;height:4px;background:{RED}") for stretch in gaps]
    outside = [stretch for stretch in ((begin, first), (last, end)) if stretch[1] > stretch[0]]
    parts += [bar(*stretch, "top:12px;height:0;border-top:3px dotted #888") for stretch in outside]
    parts += [
        f'<div title="frame at {time:.2f} s" style="position:absolute;{at(time)};top:0;width:2px;height:28px;'
        'background:#888;margin-left:-1px"></div>'
        for time in dict.fromkeys(map(float, clip.timestamps_seconds))
    ]
    parts += [
        f'<div style="position:absolute;{at(time)};top:30px;width:60px;margin-left:-30px;text-align:center;{MUTED}">'
        f"{time:g}</div>"
        for time in _ticks(begin, end)
    ]
    return (
        f'<div style="position:relative;height:50px;margin:14px 24px 2px">{"".join(parts)}</div>'
        f"<div>{_told(gaps, first, last, outside)}</div>"
    )


def _ticks(begin, end):
    """A handful of round times."""
    steps = (factor * 10.0**power for power in range(-3, 6) for factor in (1, 2, 5))
    step = next(step for step in steps if (end - begin) / step <= 8)
    first = math.ceil(begin / step - 1e-6)
    return [round(number * step, 6) for number in range(first, math.floor(end / step + 1e-6) + 1)]


def _told(gaps, first, last, outside):
    legend = f'<span style="{MUTED}">Ticks: the sampled frames. Tall: seen, within half a second of one.'
    legend += " Dotted: outside the window." if outside else ""
    if not gaps:
        return f"<b>All of {'the window' if outside else 'it'} is sampled.</b> {legend}</span>"
    lengths = [stop - start for start, stop in gaps]
    listed = ", ".join(f"{start:.2f} to {stop:.2f} s" for start, stop in gaps)
    if len(gaps) > LISTED_STRETCHES:
        listed = f"{len(gaps)} stretches of up to {max(lengths):.2f} s"
    missed = f"{sum(lengths):.2f} s of {last - first:.2f} s"
    return f"<b>Never sampled:</b> {listed}; {missed}. {legend} Thin: never sampled.</span>"
