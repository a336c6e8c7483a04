"""Show a clip as the model sees it: sampled frames with the model's crop, frame numbers and unsampled gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from capkit.cogvlm2 import DEFAULT_PROMPT, Prompt, PromptLike
from capkit.text import escape, warn
from capkit.video import Clip, VideoError, load_clip, resized_and_cut
from capkit.views.html import CARD, HTML, MUTED, ORANGE, RED, SKY, note, picture, to_webp
from capkit.views.player import video_player

FRAME_PIXELS = 240  # longer side of a frame's picture
NEAR_SECONDS = 0.5  # a moment this near to a sampled frame counts as sampled: at one frame a second, all do
LISTED_GAPS = 4


def load_first_clip(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Clip | None]:
    """Read the frames of the first caption record whose video can be read; a warning says which cannot.

    Returns:
        The record and its clip; the first record and None if no video can be read, as for a store from elsewhere.
    """
    first_error = ""
    for record in records:
        window = record.get("start_seconds", 0.0), record.get("end_seconds")  # a record of others may lack fields
        try:
            sampling, only = record.get("frame_sampling", "chat"), record.get("only_frames")
            clip = load_clip(record["video"], sampling, *window, only_frames=only)
        except (VideoError, ValueError, ImportError) as error:
            first_error = first_error or str(error)
            continue
        if first_error:
            shown = f"shown instead is {record['video']}, the first that can be read"
            warn(f"{first_error}; {shown}", stacklevel=2)
        return record, clip
    warn(f"{first_error}; nor can any other video of these captions be read", stacklevel=2)
    return records[0], None


def show_clip(clip: Clip, prompt: PromptLike = DEFAULT_PROMPT, image_size: int = 224) -> HTML:
    """Show the frames that the model sees, with its crop, frame numbers and a time line, and the clip itself, playing.

    Each frame is shown in full. A box marks the model's crop; the rest is grey and dark. Below a frame are its number
    in the prompt and its true time, marked where the number is not the time in seconds.

    Args:
        clip: from a file or from memory, in full or a window.
        prompt: its template and frame numbers decide which number each frame carries.
        image_size: side in pixels of the model's square input (`captioner.processor.image_size`).
    """
    prompt = Prompt.of(prompt)
    numbers = prompt.numbers(clip)
    height, width = clip.frames.shape[1:3]
    box = crop_box(height, width, image_size)
    cells = []
    for place, (frame, number) in enumerate(zip(clip.frames, numbers, strict=True)):
        repeated = " · same frame again" if clip.frame_indices[place] in clip.frame_indices[:place] else ""
        image = picture(to_webp(draw_crop(frame, box), 70), f"frame {place}", "width:100%;border-radius:3px")
        label = frame_label(clip, place, number)
        cells.append(f'<div>{image}<div>{label}<span style="{MUTED}">{repeated}</span></div></div>')
    columns = f"repeat(auto-fill,minmax({110 if box[2] < height else 150}px,1fr))"
    grid = f"display:grid;grid-template-columns:{columns};gap:10px 8px;margin:8px 0"
    warning = numbers_warning(clip, numbers)
    return HTML(
        f'<div style="{CARD}">{_heading(clip, box)}{warning and note(f"⚠ {warning}")}'
        f'<div style="{grid}">{"".join(cells)}</div>{time_line(clip)}{clip_player(clip)}'
        f'<div style="{MUTED}">{_legend(clip, prompt.template)}</div></div>'
    )


def crop_box(height: int, width: int, image_size: int = 224) -> tuple[float, float, float, float]:
    """Top, left, height and width of what `preprocess_frames` cuts out of a frame, in the frame's own pixels."""
    resized, (top, left) = resized_and_cut(height, width, image_size)
    down, across = height / resized[0], width / resized[1]
    return top * down, left * across, image_size * down, image_size * across


def draw_crop(frame: np.ndarray, box: Sequence[float]) -> Image.Image:
    """A small picture of a frame with the crop's outline; outside of it the picture is grey and dark.

    Args:
        frame: uint8 RGB (H, W, 3).
        box: from `crop_box`.
    """
    image = Image.fromarray(frame)
    scale = FRAME_PIXELS / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(size, Image.Resampling.LANCZOS)
    top, left, height, width = (side * scale for side in box)
    x0, y0, x1, y1 = round(left), round(top), round(left + width), round(top + height)
    drawn = ImageOps.grayscale(image).point(lambda level: level * 0.35).convert("RGB")
    drawn.paste(image.crop((x0, y0, x1, y1)), (x0, y0))
    outline = (x0, y0, min(x1, image.width) - 1, min(y1, image.height) - 1)
    ImageDraw.Draw(drawn).rectangle(outline, outline=ORANGE, width=2)
    return drawn


def frame_label(clip: Clip, place: int, number: int | None) -> str:
    """A frame's number and its time in the file, as HTML; "≠" where the number is not the time in whole seconds."""
    time = float(clip.timestamps_seconds[place])
    if number is None:
        return f"{time:.2f} s"
    if number == round(time - clip.start_seconds):
        return f"<b>{number}</b> · {time:.2f} s"
    return f'<span style="border-bottom:2px solid {RED}"><b>{number}</b> ≠ {time:.2f} s</span>'


def numbers_warning(clip: Clip, numbers: Sequence[int | None]) -> str:
    """A warning, as HTML, if the frame numbers in the prompt are not seconds of the clip or window; else "".

    Args:
        clip: the clip.
        numbers: from `Prompt.numbers`.
    """
    seconds = [round(float(time - clip.start_seconds)) for time in clip.timestamps_seconds]
    wrong = [(number, second) for number, second in zip(numbers, seconds, strict=True) if number not in (None, second)]
    if not wrong:
        return ""
    number, second = wrong[-1]
    return (
        f"<b>The numbers are not seconds.</b> The model reads {number} beside a frame from second {second} and takes "
        "it for a time, so the times and durations in its caption are wrong. With "
        "<code>frame_numbers=&quot;seconds&quot;</code> it reads the true times, rounded; "
        "<code>frame_sampling=&quot;chat&quot;</code> takes one frame a second."
    )


def unsampled_gaps(clip: Clip) -> list[tuple[float, float]]:
    """(start, end) in seconds of the file of each stretch that has no sampled frame within half a second.

    Outside of a window nothing counts, nor do gaps shorter than a frame.
    """
    begin, end = _window(clip)
    duration = _frame_seconds(clip)
    gaps, sampled_to = [], begin
    for time in sorted(map(float, clip.timestamps_seconds)):
        gaps.append((sampled_to, time - NEAR_SECONDS))
        sampled_to = max(sampled_to, time + max(NEAR_SECONDS, duration))
    gaps.append((sampled_to, end))
    return [(start, stop) for start, stop in gaps if stop - start > max(duration, 0.01)]


def _extent(clip: Clip) -> tuple[float, float]:
    """Start and end of the full video in seconds; frames from memory begin with the first of them."""
    times = clip.timestamps_seconds
    end = float(max(times)) + _frame_seconds(clip)
    return (float(min(times)), end) if clip.info.path is None else (0.0, max(clip.info.duration_seconds, end))


def _frame_seconds(clip: Clip) -> float:
    """How long a frame is shown; at most a second for frames from memory, which may lie far apart."""
    duration = 1 / clip.info.average_fps
    return min(duration, 1.0) if clip.info.path is None else duration


def _window(clip: Clip) -> tuple[float, float]:
    begin, end = _extent(clip)
    return max(begin, clip.start_seconds), end if clip.end_seconds is None else min(end, clip.end_seconds)


def _heading(clip: Clip, box: Sequence[float]) -> str:
    info, (height, width) = clip.info, clip.frames.shape[1:3]
    name = "frames from memory" if info.path is None else f"<bdi>{escape(Path(info.path).name)}</bdi>"
    begin, end = _window(clip)
    facts = [f"{width} × {height}", f"{info.duration_seconds:.4g} s", f"{info.average_fps:.4g} frames a second"]
    facts += [f"window {begin:.4g} to {end:.4g} s"] if (begin, end) != _extent(clip) else []
    facts += [f"sampling {clip.frame_sampling.strategy!r}"] if clip.frame_sampling else []
    frames = "1 frame" if len(clip) == 1 else f"{len(clip)} frames"
    lost = 1 - box[2] * box[3] / (height * width)
    cut = f"{lost:.0%} of each picture is cut away" if lost >= 0.005 else "nothing is cut away"
    notes = f"<br>The video is {escape('; it is '.join(info.notes))}." if info.notes else ""
    facts_line = f'<span style="{MUTED}">{escape(", ".join(facts))}</span>'
    return f"<b>{name}</b> {facts_line}<br>The model sees {frames}; {cut}.{notes}"


def _legend(clip: Clip, template: str) -> str:
    below = "Bold: its number in the prompt; then its true time."
    if template != "chat":
        below = f"Below each frame: its time. Under template {template!r} frames carry no numbers."
    elif clip.start_seconds:
        below = f"Bold: its number in the prompt, counted from {clip.start_seconds:g} s; then its time."
    return escape(f"The box is the part of a frame that the model sees; the grey rest is cut away. {below}")


def clip_player(clip: Clip, link: str | None = None) -> str:
    """The file of a clip as `video_player`, with what it says of large files and codecs; "" for frames from memory."""
    return "" if clip.info.path is None else video_player(clip.info.path, clip.info.codec, link)


def time_line(clip: Clip, at: float | None = None) -> str:
    """The full video from left to right, as HTML: tall where sampled, thin where not, dotted outside the window.

    Ticks are the moments of the sampled frames; the one at `at` seconds stands out.
    """
    begin, end = _extent(clip)
    first, last = _window(clip)
    gaps = unsampled_gaps(clip)

    def part(style: str, start: float, stop: float | None = None, title: str = "", text: str = "") -> str:
        left, width = 100 * (start - begin) / (end - begin), ""
        if stop is not None:
            width = f"width:{100 * (stop - start) / (end - begin):.3f}%;"
        title = title and f'title="{title}" '
        return f'<div {title}style="position:absolute;left:{left:.3f}%;{width}{style}">{text}</div>'

    sampled = zip([first, *(stop for _, stop in gaps)], [*(start for start, _ in gaps), last], strict=True)
    outside = [(start, stop) for start, stop in ((begin, first), (last, end)) if stop > start]
    parts = [part(f"top:4px;height:20px;background:{SKY}66", *span) for span in sampled if span[1] > span[0]]
    parts += [part(f"top:12px;height:4px;background:{RED}", *span) for span in gaps]
    parts += [part("top:12px;height:0;border-top:3px dotted #888", *span) for span in outside]
    line = "top:0;width:2px;height:28px;background:#888;margin-left:-1px"
    times = dict.fromkeys(map(float, clip.timestamps_seconds))
    parts += [part(line, time, title=f"frame at {time:.2f} s") for time in times]
    parts += [] if at is None else [part(f"top:-3px;height:34px;width:4px;background:{ORANGE};margin-left:-2px", at)]
    label = f"top:30px;width:60px;margin-left:-30px;text-align:center;{MUTED}"
    parts += [part(label, time, text=f"{time:g}") for time in _round_times(begin, end)]
    legend = "Ticks: the sampled frames. Tall: within half a second of one."
    legend += " Dotted: outside the window." if outside else ""
    part_of = "No part of the window" if outside else "No part"
    summary = f"<b>{part_of} is further than half a second from a sampled frame.</b>"
    if gaps:
        lengths = [stop - start for start, stop in gaps]
        listed = ", ".join(f"{start:.2f} to {stop:.2f} s" for start, stop in gaps)
        if len(gaps) > LISTED_GAPS:
            listed = f"{len(gaps)} stretches of up to {max(lengths):.2f} s"
        summary = f"<b>Never sampled:</b> {listed}; {sum(lengths):.2f} s of {last - first:.2f} s."
        legend += " Thin: never sampled."
    return (
        f'<div style="position:relative;height:50px;margin:14px 24px 2px">{"".join(parts)}</div>'
        f'<div>{summary} <span style="{MUTED}">{legend}</span></div>'
    )


def _round_times(begin: float, end: float) -> list[float]:
    """Up to nine round times for the labels of a time line."""
    steps = (factor * 10.0**power for power in range(-3, 6) for factor in (1, 2, 5))
    step = next(step for step in steps if (end - begin) / step <= 8)
    first = math.ceil(begin / step - 1e-6)
    return [round(number * step, 6) for number in range(first, math.floor(end / step + 1e-6) + 1)]
