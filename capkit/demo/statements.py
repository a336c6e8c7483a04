"""Judge each statement of a text by the facts: whether it is true, and which words make it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capkit.demo.claims import Claims, Named, Span, claims
from capkit.demo.facts import Facts, Seen
from capkit.demo.scenes import COLOURS, SHAPES, SIZES, pick

SWAPS = (tuple(COLOURS), SHAPES, tuple(SIZES), ("left", "right"), ("one", "two", "three"), tuple(map(str, range(12))))


@dataclass(frozen=True)
class Statement:
    """One thing that a text says."""

    kind: str  # "background", "count", "camera", "colour", "shape", "size", "motion", "event" or "second"
    is_true: bool
    span: Span  # of its words
    is_fact: bool = True  # False of what other statements imply: the number of objects, a camera that stands still


def statements(text: str, facts: Facts) -> list[Statement]:
    """The statements of a text, judged as `check` judges the text.

    An object that is not there is compared with one that no other object of the text is, and that has its shape or its
    colour; where there is none, all that is said of it is false.
    """
    claimed = claims(text)
    spans, judged = claimed.spans, []
    for background in claimed.backgrounds:
        judged.append(Statement("background", background == facts.background, spans["background", background]))
    for count in claimed.counts:
        judged.append(Statement("count", count == len(facts.objects), spans["count", count], is_fact=False))
    if claimed.camera:
        is_true, moves = claimed.camera == facts.camera, claimed.camera != "still"
        judged.append(Statement("camera", is_true, spans["camera", 0], is_fact=moves))
    meant = _meant(claimed.objects, facts.objects)
    for named, seen in zip(claimed.objects, meant, strict=True):
        for kind, span in named.spans.items():
            is_true = seen is not None and getattr(named, kind) == getattr(seen, kind)
            judged.append(Statement(kind, is_true, span))
    return judged + _judge_events(claimed, meant, facts)


def share_true(judged: Sequence[Statement]) -> float:
    """Share of true statements; 0 of a text that says nothing."""
    return sum(one.is_true for one in judged) / max(len(judged), 1)


def share_told(judged: Sequence[Statement], facts: Facts) -> float:
    """Share of the facts that are told: background, camera if it moves; colour, shape, size and motion of each object;
    each event, and its second."""
    num_facts = 1 + (facts.camera in ("left", "right")) + 2 * len(facts.events)
    num_facts += sum(2 + (seen.size is not None) + (seen.motion is not None) for seen in facts.objects)
    return sum(one.is_true and one.is_fact for one in judged) / num_facts


def swap_word(text: str, facts: Facts) -> str | None:
    """The text with one word replaced, which makes one statement false; None if not all of it is true."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    places = [(found, group) for group in SWAPS for found in re.finditer(rf"\b(?:{'|'.join(group)})\b", text)]
    if all(one.is_true for one in statements(text, facts)):
        for place in rng.permutation(len(places)):
            found, group = places[place]
            new = pick(rng, [word for word in group if word != found[0]])
            changed = text[: found.start()] + new + text[found.end() :]
            wrong = [one.span for one in statements(changed, facts) if not one.is_true]
            if len(wrong) == 1 and wrong[0][0] < found.start() + len(new) and found.start() < wrong[0][1]:
                return changed
    return None


def _meant(named: Sequence[Named], objects: Sequence[Seen]) -> list[Seen | None]:
    """The object that each named one stands for, each at most once: the same, else one that shares shape or colour."""
    left = list(objects)
    meant: list[Seen | None] = [None] * len(named)
    for alike in (("pair",), ("shape",), ("colour",)):
        for place, one in enumerate(named):
            same = [seen for seen in left if all(getattr(seen, name) == getattr(one, name) for name in alike)]
            if meant[place] is None and same:
                meant[place] = same[0]
                left.remove(same[0])
    return meant


def _judge_events(claimed: Claims, meant: Sequence[Seen | None], facts: Facts) -> list[Statement]:
    """Events of the objects meant, each true once; of a true one also whether its second is right within one."""
    pairs = {named.pair: seen.pair for named, seen in zip(claimed.objects, meant, strict=True) if seen}
    judged, left = [], list(facts.events)
    for number, (kind, pair, new, second) in enumerate(claimed.events):
        same = [
            event
            for event in left
            if (event.kind, (event.colour, event.shape), event.new_colour) == (kind, pair and pairs.get(pair), new)
        ]
        judged.append(Statement("event", bool(same), claimed.spans["event", number]))
        if same:
            left.remove(same[0])
            if second is not None:
                is_right = abs(second - same[0].second) <= 1
                judged.append(Statement("second", is_right, claimed.spans["second", number]))
    return judged
