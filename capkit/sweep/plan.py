"""What a sweep will do, before it does it: cells, what collapses, how long it may take."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from capkit.captioning import Captioner, Decoding, SharedVideo
from capkit.cogvlm2 import DEFAULT_PROMPT, TEMPLATES, Prompt
from capkit.video import Clip, FrameSampling, load_clip

PROMPT_PRESETS = {
    "default": (DEFAULT_PROMPT, "what CogVideoX's training captions were written with"),
    "sentence": ("Describe this video in one sentence.", "captions that fit any text encoder"),
    "paragraph": (
        "Describe this video in one paragraph of at most 100 words.",
        "detail that stays within CogVideoX's 226 T5 tokens",
    ),
    "visible": (
        "Describe only what can be seen in this video. Do not guess at moods or meanings.",
        "against mood sentences and inventions",
    ),
    "motion": (
        "Describe how the subjects and the camera move in this video, in the order of time.",
        "what video models need and captions often lack",
    ),
    "objects": ("List the objects in this video.", "checking what the model has seen at all"),
}
"""Name: (prompt, what it is for). "default" is the original tool's; the others are starting points to be compared."""

AXES = ("prompts", "decodings", "frame_samplings", "templates", "frame_numbers")
MODES = ("grid", "one_at_a_time")


@dataclass(frozen=True)
class Cell:
    """One way of captioning: a value for each axis."""

    prompt: Prompt
    decoding: Decoding
    frame_sampling: FrameSampling

    def sampled(self, sample: int) -> Decoding:
        """The decoding of a repeat: its seed is `sample` higher."""
        if not self.decoding.samples:
            return self.decoding
        return dataclasses.replace(self.decoding, seed=(self.decoding.seed or 0) + sample)

    def to_strings(self) -> dict[str, str]:
        """Its axes in words."""
        sampling, decoding = self.frame_sampling, self.decoding.to_dict()
        parts = {"num_frames": sampling.num_frames, "frames_per_second": sampling.frames_per_second}
        told = [f"{name}={value}" for name, value in parts.items() if value != getattr(FrameSampling("chat"), name)]
        longest = decoding.pop("max_new_tokens")
        how = [f"{name}={value}" for name, value in decoding.items() if (name, value) != ("seed", 0)]
        how += [f"max_new_tokens={longest}"] if longest != Decoding().max_new_tokens else []
        return {
            "prompt": self.prompt.text,
            "decoding": " ".join(how if self.decoding.samples else ["greedy", *how]),
            "frame_sampling": " ".join([sampling.strategy, *told]),
            "template": self.prompt.template,
            "frame_numbers": self.prompt.frame_numbers,
        }

    def to_parameters(self) -> dict[str, Any]:
        """Its settings as parameters of `notebooks/01_caption_clips.ipynb`."""
        return {
            "prompt": self.prompt.text,
            "template": self.prompt.template,
            "frame_sampling": self.frame_sampling.to_dict(),
            "frame_numbers": self.prompt.frame_numbers,
            "decoding": self.decoding.to_dict(),
        }


@dataclass(frozen=True)
class Source:
    """A clip of a sweep: a file and a window in it, or frames in memory."""

    video: str
    start_seconds: float = 0.0
    end_seconds: float | None = None
    clip: Clip | None = dataclasses.field(default=None, compare=False, repr=False)
    reference: str | None = dataclasses.field(default=None, compare=False)
    """A caption to compare with."""

    @property
    def is_in_memory_only(self) -> bool:
        """True where no file has more of it."""
        return self.clip is not None and self.clip.info.path is None


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do.

    Attributes:
        sources: the clips.
        cells: the first is the baseline.
        num_samples: repeats of each cell whose decoding samples.
        collapsed: in words, which settings would only repeat another cell.
    """

    sources: tuple[Source, ...]
    cells: tuple[Cell, ...]
    num_samples: int = 1
    collapsed: tuple[str, ...] = ()

    @property
    def baseline(self) -> Cell:
        """The cell that others are compared with."""
        return self.cells[0]

    @property
    def num_captions(self) -> int:
        """Over all clips, cells and repeats."""
        return len(self.sources) * sum(self.num_samples if cell.decoding.samples else 1 for cell in self.cells)

    def requests(self) -> Iterator[tuple[Source, Cell, int]]:
        """(clip, cell, number among its repeats) of each caption, clip by clip."""
        for source, cell in itertools.product(self.sources, self.cells):
            for sample in range(self.num_samples if cell.decoding.samples else 1):
                yield source, cell, sample

    def label(self, cell: Cell) -> str:
        """A short name that tells the cell from the others: what differs between cells, and no more."""
        names, own = [one.to_strings() for one in self.cells], cell.to_strings()
        varying = [axis for axis in own if len({name[axis] for name in names}) > 1] or ["prompt"]
        presets = {prompt: name for name, (prompt, _) in PROMPT_PRESETS.items()}
        prompts = dict.fromkeys(name["prompt"] for name in names)
        short = {text: presets.get(text) or textwrap.shorten(text, 40, placeholder=" ...") for text in prompts}
        prompt = short[cell.prompt.text]
        if list(short.values()).count(prompt) > 1:
            prompt = f"{prompt} ({list(short).index(cell.prompt.text) + 1})"
        return " · ".join((own | {"prompt": prompt})[axis] for axis in varying)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: its axes, and how many captions it asks for."""
        rows = [cell.to_strings() | {"captions": self._num_samples(cell) * len(self.sources)} for cell in self.cells]
        return pd.DataFrame(rows).rename_axis("cell")

    def _num_samples(self, cell):
        return self.num_samples if cell.decoding.samples else 1

    def __str__(self) -> str:
        told = f"{len(self.cells)} cells x {len(self.sources)} clips: {self.num_captions} captions"
        return "\n".join([told, *(f"left out: {reason}" for reason in self.collapsed)])

    def estimate_seconds(self, captioner: Captioner) -> float:
        """About how long the sweep may take at most, from captioning the first clip in the first cell.

        Frames are read and encoded once for each frame sampling and template, as the sweep does. Words are counted as
        if each branch were written alone; together they take less.

        Raises:
            VideoError: the first clip cannot be read.
        """
        source, cell = self.sources[0], self.baseline
        started = time.perf_counter()
        window = (source.start_seconds, source.end_seconds)
        clip = source.clip or load_clip(source.video, cell.frame_sampling, *window)
        video = SharedVideo(captioner, clip)
        list(video.caption([(cell.prompt, Decoding(max_new_tokens=1))]))
        read = time.perf_counter() - started
        list(video.caption([(cell.prompt, cell.decoding)]))
        words = time.perf_counter() - started - read
        groups = {(one.frame_sampling, one.prompt.template, one.prompt.frame_numbers) for one in self.cells}
        return len(self.sources) * len(groups) * read + self.num_captions * words


def plan_sweep(
    clips: Sequence,
    prompts: Sequence[str | Prompt | dict[str, Any]] = (DEFAULT_PROMPT,),
    decodings: Sequence[Decoding | dict] = ({},),
    frame_samplings: Sequence[FrameSampling | str | dict] = ("chat",),
    templates: Sequence[str] = ("chat",),
    frame_numbers: Sequence[str] = ("index",),
    num_samples: int = 1,
    mode: str = "grid",
    history: Sequence[tuple[str, str]] = (),
    max_captions: int = 10_000,
) -> SweepPlan:
    """Plan a sweep: nothing is read or run.

    Args:
        clips: file names, items of `find_clips` (their own prompts are left aside), or `Clip`s.
        prompts: texts, names of PROMPT_PRESETS, or `Prompt`s, which keep their own template, history and frame numbers.
        decodings: `Decoding`s, dictionaries of their fields, or of generate()'s arguments with `do_sample`.
        frame_samplings: `FrameSampling`s, names of strategies, or dictionaries with `strategy`, `num_frames`, ...
        templates, frame_numbers: fields of `Prompt`, for prompts given as texts.
        num_samples: repeats, with one seed after the other, where a decoding samples.
        mode: "grid" crosses all axes; "one_at_a_time" changes one axis of the baseline, the first value of each.
        history: earlier turns, for prompts given as texts.
        max_captions: refuse plans of more; raise it if you mean it.

    Raises:
        ValueError: an unknown setting, an empty axis, the same value twice in one, no clips, or more captions than
            `max_captions`.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(map(repr, MODES))}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples={num_samples!r}: must be a whole number of at least 1")
    given = dict(zip(AXES, (prompts, decodings, frame_samplings, templates, frame_numbers), strict=True))
    values = {axis: _values(axis, asked) for axis, asked in given.items()}
    sources = tuple(map(_source, clips if isinstance(clips, (list, tuple)) else [clips]))
    if not sources:
        raise ValueError("clips: there are none")
    num_cells = 1
    for asked in values.values():
        num_cells = num_cells * len(asked) if mode == "grid" else num_cells + len(asked) - 1
    if num_cells * num_samples * len(sources) > max_captions:
        raise ValueError(
            f"{num_cells} cells x {len(sources)} clips x up to {num_samples} samples are more than "
            f"max_captions={max_captions}: leave some out, or raise max_captions"
        )
    cells, collapsed = [], []
    for combination in _combinations(list(values.values()), mode):
        prompt, decoding, frame_sampling, template, numbers = combination
        has_no_effect = numbers == "seconds" and template in TEMPLATES and template != "chat"
        if not isinstance(prompt, Prompt):
            prompt = Prompt(prompt, template, history, "index" if has_no_effect else numbers)
        cell = Cell(prompt, decoding, frame_sampling)
        if has_no_effect:
            reason = f'frame_numbers="seconds" under template "{template}", which numbers no frames'
        else:
            reason = f"{' · '.join(cell.to_strings().values())}, the same once more"
        if cell not in cells:
            cells.append(cell)
        elif reason not in collapsed:
            collapsed.append(reason)
    if num_samples > 1 and any(not cell.decoding.samples for cell in cells):
        collapsed.append("repeats of cells that do not sample: each would be the same caption")
    plan = SweepPlan(sources, tuple(cells), num_samples, tuple(collapsed))
    if len({cell.frame_sampling for cell in cells}) > 1 and any(source.is_in_memory_only for source in sources):
        raise ValueError("frame_samplings: frames in memory are what they are; give a file to choose others of it")
    return plan


def _values(axis, asked):
    """An axis's values, checked and made into what they mean."""
    if isinstance(asked, (str, dict, Prompt, Decoding, FrameSampling)):
        asked = [asked]
    asked = list(asked)
    if not asked:
        raise ValueError(f"{axis}: is empty; leave it out for the default")
    for number, value in enumerate(asked):
        if value in asked[:number]:
            raise ValueError(f"{axis}: {value!r} is there twice")
    if axis == "prompts":
        return [_prompt_or_text(value) for value in asked]
    make = {"decodings": Decoding.of, "frame_samplings": FrameSampling.of}.get(axis, lambda value: value)
    return [make(value) for value in asked]


def _prompt_or_text(value: str | Prompt | dict[str, Any]) -> str | Prompt:
    """A preset's name becomes its text, a dictionary a `Prompt`."""
    if isinstance(value, dict):
        return Prompt.of(value)
    return PROMPT_PRESETS[value][0] if isinstance(value, str) and value in PROMPT_PRESETS else value


def _combinations(values, mode):
    if mode == "grid":
        yield from itertools.product(*values)
        return
    first = [asked[0] for asked in values]
    yield tuple(first)
    for place, asked in enumerate(values):
        for value in asked[1:]:
            yield (*first[:place], value, *first[place + 1 :])


def _source(clip) -> Source:
    if isinstance(clip, (str, Path)):
        return Source(str(clip))
    if isinstance(clip, Clip):
        name = clip.info.path or f"frames in memory {hashlib.sha256(clip.frames.tobytes()).hexdigest()[:12]}"
        return Source(str(name), clip.start_seconds, clip.end_seconds, clip)
    try:
        return Source(str(clip.video), float(clip.start), clip.end, reference=clip.reference)
    except AttributeError:
        raise ValueError(f"clips: {clip!r} is neither a file name, nor an item of find_clips, nor a Clip") from None


def read_axes(path: str | Path) -> dict[str, Any]:
    """Arguments of `plan_sweep` from a file.

    YAML: a mapping of its arguments' names to lists. CSV: a column for each axis, its values one below the other, blank
    where it has no more; decodings and frame samplings as YAML, such as `{temperature: 0.8, seed: 1}` or `uniform`.

    Raises:
        ValueError: a file that cannot be read so, or names that `plan_sweep` does not know.
    """
    path = Path(path).expanduser()
    known = (*AXES, "num_samples", "mode", "history", "max_captions")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                rows = list(csv.DictReader(file))
                axes = {
                    name: [yaml.safe_load(row[name]) if name in AXES[1:3] else row[name] for row in rows if row[name]]
                    for name in (rows[0] if rows else ())
                }
            else:
                axes = yaml.safe_load(file)
    except (OSError, ValueError, TypeError, csv.Error, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as axes: {error}") from error
    if not isinstance(axes, dict) or not axes or set(axes) - set(known):
        told = sorted(set(axes) - set(known), key=str) if isinstance(axes, dict) else axes
        raise ValueError(f"{path}: unknown {told!r}; a mapping of these is wanted: {', '.join(known)}")
    return axes
