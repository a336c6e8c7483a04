"""A caption beside its frames: how sure each word was, what it rests on, and what a trainer would cut off."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from capkit.captioning import Caption, Grounding, token_texts
from capkit.cogvlm2 import Prompt, pixels_to_frames, preprocess_frames
from capkit.runs import STRIP_FRAME_PIXELS
from capkit.sweep import COGVIDEOX_T5_LIMIT, t5_counter
from capkit.video import Clip
from capkit.views.frames import frame_label, numbers_warning
from capkit.views.html import BLUE, CARD, HTML, MUTED, ORANGE, RED, SKY, file_name, picture, record_text, to_webp

LEANS_FROM_NATS = 0.5  # a word leans on a frame without which it would be this much less likely: exp(0.5), 1.6 times
LISTED_FRAMES = 3

# From this probability on a token looks so; each style has a line of its own, so that tints are not needed to tell.
_SURE = (
    (0.9, "", "90 % and more"),
    (0.5, f"border-bottom:2px dotted {ORANGE};background:{ORANGE}22", "50 to 90 %"),
    (0.1, f"border-bottom:2px dashed {ORANGE};background:{ORANGE}44", "10 to 50 %"),
    (0.0, f"border-bottom:3px solid {ORANGE};background:{ORANGE}77", "under 10 %"),
)
# From this support on, in nats, a word looks so.
_SUPPORTED = (
    (3.0, f"border-bottom:3px solid {BLUE};background:{SKY}77", "20 times likelier with the video, or more"),
    (1.0, f"border-bottom:2px dashed {BLUE};background:{SKY}44", "3 to 20 times"),
    (-1.0, "", "about as likely without it"),
    (-np.inf, f"border-bottom:3px double {RED};background:{RED}44", "likelier without it"),
)


def show_caption(
    caption: Caption | dict[str, Any] | str,
    clip: Clip | None = None,
    grounding: Grounding | None = None,
    processor: Any = None,
    t5_tokenizer: Any = None,
    t5_limit: int = COGVIDEOX_T5_LIMIT,
) -> HTML:
    """A caption beside the frames that the model saw, with how sure it was of each token and what each word rests on.

    What CogVideoX training would cut off is struck through.

    Args:
        caption: a `Caption`, a caption record (a text edited by hand goes before the model's) or a text.
        clip: whose frames to show.
        grounding: of this text, from `ground`: shades words by their support, and says, in their
            tooltips and in a table, on which frames they lean. Shades tokens too.
        processor: the model's (`captioner.processor`): turns a `Caption`'s tokens into text, so that they can be shaded
            without a grounding.
        t5_tokenizer: a transformers tokenizer of T5 or the folder of one; None estimates where the cut falls.
        t5_limit: T5 tokens that a trainer keeps, `</s>` included.

    Raises:
        ValueError: the grounding is of another text, or of another number of frames than the clip has.
    """
    text = caption_text(caption)
    tokens = _tokens(caption, text, grounding, processor)
    words = tokens.grounding if tokens is not None and tokens.grounding and tokens.grounding.words else None
    if words and clip is not None and words.frame_logprobs is not None and len(words.frame_logprobs) != len(clip):
        raise ValueError(f"a grounding of {len(words.frame_logprobs)} frames, but a clip of {len(clip)}")
    shown = text if tokens is None else "".join(tokens.pieces)
    kept = t5_kept(shown, t5_tokenizer, t5_limit)
    spans = [(0, escape(shown[:kept])), (kept, escape(shown[kept:]))] if tokens is None else _token_spans(tokens)
    parts = [not_captioned(caption) or paragraph(_struck(spans, kept))]
    if tokens is not None:
        parts.append(_legend("Chance of each token:", _SURE))
    if kept < len(shown.rstrip()):
        parts.append(_cut_note(shown[kept:], t5_tokenizer, t5_limit))
    if words:
        labels = _frame_names(caption, clip, words)
        parts += ["<hr>", paragraph(_word_spans(words, labels)), _legend("Each word with the video:", _SUPPORTED)]
        parts.append(_words_table(words, labels))
    parts.append(caption_facts(caption))
    frames = "" if clip is None else f'<div style="flex:1 1 240px">{caption_frames(caption, clip, words)}</div>'
    warning = "" if clip is None else numbers_warning(clip, _numbers(caption, clip))
    warning = warning and note(f"⚠ {warning}")
    return HTML(
        f'<div style="{CARD}">{caption_heading(caption)}{warning}<div style="display:flex;flex-wrap:wrap;gap:14px">'
        f'{frames}<div style="flex:2 1 320px;min-width:0">{"".join(parts)}</div></div></div>'
    )


def caption_text(caption: Caption | dict[str, Any] | str) -> str:
    """What a `Caption`, a record or a text says, without spaces around it; "" of a record of an error."""
    if isinstance(caption, dict):
        return record_text(caption)
    return (caption.text if isinstance(caption, Caption) else caption).strip()


def t5_kept(text: str, t5_tokenizer: Any = None, t5_limit: int = COGVIDEOX_T5_LIMIT) -> int:
    """How many characters of a text a trainer keeps: whole words of at most `t5_limit` T5 tokens, `</s>` included.

    Args:
        text: a caption.
        t5_tokenizer, t5_limit: as in `show_caption`.
    """
    count = t5_counter(t5_tokenizer)
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    fitting = bisect_right(ends, t5_limit, key=lambda end: count(text[:end]))
    return len(text) if fitting == len(ends) else ends[fitting - 1] if fitting else 0


# ---- tokens and words ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """A caption's tokens as text with their log probabilities, without the end token."""

    pieces: list[str]
    logprobs: list[float]
    grounding: Grounding | None


def _tokens(caption, text, grounding, processor) -> _Tokens | None:
    own_ids = caption.token_ids if isinstance(caption, Caption) else None
    ended = own_ids is not None and caption.finish_reason == "eos"
    if grounding is not None:
        if ended and grounding.token_ids == own_ids:
            by_frame = grounding.frame_logprobs
            grounding = replace(
                grounding,
                token_ids=grounding.token_ids[:-1],
                tokens=grounding.tokens[:-1],
                logprobs=grounding.logprobs[:-1],
                grey_logprobs=grounding.grey_logprobs[:-1],
                frame_logprobs=None if by_frame is None else by_frame[:, :-1],
            )
        elif grounding.token_ids != own_ids and "".join(grounding.tokens).strip() != text:
            raise ValueError("the grounding is of another text: ground the one that is shown")
        return _Tokens(grounding.tokens, list(grounding.logprobs), grounding)
    if processor is None or own_ids is None:
        return None
    count = len(own_ids) - ended
    return _Tokens(token_texts(processor, own_ids[:count]), caption.logprobs[:count], None)


def _token_spans(tokens):
    """(start, HTML) of each token; one that is only part of a character counts towards the one that completes it."""
    spans, start, logprob = [], 0, 0.0
    for piece, own in zip(tokens.pieces, tokens.logprobs, strict=True):
        logprob += own
        if piece:
            spans.append((start, _shaded(piece, _SURE, np.exp(logprob), f"{np.exp(logprob):.1%}")))
            start, logprob = start + len(piece), 0.0
    return spans


def _word_spans(grounding, labels):
    """The text with each word shaded by its support; in its tooltip the frames that it leans on."""
    text, done, spans = "".join(grounding.tokens), 0, []
    supports, leans = grounding.of_words(grounding.support), _leanings(grounding)
    for place, ((word, _), support) in enumerate(zip(grounding.words, supports, strict=True)):
        at = text.index(word, done)
        told = f"support {support:+.1f} nats" + _leans_on(leans, labels, place, "; leans on ")
        spans.append(escape(text[done:at]) + _shaded(word, _SUPPORTED, support, told))
        done = at + len(word)
    return "".join(spans) + escape(text[done:])


def _shaded(piece, styles, value, title):
    style = next(style for lowest, style, _ in styles if value >= lowest)
    word = piece.lstrip()
    style = f' style="{style}"' if style else ""
    space = escape(piece[: len(piece) - len(word)])
    return f'{space}<span title="{escape(title)}"{style}>{escape(word)}</span>'


def _struck(spans, kept):
    lost = "".join(html for start, html in spans if start >= kept)
    told = "".join(html for start, html in spans if start < kept)
    return told + (f'<s style="opacity:.6">{lost}</s>' if lost else "")


def _leanings(grounding):
    """float64 (T, W), or None."""
    return None if grounding.frame_logprobs is None else grounding.of_words(grounding.leaning)


def _leans_on(leans, labels, word, before=""):
    """The frames that a word leans on, most first."""
    if leans is None:
        return ""
    order = [frame for frame in leans[:, word].argsort()[::-1] if leans[frame, word] >= LEANS_FROM_NATS]
    told = ", ".join(f"{labels[frame]} ({leans[frame, word]:+.1f})" for frame in order[:LISTED_FRAMES])
    return before + told if told else ""


def _words_table(grounding, labels):
    """Every word: how probable with the video and with a grey one, and the frames that it leans on."""
    leans = _leanings(grounding)
    columns = zip(
        grounding.words,
        np.exp(grounding.of_words(grounding.logprobs)),
        np.exp(grounding.of_words(grounding.grey_logprobs)),
        grounding.of_words(grounding.support),
        strict=True,
    )
    rows = [
        f'<tr><td dir="auto" style="text-align:left">{escape(word)}</td><td>{seen:.2g}</td><td>{grey:.2g}</td>'
        f"<td>{round(support, 1) + 0.0:+.1f}</td>"  # no -0.0
        f'<td style="text-align:left">{escape(_leans_on(leans, labels, place))}</td></tr>'
        for place, ((word, _), seen, grey, support) in enumerate(columns)
    ]
    head = "<tr><th>word</th><th>chance with the video</th><th>with a grey one</th><th>support, nats</th>"
    head += '<th style="text-align:left">leans on frame (nats less without it)</th></tr>'
    total = (
        f"{grounding.total_support:+.1f} nats in all, {grounding.total_support / len(grounding.token_ids):+.2f} a token"
    )
    table = f'<div style="overflow:auto;max-height:420px;font-size:90%"><table>{head}{"".join(rows)}</table></div>'
    return f"<details><summary>word by word: support {total}</summary>{table}</details>"


# ---- parts of a card -----------------------------------------------------------------------------------------------


def paragraph(html: str) -> str:
    """Text as HTML, its spaces and line breaks kept, in its own direction."""
    return f'<div dir="auto" style="white-space:pre-wrap;line-height:1.7;margin:4px 0">{html.strip()}</div>'


def _legend(title, styles):
    samples = " ".join(f'<span style="{style};padding:0 3px">{escape(told)}</span>' for _, style, told in styles)
    return f'<div style="{MUTED};line-height:1.8">{title} {samples}</div>'


def _cut_note(lost, t5_tokenizer, t5_limit):
    how = "an estimate: no T5 tokenizer was given" if t5_tokenizer is None else "counted with the tokenizer given"
    words = len(lost.split())
    told = f"CogVideoX training would cut off {'the last word' if words == 1 else f'the last {words} words'}"
    return note(f"✂ {told}: it keeps {t5_limit} T5 tokens ({how}).")


def note(html: str) -> str:
    """Something to beware of."""
    return f'<div style="border-left:4px solid {RED};padding:3px 8px;margin:4px 0">{html}</div>'


def not_captioned(caption) -> str:
    """Why a record holds no caption, as HTML; "" for whatever holds one."""
    failed = isinstance(caption, dict) and caption["status"] == "error"
    return note(f"not captioned: {escape(caption['error'])}") if failed else ""


def caption_heading(caption, with_prompt: bool = True) -> str:
    """The video's name and the prompt, where they are known, as HTML."""
    prompt = prompt_of(caption) if with_prompt else None
    name = file_name(caption) if isinstance(caption, dict) else ""
    heading = f'{name} <span dir="auto" style="{MUTED}">{escape(prompt.text if prompt else "")}</span>'
    return f'<div style="margin-bottom:6px">{heading}</div>' if name or prompt else ""


def caption_facts(caption) -> str:
    """How a caption came about, and how sure the model was of it on average."""
    if isinstance(caption, Caption):
        count, mean = len(caption.token_ids), caption.mean_logprob
    elif isinstance(caption, dict) and caption["status"] == "ok":
        count, mean = caption["num_tokens"], caption["mean_logprob"]
    else:
        return ""
    ended, seconds = field_of(caption, "finish_reason"), field_of(caption, "seconds")
    facts = [] if count is None else [f"{count} tokens"]
    facts += [] if ended is None else [f"ended by {ended}"]
    facts += [] if mean is None else [f"{np.exp(mean):.0%} a token (mean, {mean:.2f} nats)"]
    facts += [] if seconds is None else [f"{seconds:.3g} s"]
    is_edited = isinstance(caption, dict) and "edited_text" in caption
    edited = "<b>✎ edited by hand</b>; the model's own: " if is_edited else ""
    return f'<div style="{MUTED}">{edited}{escape(", ".join(facts))}</div>'


def caption_frames(caption, clip: Clip, grounding: Grounding | None = None) -> str:
    """The frames as the model saw them, with their labels and the words that lean on each most."""
    labels = [frame_label(clip, place, number) for place, number in enumerate(_numbers(caption, clip))]
    words = [[] for _ in labels]
    leans = None if grounding is None else _leanings(grounding)
    if leans is not None:
        for place, (word, _) in enumerate(grounding.words):
            if leans[:, place].max() >= LEANS_FROM_NATS:
                words[leans[:, place].argmax()].append(escape(word.strip(".,;:!?\"'()")))
    seen = pixels_to_frames(preprocess_frames(clip.frames, STRIP_FRAME_PIXELS))
    cells = [
        f"<div>{picture(to_webp(Image.fromarray(frame), 70), 'as the model sees it', 'width:100%;border-radius:3px')}"
        f'<div style="font-size:85%">{label}<div dir="auto" style="opacity:.7">{", ".join(said)}</div></div></div>'
        for frame, label, said in zip(seen, labels, words, strict=True)
    ]
    told = f'<div style="{MUTED}">Under a frame: the words that lean on it most.</div>' if any(words) else ""
    grid = "display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:6px"
    return f'<div style="{grid}">{"".join(cells)}</div>{told}'


def _frame_names(caption, clip, grounding):
    """What frames are called in words: by number and time where there is a clip, else by their place."""
    by_frame = grounding.frame_logprobs
    if clip is None:
        return [f"frame {place}" for place in range(0 if by_frame is None else len(by_frame))]
    times = [f"{time:.2f} s" for time in clip.timestamps_seconds]
    numbers = _numbers(caption, clip)
    return [time if number is None else f"{number} at {time}" for number, time in zip(numbers, times, strict=True)]


def _numbers(caption, clip):
    """What frames carried in the prompt; of a text, by default."""
    return (prompt_of(caption) or Prompt()).numbers(clip)


def prompt_of(caption: Caption | dict[str, Any] | str) -> Prompt | None:
    """The prompt of a `Caption` or a record; None of a text."""
    return Prompt.from_record(caption) if isinstance(caption, dict) else getattr(caption, "prompt", None)


def field_of(caption, name: str) -> Any:
    """A field of a `Caption` or a record; None of a text."""
    return caption.get(name) if isinstance(caption, dict) else getattr(caption, name, None)
