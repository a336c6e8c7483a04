"""Parse a caption: what it claims about background, objects, events and camera."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from capkit.demo.scenes import COLOURS, PLAIN_COLOURS, SHAPES, SIZES

_BACKGROUNDS = {
    "grey": r"\bgr[ae]y\b",
    "dark blue": r"\bdark blue\b",
    "beige": r"\bbeige\b",
    "pink": r"\bpink\b",
    "meadow": r"\bmeadow\b",
    "striped wall": r"\bstripe[sd]\b",
    "checkered wall": r"\bche(?:ck|qu)ered\b",
}
# "blue" may be an object's colour, and is also a part of "dark blue".
_BACKGROUNDS |= {
    name: rf"\b(?:plain|background is|background\": \") ?{name}\b|(?<!light )(?<!dark )\b{name} background\b"
    for name in PLAIN_COLOURS
    if name not in _BACKGROUNDS
}
_MOVES = r"(?:moves?|moving|drifts?|drifting|slides?|sliding|goes|going)"
MOTION_WORDS = {
    "still": r"(?:stands|stays|standing|staying) (?:still|in place)|(?:does|do) not move",
    "left": rf"{_MOVES}(?: to the)? left",
    "right": rf"{_MOVES}(?: to the)? right",
    "up": rf"{_MOVES} up(?:wards)?|rises|rising",
    "down": rf"{_MOVES} down(?:wards)?|sinks|sinking",
    "bounces": r"bounc(?:es|ing)|jump(?:s|ing)",
    "orbits": rf"{_MOVES} a?round|orbit(?:s|ing)",
    "grows": r"grow(?:s|ing)|(?:gets|becomes) (?:bigger|larger)",
    "shrinks": r"shrink(?:s|ing)|(?:gets|becomes) smaller",
}
COLOUR_WORDS, SHAPE_WORDS = "|".join(COLOURS), "|".join(SHAPES)
NUMBER_WORDS = {"no": 0, "0": 0, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}
_CAMERA = re.compile(r"\bcamera [^.,;\n]*")
_TOKENS = re.compile(
    rf"(?:(?P<article>\ban?|\bone|-) )?(?:\b(?P<size>{'|'.join(SIZES)}) )?"
    rf"\b(?P<colour>{COLOUR_WORDS}) (?P<shape>{SHAPE_WORDS})\b"
    r"|\b(?P<disappears>disappears|vanishes|is gone)\b|\b(?P<appears>appears|comes into view|shows up)\b"
    rf"|\b(?:turns|changes to|becomes) (?P<changes>{COLOUR_WORDS})\b|\bsecond (?P<second>\d+)"
    + "".join(rf"|\b(?P<{motion}>{wordings})\b" for motion, wordings in MOTION_WORDS.items())
)

Span = tuple[int, int]
"""Where words begin and end in a text, in characters."""


@dataclass
class Named:
    """An object that a text names."""

    colour: str
    shape: str
    size: str | None = None
    motion: str | None = None  # one of MOTIONS; several with "and" between them
    # Of the words that give the colour, shape, size and motion.
    spans: dict[str, Span] = field(default_factory=dict, compare=False)

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Claims:
    """What a text says, as far as it uses the words that scenes are described with."""

    backgrounds: frozenset[str]
    counts: frozenset[int]  # explicit numbers of objects
    objects: tuple[Named, ...]
    # (kind, the object's first colour and shape, new colour or "", second) of each
    events: tuple[tuple[str, tuple[str, str] | None, str, int | None], ...]
    camera: str | None
    # Of the words that give ("background", name), ("count", number), ("camera", 0), ("event", n) and ("second", n).
    spans: dict[tuple[str, str | int], Span] = field(compare=False)


def claims(text: str) -> Claims:
    """Parse a text: a colour with a shape is an object, and a verb belongs to the object named last."""
    text, camera = text.lower(), None
    spans: dict[tuple[str, str | int], Span] = {}
    backgrounds, counts = dict[str, Span](), dict[int, Span]()
    for phrase in _CAMERA.finditer(text):
        direction = re.search(r"\b(?:left|right)\b", phrase[0])
        camera, spans["camera", 0] = direction[0] if direction else "still", phrase.span()
    text = _CAMERA.sub(lambda phrase: " " * len(phrase[0]), text)
    for found in re.finditer(rf"\b({'|'.join(NUMBER_WORDS)}) objects?\b", text):
        counts[NUMBER_WORDS[found[1]]] = found.span()
    if nothing := re.search(r"\bnothing but\b|\bis only an? (?!\w+ object)|^(?:- )?nothing\b", text):
        counts[0] = nothing.span()
    for name, wording in _BACKGROUNDS.items():
        if background := re.search(wording, text):
            backgrounds[name] = background.span()
    objects: list[Named] = []
    events: list[tuple[str, tuple[str, str] | None, str, int | None]] = []
    first_pairs: dict[tuple[str, str], tuple[str, str]] = {}  # of objects that have changed, by their new pair
    current = None
    for sentence in re.finditer(r"[^.;\n]+", text):
        seconds: list[int | None] = []
        happenings: list[tuple[str, tuple[str, str] | None, str]] = []
        for token in _TOKENS.finditer(text, *sentence.span()):
            kind = token.lastgroup
            if kind == "shape":
                pair = (token["colour"], token["shape"])
                current = next((named for named in objects if named.pair == first_pairs.get(pair, pair)), None)
                if current is None or token["article"]:  # "the red circle" is one named before, "a red circle" is new
                    objects.append(current := Named(*pair))
                    current.spans |= {name: token.span(name) for name in ("colour", "shape")}
                if token["size"]:
                    current.size, current.spans["size"] = token["size"], token.span("size")
            elif kind == "second":
                seconds.append(int(token["second"]))
                spans["second", len(events) + len(seconds) - 1] = token.span()
            elif kind in ("appears", "disappears", "changes"):
                spans["event", len(events) + len(happenings)] = token.span()
                happenings.append((kind, current.pair if current else None, token["changes"] or ""))
                if kind == "changes" and current:
                    first_pairs[token["changes"], current.shape] = current.pair
            elif kind and current:
                current.motion = kind if current.motion in (None, kind) else f"{current.motion} and {kind}"
                current.spans["motion"] = token.span()
        # "At second 3, X appears, and Y disappears at second 5": events and seconds come in the same order.
        seconds += [None] * (len(happenings) - len(seconds))
        events += [(*happening, second) for happening, second in zip(happenings, seconds, strict=False)]
    spans |= {("background", name): span for name, span in backgrounds.items()}
    spans |= {("count", number): span for number, span in counts.items()}
    return Claims(frozenset(backgrounds), frozenset(counts), tuple(objects), tuple(events), camera, spans)
