"""Training data of the demo model: drawn clips with labels of what is where, a tokenizer, and the datasets."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from capkit.cogvlm2 import CogVLM2VideoProcessor, Prompt, pixels_to_frames, preprocess_frames
from capkit.demo.facts import Facts, see
from capkit.demo.random_scenes import make_scene
from capkit.demo.scenes import COLOURS, MOTIONS, PLAIN_COLOURS, SHAPES, SIZES, Scene, Thing, pick
from capkit.demo.wording import CAMERA, HAPPENS, MOVES, NUMBERS, Example, make_example, make_interview, make_steered
from capkit.video import Clip

T = TypeVar("T")

IMAGE_SIZE, PATCH_SIZE = 112, 14
CELLS = IMAGE_SIZE // PATCH_SIZE // 2  # cells a side: the bridge pools patches 2 x 2
EVENTS = ("nothing", "appears", "changes", "disappears")
CAMERA_MOTIONS = ("still", "left", "right")
UNKNOWN = -100  # cross_entropy's ignore_index
LABELS = ("cells", "places", "frames", "objects", "events")
# Llama-3's: words, digits in groups of at most three, punctuation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]


@dataclass(frozen=True)
class DrawnClip:
    """A scene as the model sees it, and its labels: indices into the lists of names, UNKNOWN where there is none.

    Attributes:
        clip: frames of (IMAGE_SIZE, IMAGE_SIZE), already cropped.
        facts: what can be seen.
        cells: int64 (T, CELLS * CELLS, 7): whether an object's middle is in the cell, its colour, its shape, its motion
            (from its third frame on), what has happened to it since the previous frame, its size (the last index for
            what grows or shrinks), and its place in the order in which texts name the objects.
        places: float32 (T, CELLS * CELLS, 6): x, y and diameter in cells, then the gain of each since the previous
            frame in quarters of a cell; NaN where there was no object.
        frames: int64 (T, 7): frame number, objects so far, camera, what happens in this frame, to which colour and
            shape, and whether it is the clip's first (1) or second event (2).
        objects: int64 (T, 3, 4): colour and shape of each object so far, in the order in which texts name them, and,
            from its third frame on, its size (the last index for what grows or shrinks) and motion.
        events: int64 (T, 2, 5): of the first and the second event so far, kind ("nothing" until it happens), number of
            its frame, colour, shape, and new colour.
    """

    clip: Clip
    facts: Facts
    cells: np.ndarray
    places: np.ndarray
    frames: np.ndarray
    objects: np.ndarray
    events: np.ndarray

    def without_pictures(self) -> DrawnClip:
        """All but the pixels, which take the memory."""
        return replace(self, clip=Clip.from_frames(self.clip.frames[:, :1, :1].copy(), self.clip.timestamps_seconds))


def draw_clip(seed: int, held_out: bool = False, any_background: bool = False) -> DrawnClip:
    """Draw the sampled frames of a scene of `make_scene`, cropped as the model will see them."""
    scene = make_scene(seed, held_out, any_background)
    clip = scene.sample("chat")
    frames = pixels_to_frames(preprocess_frames(clip.frames, IMAGE_SIZE))
    facts = see(scene, clip)
    cells, places, num_seen = _label_cells(scene, clip, facts)
    cropped = Clip.from_frames(frames, clip.timestamps_seconds)
    return DrawnClip(cropped, facts, cells, places, *_label_frames(facts, num_seen))


def _code(names: Sequence[str | None], name: str | None) -> int:
    return names.index(name) if name in names else UNKNOWN


_COLOURS, _SIZES = tuple(COLOURS), (*SIZES, None)


def _label_frames(facts: Facts, num_seen: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`frames`, `objects` and `events` of a DrawnClip."""
    count = len(facts.numbers)
    frames, objects = np.full((count, 7), UNKNOWN), np.full((count, 3, 4), UNKNOWN)
    frames[:, 0], frames[:, 1], frames[2:, 2] = np.arange(count), num_seen, _code(CAMERA_MOTIONS, facts.camera)
    frames[1:, 3], frames[1:, 6] = 0, 0
    for place, seen in enumerate(facts.objects):
        first = facts.numbers.index(seen.first)
        objects[first:, place, :2] = _COLOURS.index(seen.colour), SHAPES.index(seen.shape)
        objects[min(first + 2, count - 1) :, place, 2:] = _SIZES.index(seen.size), _code(MOTIONS, seen.motion)
    events = np.full((count, 2, 5), UNKNOWN)
    events[:, :, 0] = EVENTS.index("nothing")
    for place, event in enumerate(facts.events):
        number = facts.numbers.index(event.second)
        kind, colour, shape = EVENTS.index(event.kind), _COLOURS.index(event.colour), SHAPES.index(event.shape)
        frames[number, 3:] = kind, colour, shape, place + 1
        events[number:, place] = kind, number, colour, shape, _code(_COLOURS, event.new_colour)
    return frames, objects, events


def _label_cells(scene: Scene, clip: Clip, facts: Facts) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """`cells` and `places` of a DrawnClip, and the number of objects up to each frame."""
    cells = np.full((len(clip), CELLS * CELLS, 7), UNKNOWN)
    cells[..., 0] = 0
    places = np.full((len(clip), CELLS * CELLS, 6), np.nan, np.float32)
    order = [seen.pair for seen in facts.objects]
    first_looks: dict[Thing, tuple[int, str]] = {}  # first frame, colour in it
    before: dict[Thing, tuple[np.ndarray, int, str]] = {}  # in the previous frame: (x, y, diameter), cell, colour
    num_seen = []
    for frame, seconds in enumerate(clip.timestamps_seconds):
        now = {}
        for thing, colour, x, y, diameter in scene.visible(seconds):
            place = np.array([x, y, diameter]) * CELLS
            column, row = (min(max(int(length), 0), CELLS - 1) for length in place[:2])
            first, first_colour = first_looks.setdefault(thing, (frame, colour))
            cell, rank = row * CELLS + column, order.index((first_colour, thing.shape))
            now[thing] = (place, cell, colour)
            cells[frame, cell, :3] = 1, _COLOURS.index(colour), SHAPES.index(thing.shape)
            if frame >= first + 1:  # before, half of its neighbours are yet to come
                cells[frame, cell, 6] = rank
            if frame >= first + 2:
                cells[frame, cell, 3] = _code(MOTIONS, facts.objects[rank].motion)
                cells[frame, cell, 5] = _SIZES.index(facts.objects[rank].size)
            places[frame, cell, :3] = place
            if thing in before:
                places[frame, cell, 3:] = 4 * (place - before[thing][0])
            if frame > 0:
                event = "appears" if thing not in before else "nothing" if before[thing][2] == colour else "changes"
                cells[frame, cell, 4] = EVENTS.index(event)
        for thing in before.keys() - now.keys():
            if not cells[frame, before[thing][1], 0]:
                cells[frame, before[thing][1], 4] = EVENTS.index("disappears")
        num_seen.append(len(first_looks))
        before = now
    return cells, places, num_seen


def draw_clips(
    seeds: Sequence[int], held_out: bool = False, num_workers: int = 2, any_background: bool = False
) -> list[DrawnClip]:
    """Draw many clips, in worker processes; with `any_background` every second in front of any colour."""
    plain = [any_background and bool(seed % 2) for seed in seeds]
    return in_processes(draw_clip, num_workers, seeds, [held_out] * len(seeds), plain)


def in_processes(function: Callable[..., T], num_workers: int, *arguments: Sequence[Any]) -> list[T]:
    """`map` in worker processes; in this one if there is one worker."""
    if num_workers < 2:
        return list(map(function, *arguments))
    context = multiprocessing.get_context("spawn")
    # One torch thread each, or they would compete for the cores.
    with ProcessPoolExecutor(num_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, *arguments, chunksize=100))


def train_tokenizer(clips: Sequence[DrawnClip], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts about clips, with Llama-3's special tokens and splitting of digits."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    rng = np.random.default_rng(0)
    examples = [make_example(drawn.facts, rng) for drawn in clips for _ in range(4)]
    texts = [f"{_prompt(example).full_text} {example.answer}" for example in examples]
    texts += 20 * [str(number) for number in range(100)]
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos, pad, _ = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, model_max_length=2048)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.pad_token, fast.padding_side = pad, "left"
    return fast


def content_tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """bool (vocabulary,): True for tokens of words that say what is seen, False for all other wording."""
    wordings = [*COLOURS, *SHAPES, *SIZES, *NUMBERS, *MOTIONS, *map(str, range(13)), "yes"]
    wordings += [wording for kinds in (MOVES, CAMERA, HAPPENS) for phrases in kinds.values() for wording in phrases]
    wordings += [*PLAIN_COLOURS, "meadow striped checkered nothing"]
    words = {word for wording in wordings for word in wording.split()}
    words -= {"a", "the", "to", "in", "is", "not", "does", "of", "and", "{}"}
    forms = [form for word in words for form in (word, f" {word}", f" {word.capitalize()}", word.capitalize())]
    is_content = torch.zeros(len(tokenizer), dtype=torch.bool)
    is_content[[token for ids in tokenizer(forms, add_special_tokens=False)["input_ids"] for token in ids]] = True
    return is_content


def _prompt(example: Example) -> Prompt:
    return Prompt(example.prompt, example.template, example.history)


Row = tuple[DrawnClip, torch.Tensor, list[int], list[int], bool]
"""A clip, features of its frames, token ids, labels, and whether its frames are numbered."""


class Examples(torch.utils.data.Dataset):
    """Clips, each with a prompt and an answer, worded anew every time.

    Args:
        clips: from `draw_clips`.
        features: of each clip's frames, (T, tokens_per_frame, hidden_size), from the vision tower.
        processor: of the model in training.
        misheard: share of the colours in answers that are replaced in the input, but not in the labels, by a colour of
            nothing in the clip: or the model would learn never to say a colour with a shape that training does not
            show it with.
        grey: features of a grey frame, (tokens_per_frame, hidden_size). If given, it replaces one frame in every fourth
            clip: or a frame that attribution leaves out would look to the model as if everything vanished.
        interviews: share of clips with several questions in a row, from `make_interview`.
        steered: share of the other clips with a begun answer or a chain of prompts, from `make_steered`.
    """

    def __init__(
        self,
        clips: Sequence[DrawnClip],
        features: Sequence[torch.Tensor],
        processor: CogVLM2VideoProcessor,
        misheard: float = 0.0,
        grey: torch.Tensor | None = None,
        interviews: float = 0.0,
        steered: float = 0.0,
    ):
        self.clips, self.features, self.processor = clips, features, processor
        self.misheard, self.grey, self.interviews, self.steered = misheard, grey, interviews, steered
        self.random = np.random.default_rng(0)
        self.next_rows: dict[int, Row] = {}
        ids = processor.tokenizer([f" {colour}" for colour in COLOURS], add_special_tokens=False)["input_ids"]
        self.colour_ids = {colour: one[0] for colour, one in zip(COLOURS, ids, strict=True) if len(one) == 1}

    def __len__(self) -> int:
        return len(self.clips)

    def length(self, index: int) -> int:
        """Number of tokens of the row that comes next for this index."""
        self.next_rows[index] = self._make_row(index)
        return len(self.next_rows[index][2])

    def __getitem__(self, index: int) -> Row:
        return self.next_rows.pop(index, None) or self._make_row(index)

    def _make_row(self, index: int) -> Row:
        drawn, features = self.clips[index], self.features[index]
        if self.interviews and self.random.random() < self.interviews:
            example = make_interview(drawn.facts, self.random)
        elif self.steered and self.random.random() < self.steered:
            example = make_steered(drawn.facts, self.random)
        else:
            example = make_example(drawn.facts, self.random)
        ids, labels = self._ids_and_labels(drawn.clip, example)
        if self.misheard:
            there = {seen.colour for seen in drawn.facts.objects} | {event.new_colour for event in drawn.facts.events}
            absent = [token for colour, token in self.colour_ids.items() if colour not in there]
            for place, label in enumerate(labels):
                if absent and label in self.colour_ids.values() and self.random.random() < self.misheard:
                    ids[place] = pick(self.random, absent)
        is_numbered = example.template == "chat"
        if self.grey is not None and is_numbered and self.random.random() < 0.25:
            drawn, features = self._without_a_frame(drawn, features, self.grey)
        return drawn, features, ids, labels, is_numbered

    def _without_a_frame(
        self, drawn: DrawnClip, features: torch.Tensor, grey: torch.Tensor
    ) -> tuple[DrawnClip, torch.Tensor]:
        """One frame grey, without labels, and the following one without labels of what is new in it."""
        this = int(self.random.integers(len(features)))
        following, features = slice(this + 1, this + 2), features.clone()
        features[this] = grey
        labels = {name: getattr(drawn, name).copy() for name in LABELS}
        labels["cells"][this], labels["cells"][following, :, 4] = UNKNOWN, UNKNOWN
        labels["places"][this], labels["places"][following, :, 3:] = np.nan, np.nan
        labels["frames"][this, 1:], labels["frames"][following, 3:] = UNKNOWN, UNKNOWN
        labels["objects"][this], labels["events"][this] = UNKNOWN, UNKNOWN
        return replace(drawn, **labels), features

    def _ids_and_labels(self, clip: Clip, example: Example) -> tuple[list[int], list[int]]:
        """Token ids, and labels: all answers, those of the history too, but neither questions, frames nor prefixes."""
        tokenizer = self.processor.tokenizer
        prompt = _prompt(example)
        frames, text = self.processor.video_ids(clip, prompt), f"{prompt.full_text} {example.answer}"
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans, end = [], 0
        for answer in [*(answer for _, answer in example.history), example.answer]:
            start = text.index(f" {answer}", end)
            end = start + 1 + len(answer)
            spans.append((start, end))
        if example.answer_prefix:
            spans[-1] = (start + 1 + len(example.answer_prefix), end)
        labels = [
            token if any(first <= begin and end <= last for first, last in spans) else UNKNOWN
            for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        eos = tokenizer.eos_token_id
        return [*frames, *encoded["input_ids"], eos], [UNKNOWN] * len(frames) + labels + [eos]

    def collate(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """A batch for `TrainingModel.forward`."""
        drawn, features, ids, labels, are_numbered = zip(*rows, strict=True)
        # Padded on the right, where a causal model needs no mask, which is faster.
        eos = self.processor.tokenizer.eos_token_id
        batch = {
            "input_ids": pad_sequence([*map(torch.tensor, ids)], batch_first=True, padding_value=eos),
            "labels": pad_sequence([*map(torch.tensor, labels)], batch_first=True, padding_value=UNKNOWN),
            "video_features": torch.cat(features).float(),
        }
        for name in LABELS:
            arrays = [getattr(clip, name) for clip in drawn]
            if name not in ("cells", "places"):  # frames of "vqa" and "base" all have one position: no order
                arrays = [
                    array if is_numbered else np.full_like(array, UNKNOWN)
                    for array, is_numbered in zip(arrays, are_numbered, strict=True)
                ]
            batch[name] = torch.from_numpy(np.concatenate(arrays))
        return batch
