"""The model in training: CogVLM2-Video with auxiliary heads, which are dropped afterwards."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from capkit.cogvlm2 import CogVLM2VideoForConditionalGeneration, image_mask, rotary_position_ids
from capkit.demo.examples import CAMERA_MOTIONS, EVENTS, UNKNOWN
from capkit.demo.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES

WORDING_WEIGHT = 0.3
"""Weight in the loss of tokens that are not `content_tokens`: which of many wordings comes cannot be learnt."""
CELLS_LAYER, FRAMES_LAYER, OBJECTS_LAYER = 2, 3, 4
"""Decoder layers whose outputs the heads read: first what each cell's object has done; then each object's place in the
order of the text, and what is new in each frame; then all objects and events up to a frame.
By these places a text finds what it names next: its second object is in the cells that say "second"."""

_ABSENT = torch.empty(0)  # what only the other kind of batch has


class _Heads(nn.ModuleDict):
    """Linear classifiers on the same input, by name."""

    def __init__(self, width: int, **num_answers: int):
        super().__init__({name: nn.Linear(width, number) for name, number in num_answers.items()})

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: head(hidden).float() for name, head in self.items()}


class TrainingModel(nn.Module):
    """The model, and heads that predict the labels of a `DrawnClip`.

    Without them the caption's loss alone would have to teach what a star is and when it moves, which takes much longer.

    Args:
        model: the model to train.
        is_content: bool (vocabulary,), from `content_tokens`.
        bf16: autocast to bfloat16; the weights stay as they are.
    """

    weights: torch.Tensor

    def __init__(self, model: CogVLM2VideoForConditionalGeneration, is_content: torch.Tensor, bf16: bool = False):
        super().__init__()
        self.model, self.bf16 = model, bf16
        self.register_buffer("weights", torch.where(is_content, 1.0, WORDING_WEIGHT), persistent=False)
        width = model.config.hidden_size
        pair = {"colour": len(COLOURS), "shape": len(SHAPES)}
        self.what = _Heads(width, there=1, **pair, place=3)
        self.done = _Heads(width, motion=len(MOTIONS), event=len(EVENTS), size=len(SIZES) + 1, gain=3)
        self.order = nn.Linear(width, 3)
        self.news = _Heads(width, number=13, count=4, camera=len(CAMERA_MOTIONS), event=len(EVENTS), **pair)
        self.event_order = nn.Linear(width, 3)
        object_heads = {**pair, "size": len(SIZES) + 1, "motion": len(MOTIONS)}
        self.objects = nn.ModuleList(_Heads(width, **object_heads) for _ in range(3))
        event_heads = {"event": len(EVENTS), "number": 13, **pair, "new_colour": len(COLOURS)}
        self.events = nn.ModuleList(_Heads(width, **event_heads) for _ in range(2))

    def forward(
        self,
        cells: torch.Tensor,
        places: torch.Tensor,
        pixel_values_videos: torch.Tensor = _ABSENT,
        video_features: torch.Tensor = _ABSENT,
        input_ids: torch.Tensor = _ABSENT,
        labels: torch.Tensor = _ABSENT,
        frames: torch.Tensor = _ABSENT,
        objects: torch.Tensor = _ABSENT,
        events: torch.Tensor = _ABSENT,
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch of `Examples`, and how many of its content tokens are right.

        For a batch of `Frames`, which has pixels, the loss of the vision tower, and how many objects are right.
        """
        with _mixed_precision(cells.device.type) if self.bf16 else nullcontext():
            if len(pixel_values_videos):
                return self._vision_loss(pixel_values_videos, cells, places)
            outputs = self.model.model(
                inputs_embeds=self.model.model.embed(input_ids, video_features=video_features),
                attention_mask=torch.ones_like(input_ids),
                position_ids=rotary_position_ids(input_ids, self.model.config.video_token_id),
                use_cache=False,
                output_hidden_states=True,
            )
            image = image_mask(input_ids, self.model.config.video_token_id)
            next_ids = F.pad(labels, (0, 1), value=UNKNOWN)[:, 1:]  # each position predicts the next token
            logits = self.model.lm_head(outputs.last_hidden_state[next_ids != UNKNOWN]).float()
            next_ids = next_ids[next_ids != UNKNOWN]
            right, is_content = logits.argmax(-1) == next_ids, self.weights[next_ids] == 1
            counts = {"num_right": (right & is_content).sum(), "num_counted": is_content.sum()}
            loss = F.cross_entropy(logits, next_ids, self.weights)
            at_cells, at_frames, at_objects = (
                outputs.hidden_states[layer][image].unflatten(0, video_features.shape[:2])
                for layer in (CELLS_LAYER, FRAMES_LAYER, OBJECTS_LAYER)
            )
            done, order = self.done(at_cells[:, 1:-1]), self.order(at_frames[:, 1:-1]).float()
            news, event_order = self.news(at_frames[:, -1]), self.event_order(at_objects[:, -1]).float()
            history = [heads(at_objects[:, -1]) for heads in (*self.objects, *self.events)]
        has_gain = ~places[..., 3:].isnan()
        done_labels = {"motion": cells[..., 3], "event": cells[..., 4], "size": cells[..., 5]}
        loss = loss + 0.5 * sum(_known_loss(done[name], true) for name, true in done_labels.items())
        loss = loss + 0.5 * _known_loss(order, cells[..., 6])
        loss = loss + F.smooth_l1_loss(done["gain"][has_gain], places[..., 3:][has_gain])
        loss = loss + 0.2 * _sum_of_losses(news, frames)
        loss = loss + 0.2 * _known_loss(event_order, frames[:, 6])
        for predicted, true in zip(history, (*objects.unbind(1), *events.unbind(1)), strict=True):
            loss = loss + 0.2 * _sum_of_losses(predicted, true)
        return {"loss": loss, **counts}

    def _vision_loss(self, pixels: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
        what = self.what(self.model.model.get_video_features(pixels)[:, 1:-1])
        is_object = cells[..., 0] == 1
        loss = F.binary_cross_entropy_with_logits(what["there"].squeeze(-1), cells[..., 0].float())
        loss = loss + _known_loss(what["colour"], cells[..., 1]) + _known_loss(what["shape"], cells[..., 2])
        if is_object.any():
            loss = loss + 3 * F.smooth_l1_loss(what["place"][is_object], places[..., :3][is_object])
        right = (what["colour"].argmax(-1) == cells[..., 1]) & (what["shape"].argmax(-1) == cells[..., 2])
        return {"loss": loss, "num_right": right.sum(), "num_counted": is_object.sum()}


class AdaptingModel(nn.Module):
    """A vision tower that learns new backgrounds, and goes on to see everything else as it did.

    So the decoder, which knows the old features, can go on from what it has learnt.

    Args:
        model: trained before; its vision tower is trained.
    """

    def __init__(self, model: CogVLM2VideoForConditionalGeneration):
        super().__init__()
        self.model = model
        teacher = CogVLM2VideoForConditionalGeneration(model.config)
        teacher.load_state_dict(model.state_dict())
        self.teacher = teacher.model.requires_grad_(False)
        self.background = nn.Linear(model.config.hidden_size, len(BACKGROUNDS))

    def forward(
        self, pixel_values_videos: torch.Tensor, taught: torch.Tensor, shares: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch of `Backgrounds`, and how many cells tell the background.

        Args:
            pixel_values_videos, taught: (N, 3, IMAGE_SIZE, IMAGE_SIZE), the frames, and as they are in front of grey.
            shares: (N, cells), how much of each cell is covered by objects; 1 in frames that are taught as they are.
            labels: (N,), indices into BACKGROUNDS.
        """
        features = self.model.model.get_video_features(pixel_values_videos)[:, 1:-1]
        with torch.no_grad():
            target = self.teacher.get_video_features(taught)[:, 1:-1]
        # The decoder feels small changes of what it knows. Where no object is, the teacher's grey is but a guess.
        weights = 0.03 + (5 * shares).clamp(max=1)
        loss = 100 * (weights * (features - target).square().mean(-1)).mean() / target.square().mean()
        is_background = shares < 0.3
        logits = self.background(10 * features[is_background])
        names = labels[:, None].expand_as(shares)[is_background]
        loss = loss + F.cross_entropy(logits, names)
        return {"loss": loss, "num_right": (logits.argmax(-1) == names).sum(), "num_counted": is_background.sum()}


def _known_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | float:
    """Cross entropy, 0 where all labels are UNKNOWN."""
    is_known = labels != UNKNOWN
    return F.cross_entropy(logits[is_known], labels[is_known]) if is_known.any() else 0.0


def _sum_of_losses(logits: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor | float:
    """The sum over heads, whose labels are the columns of `labels` in the same order."""
    return sum(_known_loss(head, labels[:, column]) for column, head in enumerate(logits.values()))


def _mixed_precision(device_type: str) -> AbstractContextManager:
    """Autocast to bfloat16. On CPUs, whose backward pass of bfloat16 attention is slow, all but attention."""
    if device_type != "cpu":
        return torch.autocast(device_type, torch.bfloat16)
    attention = F.scaled_dot_product_attention

    def in_float32(*qkv: torch.Tensor, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.float()
            query, key, value = (tensor.float() for tensor in qkv)
            return attention(query, key, value, attn_mask=attn_mask, **kwargs).to(qkv[0].dtype)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", in_float32))
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack
