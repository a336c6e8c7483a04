"""Plan a sweep before it runs: its cells, which settings are equivalent, and how long it may take."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from capkit.captioning import Captioner, Decoding, DecodingLike, SharedVideo
from capkit.cogvlm2 import DEFAULT_PROMPT, TEMPLATES, Prompt, PromptLike, is_out_of_memory
from capkit.files import read_regular
from capkit.runs import Item, check_fields, read_rows
from capkit.text import plain_text, plural, unknown_name
from capkit.video import Clip, FrameSampling, FrameSamplingLike, VideoError, load_clip

if TYPE_CHECKING:
    import pandas as pd

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
_FRAMES = {"num_frames": FrameSampling("chat").num_frames, "frames_per_second": None}  # defaults of FrameSampling
_WIDTHS = {"prompt": 40, "answer_prefix": 40}  # of labels, in characters; other axes have 100


@dataclass(frozen=True)
class Cell:
    """One combination of settings: a value for each axis."""

    prompt: Prompt
    decoding: Decoding
    frame_sampling: FrameSampling

    def sampled(self, sample: int) -> Decoding:
        """The decoding of a repeat. The first has the cell's seed; seeds of the others are derived from it.

        Consecutive seeds would be shared by cells whose seeds differ by less than the number of repeats.
        """
        if not self.decoding.samples or not sample:
            return self.decoding
        derived = np.random.SeedSequence([self.decoding.seed or 0, sample]).generate_state(1, np.uint64)
        return dataclasses.replace(self.decoding, seed=int(derived[0] >> np.uint64(11)))  # 53 bits: exact in any JSON

    def to_strings(self) -> dict[str, str]:
        """Each axis as short text; settings that have their default are left out."""
        decoding, sampling = self.decoding.to_dict(), self.frame_sampling.to_dict()
        frames = [f"{name}={sampling[name]}" for name, default in _FRAMES.items() if sampling[name] != default]
        max_new_tokens = decoding.pop("max_new_tokens")
        tokens = [f"{name}={_brief(value)}" for name, value in decoding.items() if (name, value) != ("seed", 0)]
        tokens += [f"max_new_tokens={max_new_tokens}"] if max_new_tokens != Decoding().max_new_tokens else []
        return {
            "prompt": self.prompt.title,
            "decoding": " ".join(tokens if self.decoding.samples else ["greedy", *tokens]),
            "frame_sampling": " ".join([self.frame_sampling.strategy, *frames]),
            "template": self.prompt.template,
            "frame_numbers": self.prompt.frame_numbers,
            "answer_prefix": self.prompt.answer_prefix,
        }

    def to_parameters(self) -> dict[str, Any]:
        """The settings as parameters of notebooks 01 and 02."""
        options = self.prompt.to_record()
        prompt = {name: options.pop(name) for name in ("prompt", "template")}
        plain = Prompt(template=self.prompt.template).to_record()
        prompt["prompt_options"] = {name: value for name, value in options.items() if value != plain.get(name)}
        return prompt | {"frame_sampling": self.frame_sampling.to_dict(), "decoding": self.decoding.to_dict()}


def _brief(value: Any) -> str:
    """A setting of a decoding, words in quotes without brackets around them."""
    if isinstance(value, dict):
        return ", ".join(f"{word!r}:{number:+g}" for word, number in value.items())
    return ", ".join(map(repr, value)) if isinstance(value, list) else str(value)


def _short_names(values: Sequence[str], names: dict[str, str], width: int) -> dict[str, str]:
    """The name of each value, or else its beginning; those that would look alike are numbered."""
    short = {value: names.get(value) or textwrap.shorten(value, width, placeholder=" ...") for value in values}
    count = Counter(short.values())
    return {
        value: f"{name} ({number})" if count[name] > 1 else name
        for number, (value, name) in enumerate(short.items(), 1)
    }


@dataclass(frozen=True)
class Source(Item):
    """A clip of a sweep: a file and a window in it, or frames in memory (`clip`)."""

    clip: Clip | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def values(self) -> dict[str, Any]:
        """As of `Item`; frames in memory have no file."""
        return super().values | (dict.fromkeys(("name", "folder", "video")) if self.is_in_memory_only else {})

    @property
    def is_in_memory_only(self) -> bool:
        """True if there is no file to read other frames from."""
        return self.clip is not None and self.clip.info.path is None


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do."""

    sources: tuple[Source, ...]
    cells: tuple[Cell, ...]
    """The first is the baseline."""
    num_samples: int = 1
    """Repeats of each cell whose decoding samples."""
    collapsed: tuple[str, ...] = ()
    """Descriptions of settings that were left out because they are equivalent to another cell."""

    @property
    def baseline(self) -> Cell:
        """The cell that others are compared with."""
        return self.cells[0]

    @property
    def num_captions(self) -> int:
        """Captions over all clips, cells and repeats."""
        return len(self.sources) * sum(map(self._num_samples, self.cells))

    def _num_samples(self, cell: Cell) -> int:
        return self.num_samples if cell.decoding.samples else 1

    def requests(self) -> Iterator[tuple[Source, Cell, int]]:
        """(clip, cell, number among its repeats) of each caption, clip by clip."""
        for source, cell in itertools.product(self.sources, self.cells):
            for sample in range(self._num_samples(cell)):
                yield source, cell, sample

    @functools.cached_property
    def labels(self) -> dict[Cell, str]:
        """A short unique name for each cell, of the axes that differ between cells."""
        strings = {cell: cell.to_strings() for cell in self.cells}
        names = {"prompt": {prompt: name for name, (prompt, _) in PROMPT_PRESETS.items()}}
        names["answer_prefix"] = {"": "no prefix"}
        values = {
            axis: [*dict.fromkeys(axes[axis] for axes in strings.values())] for axis in self.baseline.to_strings()
        }
        varying = [axis for axis in values if len(values[axis]) > 1] or ["prompt"]
        short = {axis: _short_names(values[axis], names.get(axis, {}), _WIDTHS.get(axis, 100)) for axis in varying}
        return {cell: " · ".join(short[axis][axes[axis]] for axis in varying) for cell, axes in strings.items()}

    def label(self, cell: Cell) -> str:
        """A cell's short name, from `labels`."""
        return self.labels[cell]

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: its axes, and its number of captions; `answer_prefix` only where cells have one."""
        import pandas as pd

        rows = [cell.to_strings() | {"captions": self._num_samples(cell) * len(self.sources)} for cell in self.cells]
        unused = [] if any(cell.prompt.answer_prefix for cell in self.cells) else ["answer_prefix"]
        return pd.DataFrame(rows).drop(columns=unused).rename_axis("cell")

    def __str__(self) -> str:
        counts = f"{plural(len(self.cells), 'cell')} x {plural(len(self.sources), 'clip')}: "
        counts += plural(self.num_captions, "caption")
        return "\n".join(map(plain_text, [counts, *(f"left out: {reason}" for reason in self.collapsed)]))

    def estimate_seconds(self, captioner: Captioner, timeout_seconds: float | None = 60.0) -> float | None:
        """An upper estimate of the sweep's duration, from captioning one clip in the first cell.

        It counts reading and encoding once per frame sampling and template, as the sweep does, but decoding as if each
        caption were written alone; together they take less. The clip is the first that can be captioned; None if none
        can, which the sweep records with the reasons.

        Args:
            captioner: from `load_captioner`.
            timeout_seconds: longest time to read one clip; None for no limit.
        """
        cell = self.baseline
        for source in self.sources:
            started = time.perf_counter()
            window = (source.start, source.end)
            try:
                clip = source.clip or load_clip(source.video, cell.frame_sampling, *window, timeout_seconds)
                video = SharedVideo(captioner, clip)
                list(video.caption([(cell.prompt, Decoding(max_new_tokens=1))]))
                prefilled = time.perf_counter()
                list(video.caption([(cell.prompt, cell.decoding)]))
            except (VideoError, OSError, ValueError, RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                continue
            decoding_seconds = time.perf_counter() - prefilled
            prefills = {(one.frame_sampling, one.prompt.template, one.prompt.frame_numbers) for one in self.cells}
            prefill_seconds = len(self.sources) * len(prefills) * (prefilled - started)
            return prefill_seconds + self.num_captions * decoding_seconds
        return None


def plan_sweep(
    clips: Any,
    prompts: Sequence[PromptLike] = (DEFAULT_PROMPT,),
    decodings: Sequence[DecodingLike] = ({},),
    frame_samplings: Sequence[FrameSamplingLike] = ("chat",),
    templates: Sequence[str] = ("chat",),
    frame_numbers: Sequence[str] = ("index",),
    num_samples: int = 1,
    mode: str = "grid",
    history: Sequence[tuple[str, str]] = (),
    max_captions: int = 10_000,
) -> SweepPlan:
    """Plan a sweep; no clip is read. Equivalent settings are merged into one cell, and reported.

    Args:
        clips: file names, items of `find_clips` (their own prompts are ignored), or `Clip`s; a list, or one of them.
        prompts: texts, names of PROMPT_PRESETS, lists of these that are asked one after another (`Prompt.steps`), or
            `Prompt`s or dictionaries of their fields, which keep their own template, history, frame numbers and answer
            prefix. They may hold fields such as `{name}`, which are filled clip by clip, see `capkit.runs.fields`.
        decodings: `Decoding`s, dictionaries of their fields, or of generate()'s arguments with `do_sample`.
        frame_samplings: `FrameSampling`s, names of strategies, or dictionaries with `strategy`, `num_frames`, ...
        templates, frame_numbers, history: fields of `Prompt`, for prompts given as texts.
        num_samples: repeats where a decoding samples, each with a seed of its own: see `Cell.sampled`.
        mode: "grid" crosses all axes; "one_at_a_time" changes one axis of the baseline, the first value of each.
        max_captions: larger plans are refused; raise it if you mean it.

    Raises:
        ValueError: an unknown setting, an empty axis, the same value twice in one, no clips, or more captions than
            `max_captions`, or a field of a prompt that a clip has no value for.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(map(repr, MODES))}")
    for name, number in (("num_samples", num_samples), ("max_captions", max_captions)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r}: must be a whole number of at least 1")
    axes = zip(AXES, (prompts, decodings, frame_samplings, templates, frame_numbers), strict=True)
    values = [_values(axis, given) for axis, given in axes]
    sources = tuple(map(_source, clips if isinstance(clips, (list, tuple)) else [clips]))
    if not sources:
        raise ValueError("clips: there are none")
    sizes = [*map(len, values)]
    num_cells = math.prod(sizes) if mode == "grid" else 1 + sum(size - 1 for size in sizes)
    if num_cells * num_samples * len(sources) > max_captions:
        raise ValueError(
            f"{num_cells} cells x {len(sources)} clips x up to {num_samples} samples are more than "
            f"max_captions={max_captions}: leave some out, or raise max_captions"
        )
    cells: dict[tuple[Any, ...], Cell] = {}
    collapsed: dict[str, None] = {}  # an ordered set
    for prompt, decoding, frame_sampling, template, numbers in _combinations(values, mode):
        has_no_effect = numbers == "seconds" and template in TEMPLATES and template != "chat"
        if not isinstance(prompt, Prompt):
            *steps, text = [prompt] if isinstance(prompt, str) else prompt
            prompt = Prompt(text, template, history, "index" if has_no_effect else numbers, steps=steps)
        decoding.check_prefix(prompt.answer_prefix)
        cell = Cell(prompt, decoding, frame_sampling)
        effective = (prompt, str(decoding.to_dict()), frame_sampling)  # no seed is seed 0
        if cells.setdefault(effective, cell) is cell:
            continue
        if has_no_effect:
            collapsed[f'frame_numbers="seconds" under template "{template}", which numbers no frames'] = None
        else:
            collapsed[f"{' · '.join(filter(None, cell.to_strings().values()))}, equivalent to another cell"] = None
    if len({cell.prompt.history for cell in cells.values()}) > 1:
        raise ValueError("prompts: differ in history, which no axis shows; make a sweep for each history")
    if num_samples > 1 and any(not cell.decoding.samples for cell in cells.values()):
        collapsed["repeats of cells that do not sample: each would be the same caption"] = None
    if len({cell.frame_sampling for cell in cells.values()}) > 1 and any(
        source.is_in_memory_only for source in sources
    ):
        raise ValueError("frame_samplings: other frames cannot be chosen for frames in memory; give the video file")
    for prompt in dict.fromkeys(cell.prompt for cell in cells.values()):
        check_fields(prompt, sources)
    return SweepPlan(sources, tuple(cells.values()), num_samples, tuple(collapsed))


def _values(axis: str, given: Any) -> list[Any]:
    """The values of an axis, checked and converted."""
    if isinstance(given, (str, dict, Prompt, Decoding, FrameSampling)):
        given = [given]
    if not isinstance(given, Iterable):
        raise ValueError(f"{axis}={given!r}: must be a list")
    values = list(given)
    if not values:
        raise ValueError(f"{axis}: is empty; leave it out for the default")
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{axis}: {value!r} is there twice")
    if axis == "decodings":
        return [*map(Decoding.of, values)]
    if axis == "frame_samplings":
        return [*map(FrameSampling.of, values)]
    if axis == "prompts":  # texts wait for their template
        presets = {name: text for name, (text, _) in PROMPT_PRESETS.items()}

        def named(value: Any) -> Any:
            if isinstance(value, (list, tuple)) and value:
                return [named(step) for step in value]
            return presets.get(value, value) if isinstance(value, str) else Prompt.of(value)

        return [*map(named, values)]
    return values


def _combinations(values: list[list[Any]], mode: str) -> Iterator[tuple[Any, ...]]:
    if mode == "grid":
        yield from itertools.product(*values)
        return
    first = tuple(axis_values[0] for axis_values in values)
    yield first
    for axis, axis_values in enumerate(values):
        yield from ((*first[:axis], value, *first[axis + 1 :]) for value in axis_values[1:])


def _source(clip: Any) -> Source:
    if isinstance(clip, (str, Path)):
        return Source(str(clip))
    if isinstance(clip, Clip):
        name = clip.info.path or f"frames in memory {hashlib.sha256(clip.frames.tobytes()).hexdigest()[:12]}"
        return Source(str(name), start=clip.start_seconds, end=clip.end_seconds, clip=clip)
    if isinstance(clip, Item):
        return Source(**vars(clip) | {"prompt": None})
    raise ValueError(f"clips: {clip!r} is neither a file name, nor an item of find_clips, nor a Clip")


def read_axes(path: str | Path) -> dict[str, Any]:
    """Read arguments of `plan_sweep` from a YAML or CSV file.

    YAML: a mapping from argument names to lists. CSV: a column for each axis, its values below each other, blank where
    it has no more; decodings and frame samplings as YAML, such as `{temperature: 0.8, seed: 1}` or `uniform`.

    Raises:
        ValueError: a file that cannot be read so, or names that `plan_sweep` does not have.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix.lower() == ".csv":
            rows = read_rows(path, "axes")
            if wrong := [f"{row.place}, {row.error}" for row in rows if row.error is not None]:
                raise ValueError(wrong[0])
            axes: Any = {
                name: [yaml.safe_load(cell) if name in AXES[1:3] else cell for row in rows if (cell := row.cells[name])]
                for name in (rows[0].cells if rows else ())
            }
        else:
            axes = yaml.safe_load(read_regular(path).decode("utf-8-sig"))
    except (OSError, UnicodeError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as axes: {error}") from error
    names = (*AXES, "num_samples", "mode", "history", "max_captions")
    if not isinstance(axes, dict) or not axes:
        raise ValueError(f"{path}: must be a mapping with any of {', '.join(names)}, not {axes!r}")
    if unknown := sorted(set(axes) - set(names), key=str):
        raise ValueError(f"{path}: {unknown_name('axis', unknown[0], names, 'there are')}")
    return axes
