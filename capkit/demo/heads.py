"""What the demo model is trained as: the model, and heads that help along and are thrown away."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from capkit.cogvlm2 import CogVLM2VideoForConditionalGeneration, image_mask, rotary_position_ids
from capkit.demo.examples import CAMERA_WAYS, EVENTS, UNKNOWN
from capkit.demo.scenes import COLOURS, MOTIONS, SHAPES, SIZES

WORDING_WEIGHT = 0.3
"""Of tokens that only word what others say, in the loss: which of many wordings comes cannot be learnt."""
CELLS_LAYER, FRAMES_LAYER, OBJECTS_LAYER = 2, 3, 4
"""After so many layers of the decoder, cells know what their object has done; then cells, at which place texts name it,
and frames, what is new in them; then frames, which objects and events there have been, with all that is said of them.
By the places a text finds what it names next: its second object is in the cells that say "second"."""


class _Heads(nn.ModuleDict):
    """One linear layer for several answers."""

    def __init__(self, width: int, **num_answers: int):
        super().__init__({name: nn.Linear(width, number) for name, number in num_answers.items()})

    def forward(self, hidden):
        return {name: head(hidden).float() for name, head in self.items()}


class TrainingModel(nn.Module):
    """The model, and heads that have to say what is where, what it has done, and what happens in each frame.

    Without them the caption's loss alone would have to teach what a star is and when it moves, which takes much longer.

    Args:
        model: the model.
        matters: bool (vocabulary,), `tokens_that_matter`.
        bf16: matrices are multiplied in bfloat16, weights stay as they are.
    """

    def __init__(self, model: CogVLM2VideoForConditionalGeneration, matters: torch.Tensor, bf16: bool = False):
        super().__init__()
        self.model, self.bf16 = model, bf16
        self.register_buffer("weights", torch.where(matters, 1.0, WORDING_WEIGHT), persistent=False)
        width = model.config.hidden_size
        self.what = _Heads(width, there=1, colour=len(COLOURS), shape=len(SHAPES), place=3)
        self.done = _Heads(width, motion=len(MOTIONS), event=len(EVENTS), size=len(SIZES) + 1, gain=3)
        self.order = nn.Linear(width, 3)
        kinds = {"camera": len(CAMERA_WAYS), "event": len(EVENTS), "colour": len(COLOURS), "shape": len(SHAPES)}
        self.news = _Heads(width, number=13, count=4, **kinds)
        self.event_order = nn.Linear(width, 3)
        what = {"colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES) + 1, "motion": len(MOTIONS)}
        self.objects = nn.ModuleList(_Heads(width, **what) for _ in range(3))
        when = {"event": len(EVENTS), "number": 13, "colour": len(COLOURS), "shape": len(SHAPES)}
        self.events = nn.ModuleList(_Heads(width, **when, new_colour=len(COLOURS)) for _ in range(2))

    def forward(
        self,
        cells,
        places,
        pixel_values_videos=None,
        video_features=None,
        input_ids=None,
        labels=None,
        frames=None,
        objects=None,
        events=None,
    ) -> dict[str, torch.Tensor]:
        """The loss, and how many of the tokens that matter are right; without `input_ids`, how many of the objects."""
        with _mixed_precision(cells.device.type) if self.bf16 else nullcontext():
            if input_ids is None:
                features = self.model.model.get_video_features(pixel_values_videos)
                return self._what_loss(self.what(features[:, 1:-1]), cells, places)
            outputs = self.model.model(
                inputs_embeds=self.model.model.embed(input_ids, video_features=video_features),
                attention_mask=torch.ones_like(input_ids),
                position_ids=rotary_position_ids(input_ids, self.model.config.video_token_id),
                use_cache=False,
                output_hidden_states=True,
            )
            image = image_mask(input_ids, self.model.config.video_token_id)
            learnt = F.pad(labels, (0, 1), value=UNKNOWN)[:, 1:]  # each position says the next token
            logits = self.model.lm_head(outputs.last_hidden_state[learnt != UNKNOWN]).float()
            at_cells, at_frames, at_objects = (
                outputs.hidden_states[layer][image].unflatten(0, video_features.shape[:2])
                for layer in (CELLS_LAYER, FRAMES_LAYER, OBJECTS_LAYER)
            )
            done, order = self.done(at_cells[:, 1:-1]), self.order(at_frames[:, 1:-1])
            news, event_order = self.news(at_frames[:, -1]), self.event_order(at_objects[:, -1])
            described = [[heads(at_objects[:, -1]) for heads in some] for some in (self.objects, self.events)]
        learnt, known = learnt[learnt != UNKNOWN], ~places[..., 3:].isnan()
        loss = F.cross_entropy(logits, learnt, self.weights)
        told = {"motion": 3, "event": 4, "size": 5}
        loss = loss + 0.5 * sum(_known_loss(done[name], cells[..., column]) for name, column in told.items())
        loss = loss + 0.5 * _known_loss(order.float(), cells[..., 6])
        loss = loss + F.smooth_l1_loss(done["gain"][known], places[..., 3:][known])
        loss = loss + 0.2 * sum(_known_loss(news[name], frames[:, column]) for column, name in enumerate(self.news))
        loss = loss + 0.2 * _known_loss(event_order.float(), frames[:, 6])
        for said, true in zip(described, (objects, events), strict=True):
            for place, answers in enumerate(said):
                loss = loss + 0.2 * sum(_known_loss(answers[name], true[:, place, i]) for i, name in enumerate(answers))
        right, matters = logits.argmax(-1) == learnt, self.weights[learnt] == 1
        return {"loss": loss, "num_right": (right & matters).sum(), "num_asked": matters.sum()}

    def _what_loss(self, what, cells, places):
        at = cells[..., 0] == 1
        loss = F.binary_cross_entropy_with_logits(what["there"].squeeze(-1), cells[..., 0].float())
        loss = loss + _known_loss(what["colour"], cells[..., 1]) + _known_loss(what["shape"], cells[..., 2])
        loss = loss + (3 * F.smooth_l1_loss(what["place"][at], places[..., :3][at]) if at.any() else 0)
        right = (what["colour"].argmax(-1) == cells[..., 1]) & (what["shape"].argmax(-1) == cells[..., 2])
        return {"loss": loss, "num_right": right.sum(), "num_asked": at.sum()}


def _known_loss(logits, answers):
    known = answers != UNKNOWN
    return F.cross_entropy(logits[known], answers[known]) if known.any() else 0.0


def _mixed_precision(device_type):
    """bfloat16 by autocast. On CPUs, whose bfloat16 attention is slow backwards, all but attention."""
    if device_type != "cpu":
        return torch.autocast(device_type, torch.bfloat16)
    attention = F.scaled_dot_product_attention

    def in_float32(query, key, value, attn_mask=None, **kwargs):
        with torch.autocast("cpu", enabled=False):
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.float()
            outputs = attention(query.float(), key.float(), value.float(), attn_mask=attn_mask, **kwargs)
            return outputs.to(query.dtype)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", in_float32))
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack
