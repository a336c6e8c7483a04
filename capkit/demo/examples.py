"""What the demo model learns from: clips that we draw, what is where in them, and texts as tokens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from capkit.cogvlm2 import CogVLM2VideoProcessor, Prompt, pixels_to_frames, preprocess_frames
from capkit.demo.facts import Facts, see
from capkit.demo.planning import make_scene
from capkit.demo.scenes import COLOURS, MOTIONS, SHAPES, SIZES, pick
from capkit.demo.wording import CAMERA, HAPPENS, MOVES, NUMBERS, Example, make_example, make_interview
from capkit.video import Clip

IMAGE_SIZE, PATCH_SIZE = 112, 14
CELLS = IMAGE_SIZE // PATCH_SIZE // 2  # the bridge pools patches 2 x 2: so many cells a side
EVENTS = ("nothing", "appears", "changes", "disappears")
CAMERA_WAYS = ("still", "left", "right")
UNKNOWN = -100  # cross_entropy leaves it out
# Llama-3's: words, digits in groups of at most three, punctuation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]


@dataclass(frozen=True)
class DrawnClip:
    """A scene as the model sees it, and what is true of it.

    Attributes:
        clip: frames of (IMAGE_SIZE, IMAGE_SIZE), already cropped.
        facts: what can be seen.
        cells: int64 (T, CELLS * CELLS, 7): whether an object's middle is in the cell, its colour, its shape, its motion
            as far as the frames up to this one show it, what has happened to it since the frame before, its size (the
            last one for what grows or shrinks), and its place in the order in which texts name the objects.
        places: float32 (T, CELLS * CELLS, 6): where in the picture, x and y, and its diameter, in cells; then how much
            of each it gained since the frame before, in quarters of a cell; NaN where it was not there.
        frames: int64 (T, 7): number, objects so far, camera, what happens in this frame, to which colour and shape, and
            whether it is the clip's first (1) or second event (2).
        objects: int64 (T, 3, 4): of each object so far, in the order in which texts name them, colour, shape, and, from
            its third frame on, size (the last one for what grows or shrinks) and motion.
        events: int64 (T, 2, 5): of the first and the second event so far, kind ("nothing" until it happens), number of
            its frame, colour, shape, and new colour.

    Places in lists of the names; UNKNOWN where there is nothing to say.
    """

    clip: Clip
    facts: Facts
    cells: np.ndarray
    places: np.ndarray
    frames: np.ndarray
    objects: np.ndarray
    events: np.ndarray

    def without_pictures(self) -> DrawnClip:
        """All but what takes the memory."""
        clip = Clip.from_frames(self.clip.frames[:, :1, :1].copy(), self.clip.timestamps_seconds)
        return replace(self, clip=clip)


def draw_clip(seed: int, held_out: bool = False) -> DrawnClip:
    """Draw the sampled frames of scene `seed`, cropped as the model will see them."""
    scene = make_scene(seed, held_out)
    clip = scene.sample("chat")
    frames = pixels_to_frames(preprocess_frames(clip.frames, IMAGE_SIZE))
    facts = see(scene, clip)
    what = _what_is_where(scene, clip, facts)
    return DrawnClip(Clip.from_frames(frames, clip.timestamps_seconds), facts, *what, _objects(facts), _events(facts))


def _objects(facts):
    """`objects` of a DrawnClip."""
    objects = np.full((len(facts.numbers), 3, 4), UNKNOWN)
    for place, seen in enumerate(facts.objects):
        first, last = facts.numbers.index(seen.first), len(facts.numbers) - 1
        objects[first:, place, :2] = (list(COLOURS).index(seen.colour), SHAPES.index(seen.shape))
        objects[min(first + 2, last) :, place, 2] = [*SIZES, None].index(seen.size)
        objects[min(first + 2, last) :, place, 3] = MOTIONS.index(seen.motion) if seen.motion else UNKNOWN
    return objects


def _events(facts):
    """`events` of a DrawnClip."""
    events = np.full((len(facts.numbers), 2, 5), UNKNOWN)
    events[:, :, 0] = EVENTS.index("nothing")
    for place, event in enumerate(facts.events):
        number, colours = facts.numbers.index(event.second), list(COLOURS)
        new_colour = colours.index(event.new_colour) if event.new_colour else UNKNOWN
        what = (EVENTS.index(event.kind), number, colours.index(event.colour), SHAPES.index(event.shape), new_colour)
        events[number:, place] = what
    return events


def _what_is_where(scene, clip, facts):
    """`cells`, `places` and `frames` of a DrawnClip."""
    count = len(clip)
    cells = np.full((count, CELLS * CELLS, 7), UNKNOWN)
    cells[..., 0], places = 0, np.full((count, CELLS * CELLS, 6), np.nan, np.float32)
    of_frames = np.full((count, 7), UNKNOWN)
    of_frames[:, 0], of_frames[1:, 3], of_frames[1:, 6] = np.arange(count), 0, 0
    if facts.camera:
        of_frames[2:, 2] = CAMERA_WAYS.index(facts.camera)
    named = [(seen.colour, seen.shape) for seen in facts.objects]
    before, since = {}, {}
    for frame, seconds in enumerate(clip.timestamps_seconds):
        now = {}
        for thing, colour, *place in scene.visible(seconds):
            x, y, diameter = (length * CELLS for length in place)
            column, row = (min(max(int(length), 0), CELLS - 1) for length in (x, y))
            first, first_colour = since.setdefault(thing, (frame, colour))
            cell, order = row * CELLS + column, named.index((first_colour, thing.shape))
            now[thing] = (x, y, diameter, cell, colour)
            cells[frame, cell, :3] = (1, list(COLOURS).index(colour), SHAPES.index(thing.shape))
            if frame >= first + 1:  # before, half of its neighbours are yet to come
                cells[frame, cell, 6] = order
            if frame >= first + 2:
                seen = facts.objects[order]
                cells[frame, cell, 3] = MOTIONS.index(seen.motion) if seen.motion else UNKNOWN
                cells[frame, cell, 5] = [*SIZES, None].index(seen.size)
            places[frame, cell, :3] = (x, y, diameter)
            if thing in before:
                places[frame, cell, 3:] = 4 * (np.array(now[thing][:3]) - before[thing][:3])
            if frame > 0:
                event = "appears" if thing not in before else "nothing" if before[thing][4] == colour else "changes"
                cells[frame, cell, 4] = EVENTS.index(event)
        for thing in before.keys() - now.keys():
            if not cells[frame, before[thing][3], 0]:
                cells[frame, before[thing][3], 4] = EVENTS.index("disappears")
        of_frames[frame, 1] = len(since)
        before = now
    for place, event in enumerate(facts.events, 1):
        what = EVENTS.index(event.kind), list(COLOURS).index(event.colour), SHAPES.index(event.shape), place
        of_frames[facts.numbers.index(event.second), 3:] = what
    return cells, places, of_frames


def draw_clips(seeds: Sequence[int], held_out: bool = False, num_workers: int = 2) -> list[DrawnClip]:
    """Draw many, in worker processes."""
    if num_workers < 2:
        return [draw_clip(seed, held_out) for seed in seeds]
    context = multiprocessing.get_context("spawn")
    # One thread each: torch's own would fight over the cores.
    with ProcessPoolExecutor(num_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(draw_clip, seeds, [held_out] * len(seeds), chunksize=100))


def train_tokenizer(clips: Sequence[DrawnClip], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of what is said of clips, with Llama-3's special tokens and its way with digits."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    random = np.random.default_rng(0)
    examples = [make_example(drawn.facts, random) for drawn in clips for _ in range(4)]
    numbers = [str(number) for number in range(100)]
    tokenizer.train_from_iterator([*map(_whole_text, examples), *numbers * 20], trainer)
    bos, eos, pad, _ = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, model_max_length=2048)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.pad_token, fast.padding_side = pad, "left"
    return fast


def tokens_that_matter(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """bool (vocabulary,): True for tokens of words that say what is seen, False for those that only word it."""
    wordings = [
        *COLOURS,
        *SHAPES,
        *SIZES,
        *NUMBERS,
        *MOTIONS,
        *map(str, range(13)),
        "yes",
        "no",
        "grey dark beige pink",
    ]
    wordings += [wording for kinds in (MOVES, CAMERA, HAPPENS) for some in kinds.values() for wording in some]
    wordings += ["grey dark beige pink meadow striped checkered nothing"]
    words = {word for wording in wordings for word in wording.split()}
    words -= {"a", "the", "to", "in", "is", "not", "does", "of", "and", "{}"}
    words = [form for word in words for form in (word, f" {word}", f" {word.capitalize()}", word.capitalize())]
    matters = torch.zeros(len(tokenizer), dtype=torch.bool)
    matters[[token for ids in tokenizer(words, add_special_tokens=False)["input_ids"] for token in ids]] = True
    return matters


def _whole_text(example: Example) -> str:
    return f"{_prompt(example).full_text} {example.answer}"


def _prompt(example: Example) -> Prompt:
    return Prompt(example.prompt, example.template, example.history)


class Frames(torch.utils.data.Dataset):
    """Single frames and what is where in them, to begin with.

    Args:
        clips: from `draw_clips`.
        recoloured: share of frames in false colours, their channels exchanged or inverted. Where there are any, these
            alone teach shapes and the others colours: or colours would be learnt first, and then that no star is red
            where training has no red star.
    """

    def __init__(self, clips: Sequence[DrawnClip], recoloured: float = 0.0):
        self.numbers = [(drawn, frame) for drawn in clips for frame in range(len(drawn.clip))]
        self.recoloured, self.random = recoloured, np.random.default_rng(0)
        self.num_frames = [1] * len(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        drawn, number = self.numbers[index]
        frame, cells = drawn.clip.frames[number], drawn.cells[number].copy()
        if self.recoloured:
            is_recoloured = self.random.random() < self.recoloured
            cells[:, 1 if is_recoloured else 2] = UNKNOWN
            if is_recoloured:
                frame = frame[..., self.random.permutation(3)]
                frame = 255 - frame if self.random.random() < 0.5 else frame
        return frame, cells, drawn.places[number]

    def collate(self, rows: list[tuple]) -> dict[str, torch.Tensor]:
        """A batch for `TrainingModel.forward`, without texts."""
        frames, cells, places = map(np.stack, zip(*rows, strict=True))
        pixels = preprocess_frames(frames, IMAGE_SIZE)
        return {"pixel_values_videos": pixels, "cells": torch.from_numpy(cells), "places": torch.from_numpy(places)}


class Examples(torch.utils.data.Dataset):
    """Clips with something asked and answered about each, worded anew every time.

    Args:
        clips: from `draw_clips`.
        features: of each clip's frames, (T, tokens_per_frame, hidden_size), as the vision tower encodes them.
        processor: of the model in training.
        style: of `make_example`; None for all, as they come.
        misheard: share of the colours in answers that the model is told it has said, where it was to say another: or
            it would learn that what it has never said it never will, and no star is red where training has no red star.
            They are colours of nothing in the clip, so that a colour that is there can be trusted.
        grey: features of a grey frame, (tokens_per_frame, hidden_size). Where given, such a frame takes the place of
            one in every fourth clip: or a frame left out would look to the model like everything vanishing.
        interviews: share of clips that are asked many questions in a row, of `make_interview`.
    """

    def __init__(
        self,
        clips: Sequence[DrawnClip],
        features: Sequence[torch.Tensor],
        processor: CogVLM2VideoProcessor,
        style: str | None = None,
        misheard: float = 0.0,
        grey: torch.Tensor | None = None,
        interviews: float = 0.0,
    ):
        self.clips, self.features, self.processor, self.style = clips, features, processor, style
        self.misheard, self.grey, self.interviews = misheard, grey, interviews
        self.random = np.random.default_rng(0)
        self.num_frames = [len(drawn.clip) for drawn in clips]
        ids = processor.tokenizer([f" {colour}" for colour in COLOURS], add_special_tokens=False)["input_ids"]
        self.colour_ids = {colour: one[0] for colour, one in zip(COLOURS, ids, strict=True) if len(one) == 1}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[DrawnClip, torch.Tensor, list[int], list[int], bool]:
        drawn = self.clips[index]
        if self.interviews and self.random.random() < self.interviews:
            example = make_interview(drawn.facts, self.random)
        else:
            example = make_example(drawn.facts, self.random, self.style)
        ids, labels = self._ids_and_labels(drawn.clip, example)
        if self.misheard:
            there = {seen.colour for seen in drawn.facts.objects} | {event.new_colour for event in drawn.facts.events}
            absent = [token for colour, token in self.colour_ids.items() if colour not in there]
            for place, label in enumerate(labels):
                if absent and label in self.colour_ids.values() and self.random.random() < self.misheard:
                    ids[place] = pick(self.random, absent)
        features, is_chat = self.features[index], example.template == "chat"
        if self.grey is not None and is_chat and self.random.random() < 0.25:
            drawn, features = self._without_a_frame(drawn, features)
        return drawn, features, ids, labels, is_chat

    def _without_a_frame(self, drawn, features):
        number = int(self.random.integers(len(features)))
        features, cells, places, frames = features.clone(), drawn.cells.copy(), drawn.places.copy(), drawn.frames.copy()
        objects, events = drawn.objects.copy(), drawn.events.copy()
        features[number] = self.grey
        cells[number], cells[number + 1 : number + 2, :, 4] = UNKNOWN, UNKNOWN
        places[number], places[number + 1 : number + 2, :, 3:] = np.nan, np.nan
        frames[number, 1:], frames[number + 1 : number + 2, 3:] = UNKNOWN, UNKNOWN
        objects[number], events[number] = UNKNOWN, UNKNOWN
        new = {"cells": cells, "places": places, "frames": frames, "objects": objects, "events": events}
        return replace(drawn, **new), features

    def _ids_and_labels(self, clip: Clip, example: Example) -> tuple[list[int], list[int]]:
        """Every answer is to be learnt, those of the history too, but neither questions nor frames."""
        tokenizer = self.processor.tokenizer
        frames = self.processor.video_ids(clip, _prompt(example))
        text = _whole_text(example)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans, start = [], 0
        for answer in [*(answer for _, answer in example.history), example.answer]:
            start = text.index(f" {answer}", start)
            spans.append((start, start + 1 + len(answer)))
            start = spans[-1][1]
        labels = [
            token if any(first <= begin and end <= last for first, last in spans) else UNKNOWN
            for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        end_id = tokenizer.eos_token_id
        return [*frames, *encoded["input_ids"], end_id], [UNKNOWN] * len(frames) + labels + [end_id]

    def collate(self, rows: list[tuple]) -> dict[str, torch.Tensor]:
        """A batch for `TrainingModel.forward`."""
        drawn, features, ids, labels, are_numbered = zip(*rows, strict=True)
        names = ("cells", "places", "frames", "objects", "events")
        arrays = {name: [getattr(one, name) for one in drawn] for name in names}
        for name in ("frames", "objects", "events"):  # "vqa" and "base" give all frames one position: there is no order
            arrays[name] = [
                of_clip if is_numbered else np.full_like(of_clip, UNKNOWN)
                for of_clip, is_numbered in zip(arrays[name], are_numbered, strict=True)
            ]
        # Padded on the right, where a causal model needs no mask for it, which is faster.
        padding = {"input_ids": (ids, self.processor.tokenizer.eos_token_id), "labels": (labels, UNKNOWN)}
        return {
            **{name: pad_sequence([*map(torch.tensor, some)], True, value) for name, (some, value) in padding.items()},
            "video_features": torch.cat(features).float(),
            **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in arrays.items()},
        }
