"""Captions of clips: generation, scores, shared-prefix decoding, attribution. Only this room calls generate()."""

from capkit.captioning.attention_map import ACCURACY, LOOKED_AT, AttentionMap, attend
from capkit.captioning.attribution import (
    GREY,
    Grounding,
    count_supported,
    ground,
    score_support,
    token_texts,
    words_of,
)
from capkit.captioning.caches import PreallocatedCache, prefill
from capkit.captioning.captioner import DEMO_CHECKPOINT, GREEDY, Captioner, Score, load_captioner
from capkit.captioning.choosing import Chooser, draw_key
from capkit.captioning.decoding import Decoding, DecodingLike
from capkit.captioning.features import FrameFeatures
from capkit.captioning.generate import Caption, CaptionStream, until_end
from capkit.captioning.graphs import DecodingStep
from capkit.captioning.notice import DEMO_NOTICE, demo_notice
from capkit.captioning.shared_prefix import MAX_BRANCHES, SharedVideo

__all__ = [
    "ACCURACY",
    "LOOKED_AT",
    "AttentionMap",
    "attend",
    "MAX_BRANCHES",
    "GREY",
    "Grounding",
    "count_supported",
    "ground",
    "score_support",
    "token_texts",
    "words_of",
    "PreallocatedCache",
    "prefill",
    "DEMO_CHECKPOINT",
    "DEMO_NOTICE",
    "GREEDY",
    "Captioner",
    "FrameFeatures",
    "Score",
    "load_captioner",
    "Decoding",
    "DecodingLike",
    "Caption",
    "CaptionStream",
    "Chooser",
    "demo_notice",
    "draw_key",
    "until_end",
    "DecodingStep",
    "SharedVideo",
]
