"""Show a caption beside its frames: where the model doubted, what words rest on, and what training would cut off."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from capkit.captioning import Caption, Grounding, demo_notice, token_texts, words_of
from capkit.cogvlm2 import CogVLM2VideoProcessor, Prompt, pixels_to_frames, preprocess_frames
from capkit.runs import clip_seconds
from capkit.sweep import COGVIDEOX_T5_LIMIT, t5_counter
from capkit.text import escape
from capkit.video import STRIP_FRAME_PIXELS, Clip
from capkit.views.frames import clip_player, frame_label, numbers_warning
from capkit.views.html import (
    BLUE,
    CARD,
    HTML,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    caption_facts,
    error_text,
    file_name,
    note,
    picture,
    record_text,
    steps_html,
    to_webp,
)

CaptionLike = Caption | dict[str, Any] | str
"""A `Caption`, a caption record or a text."""

LEANS_FROM_NATS = 0.5  # a word leans on a frame without which it is less likely by this: exp(0.5), 1.6 times
LISTED_FRAMES = 3

# Lowest value, CSS, description. Each style has a line of its own, so that it can be told apart without its tint.
_Styles = tuple[tuple[float, str, str], ...]
# None is green or red: neither view knows what is true.
_BY_PROBABILITY: _Styles = (
    (0.9, "", "90 % and more"),
    (0.5, f"border-bottom:2px dotted {ORANGE};background:{ORANGE}22", "50 to 90 %"),
    (0.1, f"border-bottom:2px dashed {ORANGE};background:{ORANGE}44", "10 to 50 %"),
    (0.0, f"border-bottom:3px solid {ORANGE};background:{ORANGE}77", "under 10 %"),
)
_BY_SUPPORT: _Styles = (  # in nats
    (3.0, f"border-bottom:3px solid {BLUE};background:{SKY}77", "20 times likelier with the video, or more"),
    (1.0, f"border-bottom:2px dashed {BLUE};background:{SKY}44", "3 to 20 times"),
    (-1.0, "", "about as likely without it"),
    (-np.inf, f"border-bottom:3px double {PURPLE};background:{PURPLE}44", "likelier without it"),
)


def show_caption(
    caption: CaptionLike,
    clip: Clip | None = None,
    grounding: Grounding | None = None,
    processor: CogVLM2VideoProcessor | None = None,
    t5_tokenizer: Any = None,
    t5_limit: int = COGVIDEOX_T5_LIMIT,
) -> HTML:
    """Show a caption beside its frames: where the model doubted, and which words and frames the video supports.

    Doubt is how unlikely the model found each word: it finds the model's own mistakes. Support is how much likelier a
    word is with the video than with a grey one: it finds words that people changed. Neither knows what is true; how
    well they do is in `capkit.demo.measures.tables`. What CogVideoX training would cut off is struck through.

    Args:
        caption: a `Caption`, a caption record (a hand-edited text replaces the model's) or a text.
        clip: whose frames to show.
        grounding: of this text, from `ground`: shades words by doubt and by support, and lists the frames that each
            leans on.
        processor: the model's (`captioner.processor`), to shade the words of a `Caption` by doubt without a grounding.
        t5_tokenizer: of another T5 than CogVideoX's: a transformers tokenizer or its folder.
        t5_limit: T5 tokens that a trainer keeps, `</s>` included.

    Raises:
        ValueError: the grounding is of another text, or of another number of frames than the clip has.
    """
    record = of_clip(clip) | as_record(caption)
    pieces, logprobs, ids = [record_text(record)], None, []
    prefix = record.get("answer_prefix", "")  # no tokens of the model's
    if isinstance(caption, Caption):
        ids = caption.token_ids[: len(caption.token_ids) - (caption.finish_reason == "eos")]  # without the end token
    if grounding is not None:
        if ids != grounding.token_ids and (prefix + "".join(grounding.tokens)).strip() != record_text(record):
            raise ValueError("the grounding is of another text: ground the text that is shown")
        pieces, logprobs = grounding.tokens, grounding.logprobs
    elif processor is not None and isinstance(caption, Caption):
        pieces, logprobs = token_texts(processor, ids), np.array(caption.logprobs[: len(ids)])
    text = "".join(pieces) if logprobs is None else prefix + "".join(pieces)
    kept = t5_kept(text, t5_tokenizer, t5_limit)
    spans = [(0, escape(text[:kept])), (kept, escape(text[kept:]))]
    if logprobs is not None:
        spans = [(0, escape(prefix)), *_doubt_spans(pieces, logprobs, len(prefix))]
    parts = [caption_paragraph(record, _strike(spans, kept))]
    if logprobs is not None:
        parts.append(_legend("Doubt, for the model's own mistakes. The chance of each word:", _BY_PROBABILITY))
    if kept < len(text.rstrip()):
        parts.append(_cut_note(text[kept:], t5_limit))
    if grounding is not None and grounding.words:
        leans = _leaned_on(grounding, record, clip)
        parts += ["<hr>", paragraph(escape(prefix) + _word_spans(grounding, leans))]
        parts.append(_legend("Support, for words that people changed. Each word with the video:", _BY_SUPPORT))
        parts.append(_words_table(grounding, leans))
    parts.append(facts_line(record))
    frames = warning = ""
    if clip is not None:
        seen = caption_frames(record, clip, grounding)
        frames = f'<div style="flex:1 1 240px">{seen}{clip_player(clip)}</div>'
        warning = numbers_warning(clip, _frame_numbers(record, clip))
    return HTML(
        f'<div style="{CARD}">{heading(record)}{warning and note(f"⚠ {warning}")}'
        f'<div style="display:flex;flex-wrap:wrap;gap:14px">{frames}'
        f'<div style="flex:2 1 320px;min-width:0">{"".join(parts)}</div></div></div>'
    )


def as_record(caption: CaptionLike) -> dict[str, Any]:
    """What is known of a caption, by the names of a caption record's fields."""
    if isinstance(caption, str):
        return {"text": caption}
    if isinstance(caption, dict):
        return Prompt().to_record() | caption  # of a record that others wrote, fields may be missing
    names = ("text", "mean_logprob", "finish_reason", "seconds")
    facts = {name: getattr(caption, name) for name in names}
    facts |= {"step_answers": [answer for _, answer in caption.steps]}
    facts |= {"step_finish_reasons": list(caption.step_finish_reasons)}
    facts |= {"num_tokens": len(caption.token_ids), "decoding": caption.decoding.to_dict()}
    return caption.prompt.to_record() | facts


def of_clip(clip: Clip | None) -> dict[str, Any]:
    """The fields of a caption record that are of its clip; none for frames from memory, or without a clip."""
    if clip is None or clip.info.path is None:
        return {}
    window = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
    seen = {"timestamps_seconds": list(clip.timestamps_seconds), "duration_seconds": clip_seconds(clip)}
    return {"video": str(clip.info.path)} | window | seen


def t5_kept(text: str, t5_tokenizer: Any = None, t5_limit: int = COGVIDEOX_T5_LIMIT) -> int:
    """How many characters of a text a trainer keeps: the words that fit into `t5_limit` T5 tokens, `</s>` included."""
    count = t5_counter(t5_tokenizer)
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    fitting = bisect_right(ends, t5_limit, key=lambda end: count(text[:end]))
    return len(text) if fitting == len(ends) else ends[fitting - 1] if fitting else 0


# ---- tokens and words ----------------------------------------------------------------------------------------------


def _doubt_spans(pieces: Sequence[str], logprobs: np.ndarray, start: int = 0) -> list[tuple[int, str]]:
    """(start in the text, HTML) of each word, shaded by its probability."""
    spans = []
    for _, tokens in words_of(pieces):
        chance, text = float(np.exp(logprobs[tokens].sum())), "".join(pieces[tokens])
        spans.append((start, _shade(text, _BY_PROBABILITY, chance, f"{chance:.1%}")))
        start += len(text)
    return spans


def _word_spans(grounding: Grounding, leans: Sequence[str]) -> str:
    """The text with each word shaded by its support; the tooltip names the frames that it leans on."""
    text, end, spans = "".join(grounding.tokens), 0, []
    supports = grounding.of_words(grounding.support)
    for (word, _), support, frames in zip(grounding.words, supports, leans, strict=True):
        start = text.index(word, end)
        title = f"support {support:+.1f} nats" + (f"; leans on {frames}" if frames else "")
        spans.append(escape(text[end:start]) + _shade(word, _BY_SUPPORT, support, title))
        end = start + len(word)
    return "".join(spans) + escape(text[end:])


def _shade(piece: str, styles: _Styles, value: float, title: str) -> str:
    style = next(style for lowest, style, _ in styles if value >= lowest)
    word = piece.lstrip()
    attribute = f' style="{style}"' if style else ""
    space = escape(piece[: len(piece) - len(word)])
    return f'{space}<span title="{escape(title)}"{attribute}>{escape(word)}</span>'


def _strike(spans: Sequence[tuple[int, str]], kept: int) -> str:
    """The spans as HTML, those from the character `kept` on struck through."""
    lost = "".join(html for start, html in spans if start >= kept)
    return "".join(html for start, html in spans if start < kept) + (lost and f'<s style="opacity:.6">{lost}</s>')


def _word_leanings(grounding: Grounding) -> np.ndarray:
    """float64 (T, W): how much likelier each word is with a frame than without it, in nats; T is 0 if not measured."""
    if grounding.frame_logprobs is None:
        return np.zeros((0, len(grounding.words)))
    return grounding.of_words(grounding.leaning)


def _leaned_on(grounding: Grounding, record: dict[str, Any], clip: Clip | None) -> list[str]:
    """For each word the frames that it leans on, most first, by number and time where there is a clip.

    Raises:
        ValueError: the clip has another number of frames.
    """
    leanings = _word_leanings(grounding)
    names = [f"frame {place}" for place in range(len(leanings))]
    if clip is not None:
        if len(leanings) not in (0, len(clip)):
            raise ValueError(f"a grounding of {len(leanings)} frames, but a clip of {len(clip)}")
        times = [f"{time:.2f} s" for time in clip.timestamps_seconds]
        numbers = _frame_numbers(record, clip)
        names = [time if number is None else f"{number} at {time}" for number, time in zip(numbers, times, strict=True)]
    words = []
    for nats in leanings.T:
        order = [frame for frame in nats.argsort()[::-1] if nats[frame] >= LEANS_FROM_NATS][:LISTED_FRAMES]
        words.append(", ".join(f"{names[frame]} ({nats[frame]:+.1f})" for frame in order))
    return words


def _words_table(grounding: Grounding, leans: Sequence[str]) -> str:
    """A table of the words: probability with the video and with a grey one, support, frames leaned on."""
    columns = zip(
        grounding.words,
        np.exp(grounding.of_words(grounding.logprobs)),
        np.exp(grounding.of_words(grounding.grey_logprobs)),
        grounding.of_words(grounding.support).round(1) + 0.0,  # no -0.0
        leans,
        strict=True,
    )
    rows = [
        f'<tr><td dir="auto" style="text-align:left">{escape(word)}</td><td>{probability:.2g}</td><td>{grey:.2g}</td>'
        f'<td>{support:+.1f}</td><td style="text-align:left">{escape(frames)}</td></tr>'
        for (word, _), probability, grey, support, frames in columns
    ]
    head = "<tr><th>word</th><th>chance with the video</th><th>with a grey one</th><th>support, nats</th>"
    head += '<th style="text-align:left">leans on frame (nats less without it)</th></tr>'
    total = grounding.total_support
    table = f'<div style="overflow:auto;max-height:420px;font-size:90%"><table>{head}{"".join(rows)}</table></div>'
    summary = f"word by word: support {total:+.1f} nats in all, {total / len(grounding.token_ids):+.2f} a token"
    return f"<details><summary>{summary}</summary>{table}</details>"


# ---- parts of a card -----------------------------------------------------------------------------------------------


def paragraph(html: str) -> str:
    """Text as HTML that keeps its spaces and line breaks and its own writing direction."""
    return f'<div dir="auto" style="white-space:pre-wrap;line-height:1.7;margin:4px 0">{html.strip()}</div>'


def caption_paragraph(record: dict[str, Any], html: str) -> str:
    """The text of a record, already as HTML, or its error."""
    return note(error_text(record)) if record.get("status") == "error" else paragraph(html)


def heading(record: dict[str, Any], with_prompt: bool = True) -> str:
    """The video's name and the prompt as HTML, as far as they are known."""
    name = file_name(record) if "video" in record else ""
    prompt = record.get("prompt", "") if with_prompt else ""
    line = f'{name} <span dir="auto" style="{MUTED}">{escape(prompt)}</span>'
    line += steps_html(record) if prompt else ""
    return f'<div style="margin-bottom:6px">{line}</div>' if name or prompt else ""


def facts_line(record: dict[str, Any]) -> str:
    """Length, finish reason, probability and duration as HTML; "" for an error or a text."""
    facts = "" if record.get("status") == "error" else caption_facts(record, with_probability=True)
    return facts and f'<div style="{MUTED}">{facts}</div>'


def caption_frames(record: dict[str, Any], clip: Clip, grounding: Grounding | None = None) -> str:
    """The frames as the model sees them, with labels, the words that lean on each most and `demo_notice`, as HTML."""
    labels = [frame_label(clip, place, number) for place, number in enumerate(_frame_numbers(record, clip))]
    words: list[list[str]] = [[] for _ in labels]
    if grounding is not None and grounding.words:
        for (word, _), nats in zip(grounding.words, _word_leanings(grounding).T, strict=True):
            if len(nats) and nats.max() >= LEANS_FROM_NATS:
                words[nats.argmax()].append(escape(word.strip(".,;:!?\"'()")))
    frames = pixels_to_frames(preprocess_frames(clip.frames, STRIP_FRAME_PIXELS))
    cells = [
        f"<div>{picture(to_webp(Image.fromarray(frame), 70), 'as the model sees it', 'width:100%;border-radius:3px')}"
        f'<div style="font-size:85%">{label}<div dir="auto" style="opacity:.7">{", ".join(leaning)}</div></div></div>'
        for frame, label, leaning in zip(frames, labels, words, strict=True)
    ]
    legend = f'<div style="{MUTED}">Under a frame: the words that lean on it most.</div>' if any(words) else ""
    grid = "display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:6px"
    notice = demo_notice(record.get("model"), frames)
    return f'<div style="{grid}">{"".join(cells)}</div>{legend}{notice and note(notice)}'


def _legend(title: str, styles: _Styles) -> str:
    samples = " ".join(f'<span style="{style};padding:0 3px">{escape(text)}</span>' for _, style, text in styles)
    return f'<div style="{MUTED};line-height:1.8">{title} {samples}</div>'


def _cut_note(lost: str, t5_limit: int) -> str:
    count = len(lost.split())
    words = "the last word" if count == 1 else f"the last {count} words"
    return note(f"✂ With a limit of {t5_limit} T5 tokens, training would cut off {words}.")


def _frame_numbers(record: dict[str, Any], clip: Clip) -> list[int | None]:
    """The number that each frame carries in the record's prompt; of a text, by default."""
    return Prompt.from_record(record).numbers(clip)
