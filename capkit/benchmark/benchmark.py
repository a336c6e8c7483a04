"""How fast is capkit here? Each figure beside a plain baseline in the same run, on a random model of a chosen size.

    python -m capkit.benchmark --size small --out results.json

needs no download, no notebook and no video library; parts that lack theirs are left out, and said to be. Notebook 06
explains the figures.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from capkit.benchmark.measuring import (
    PeakMemory,
    StepTimes,
    describe_machine,
    measure_limits,
    profile_of,
    seconds_of,
    take_turns,
)
from capkit.benchmark.models import DECODINGS, PROMPTS, SIZES, make_captioner, make_clip, plain_caption, plain_pixels
from capkit.benchmark.results import describe
from capkit.benchmark.video import measure_reading
from capkit.captioning import EAGER_BATCHES, STATIC_DEVICES, Decoding, RoomyCache, SharedVideo, load_captioner, read_ids
from capkit.cogvlm2 import Prompt, preprocess_frames

SWEEPS = (4, 8)  # so many prompts x so many decodings
NUM_CLIPS = 8  # different ones; larger batches repeat them
PROFILED_ROWS = 8  # of the decoding step that is profiled


class Benchmark:
    """One run: `parts()` measure, a row each figure.

    Args:
        size: a name of `SIZES`.
        device, dtype: as in `load_captioner`.

    Attributes:
        rows: dictionaries of `part`, `name`, `baseline` (what it is), `unit`, `baseline_value`, `value`, `ratio`
            (baseline_value / value, so that more is better), `equal` (how much of the outcome is the baseline's), and
            further figures by their names.
        skipped: what was left out, and why.
        profile: where the time of each stage goes: `stage`, `way`, `operation`, `calls`, `seconds`, `share`.

    Raises:
        ValueError: unknown size, device or dtype.
        CheckpointError: the model does not fit into memory.
    """

    def __init__(self, size: str, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"):
        if size not in SIZES:
            raise ValueError(f"size={size!r}: must be one of {', '.join(map(repr, SIZES))}")
        self.name, self.size = size, SIZES[size]
        self.plain, self.captioner = make_captioner(self.size, device, dtype)
        self.device, self.processor = self.plain.device, self.captioner.processor
        self.clips = [make_clip(self.size, seed) for seed in range(NUM_CLIPS)]
        self.machine = describe_machine(self.device)
        self.limits = measure_limits(self.device, self.plain.dtype)
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.profile: list[dict[str, Any]] = []
        self._captioned = None  # by _both_ways

    def parts(self) -> dict[str, Callable[[], None]]:
        """What can be measured, by name, in a sensible order."""
        names = ("reading", "preprocessing", "stages", "captions", "batches", "sweeps", "loading", "profiling")
        return {name: getattr(self, f"_{name}") for name in names}

    def run(self, parts: Sequence[str] = (), out: str | Path | None = None) -> dict[str, Any]:
        """Measure, and write what is known after each part.

        Args:
            parts: some of `parts()`; none for all.
            out: a JSON file.

        Returns:
            The results, as in the file.

        Raises:
            ValueError: no such part.
        """
        known = self.parts()
        if unknown := [part for part in parts if part not in known]:
            raise ValueError(f"parts={unknown!r}: known are {', '.join(known)}")
        for part in parts or known:
            count = len(self.rows)
            with torch.inference_mode():
                known[part]()
            for row in self.rows[count:]:
                row["part"] = part
                print(describe(row), flush=True)
            if out:
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                Path(out).write_text(json.dumps(self.results(), indent=1) + "\n", encoding="utf-8")
        return self.results()

    def results(self) -> dict[str, Any]:
        """All that is known: `size`, `command`, `machine`, `model`, `limits`, `rows`, `skipped`, `profile`."""
        parameters = sum(weight.numel() for weight in self.plain.parameters())
        return {
            "size": self.name,
            "command": f"python -m capkit.benchmark --size {self.name}",
            "machine": self.machine,
            "model": {
                "parameters": parameters,
                "dtype": self.captioner.dtype,
                "num_tokens": self.size.num_tokens,
                "prompt_positions": len(self._ids()),
                "bytes_read_per_token": self._bytes_per_step(0),
            },
            "limits": self.limits,
            "rows": self.rows,
            "skipped": self.skipped,
            "profile": self.profile,
        }

    def _add(self, name, baseline, unit, baseline_value, value, equal="", **more):
        row = {"part": "", "name": name, "baseline": baseline, "unit": unit, "baseline_value": baseline_value}
        self.rows.append(row | {"value": value, "ratio": baseline_value / value, "equal": equal} | more)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _reading(self):
        try:
            rows = measure_reading(self.size.num_minutes, self.size.num_frames, self.size.repeats)
        except ImportError as error:
            self.skipped.append({"part": "reading", "why": str(error)})
            print(f"reading: left out, {error}")
            return
        for row in rows:
            self._add(**row)

    def _preprocessing(self):
        height, width = self.size.large_frame
        image_size, frames = self.processor.image_size, make_clip(self.size, 0, (height, width)).frames
        ways = {"plain": partial(plain_pixels, frames, image_size)}
        ways |= {"capkit": partial(preprocess_frames, frames, image_size)}
        seconds = _medians(take_turns(ways, self.size.repeats, torch.device("cpu")))
        memory = {name: _peak_mb(way, torch.device("cpu")) for name, way in ways.items()}
        difference = (ways["plain"]() - ways["capkit"]()).abs().max()
        told = f"{len(frames)} frames of {width} x {height}"
        against, equal = "normalised at full size", f"to {difference:.0e}"
        self._add(f"preprocess {told}", against, "s", seconds["plain"], seconds["capkit"], equal)
        self._add_memory("extra memory to preprocess them", against, memory["plain"], memory["capkit"], equal)

    def _stages(self):
        pixels = preprocess_frames(self.clips[0].frames, self.processor.image_size).to(self.device)
        features = self.plain.model.get_video_features(pixels)
        ids, model = self._ids(), self.captioner.model
        stages = {
            f"vision tower, {len(pixels)} frames": (
                partial(self.plain.model.get_video_features, pixels),
                partial(model.model.get_video_features, pixels),
            ),
            f"prefill, {len(ids)} positions": (
                partial(_prefill, self.plain, DynamicCache, ids, features),
                partial(_prefill, model, RoomyCache, ids, features),
            ),
        }
        for name, (plain, quick) in stages.items():
            seconds = _medians(take_turns({"plain": plain, "capkit": quick}, self.size.repeats, self.device))
            with FlopCounterMode(display=False) as counter:
                outcome = plain()
            difference = (outcome - quick()).abs().max() / outcome.std()
            gflops = counter.get_total_flops() / seconds["capkit"] / 1e9
            more = {"gflops": gflops, "share_of_matmul": gflops / self.limits["matmul_gflops"]}
            equal = f"to {difference:.0e} of the spread"
            self._add(name, "the same model in transformers", "s", *seconds.values(), equal, **more)

    def _captions(self):
        (tokens, baseline, step), (found, seconds, steps) = self._both_ways()
        num_tokens, clip, equal = self.size.num_tokens, self.clips[0], _num_equal(found, tokens)
        more = {"num_tokens": sum(map(len, found)), "num_captions": len(found), "captions_an_hour": 3600 / seconds}
        self._add(f"one caption of {num_tokens} tokens", PLAIN, "s", baseline, seconds, equal, **more)
        first = statistics.median(seconds_of(self._first_words, self.device)[0] for _ in range(self.size.repeats))
        self._add("its first words, as a stream", "the whole caption: nothing shows before", "s", baseline, first)
        self._add_decoding(1, step, steps, equal)
        memory = [_peak_mb(partial(way, clip), self.device) for way in (self._plain_caption, self._quick_caption)]
        self._add_memory("extra memory for one caption", PLAIN, *memory, equal)

    def _batches(self):
        (tokens, baseline, step), _ = self._both_ways()
        for count in self.size.batches:
            clips = [self.clips[number % NUM_CLIPS] for number in range(count)]
            self._warm_up(lambda clips=clips: self._timed_batch(clips))
            with StepTimes(self.captioner.model) as steps, PeakMemory(self.device) as memory:
                runs = [self._timed_batch(clips) for _ in range(self.size.repeats if count <= NUM_CLIPS else 1)]
            seconds = statistics.median(seconds for seconds, _ in runs)
            found = [caption.token_ids for caption in runs[0][1]]
            equal = _num_equal(found, [tokens[number % NUM_CLIPS] for number in range(count)])
            more = {"num_tokens": sum(map(len, found)), "num_captions": count}
            more |= {"captions_an_hour": 3600 * count / seconds, "peak_mb": memory.num_bytes / 1e6}
            name = f"{count} clips in a batch, {self.size.num_tokens} tokens each"
            self._add(name, f"{count} x {PLAIN}", "s", count * baseline, seconds, equal, **more)
            self._add_decoding(count, step, steps.seconds, equal)

    def _add_decoding(self, count, plain_step, step, equal):
        rate = count / step
        limit = count * self.limits["copied_gb_per_second"] * 1e9 / self._bytes_per_step(count)
        more = {"tokens_per_second": rate, "limit_tokens_per_second": limit, "share_of_bandwidth": rate / limit}
        name = f"a token while decoding, {count} together"
        self._add(name, "plain, one clip", "s", plain_step, step / count, equal, **more)

    def _sweeps(self):
        decodings = [Decoding(max_new_tokens=self.size.num_sweep_tokens, **settings) for settings in DECODINGS]
        clip, plain = self.clips[0], {}
        plain_caption(self.plain, self.processor, clip, PROMPTS[0], Decoding(max_new_tokens=2))
        for side in SWEEPS:
            cells = [(prompt, decoding) for prompt in PROMPTS[:side] for decoding in decodings[:side]]
            for cell in cells:
                if cell not in plain:
                    plain[cell] = seconds_of(
                        partial(plain_caption, self.plain, self.processor, clip, *cell), self.device
                    )
            branches = [(Prompt(text), decoding) for text, decoding in cells]
            runs = [
                seconds_of(lambda todo=branches: list(SharedVideo(self.captioner, clip).caption(todo)), self.device)
                for _ in range(self.size.repeats)
            ]
            baseline, seconds = (sum(plain[cell][0] for cell in cells), statistics.median(one for one, _ in runs))
            found = [caption.token_ids for caption in runs[0][1]]
            more = {"num_tokens": sum(map(len, found)), "num_captions": len(cells)}
            more |= {"captions_an_hour": 3600 * len(cells) / seconds}
            equal = _num_equal(found, [plain[cell][1] for cell in cells])
            name = f"sweep of {len(cells)} cells, {self.size.num_sweep_tokens} tokens each"
            self._add(name, f"{len(cells)} captions, nothing shared", "s", baseline, seconds, equal, **more)

    def _loading(self):
        num_bytes = sum(weight.nbytes for weight in self.plain.parameters())
        with tempfile.TemporaryDirectory() as folder:
            if shutil.disk_usage(folder).free < 1.2 * num_bytes:
                self.skipped.append({"part": "loading", "why": f"no {num_bytes / 1e9:.0f} GB of disk to write it to"})
                return
            self.captioner.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            device = str(self.device)
            ways = {
                "plain": lambda: [load_file(path, device=device) for path in Path(folder).glob("*.safetensors")],
                "capkit": lambda: load_captioner(folder, device=self.device, dtype=self.plain.dtype),
            }
            seconds = _medians(take_turns(ways, self.size.repeats, self.device))
        told, against = f"load {num_bytes / 1e9:.2f} GB, checked, from a warm disk", "safetensors' load_file alone"
        self._add(told, against, "s", *seconds.values())

    def _profiling(self):
        pixels = preprocess_frames(self.clips[0].frames, self.processor.image_size).to(self.device)
        features, ids = self.plain.model.get_video_features(pixels), self._ids()
        for way, model, cache in (
            ("plain", self.plain, DynamicCache),
            ("capkit", self.captioner.model, RoomyCache),
        ):
            filled = cache(config=model.config)
            read_ids(model, filled, ids, features)
            filled.batch_repeat_interleave(PROFILED_ROWS)
            stages = {
                "vision tower": partial(model.model.get_video_features, pixels),
                "prefill": partial(_prefill, model, cache, ids, features),
                f"decoding {PROFILED_ROWS} together": partial(_decode, model, filled),
            }
            for stage, function in stages.items():
                self.profile += [{"stage": stage, "way": way, **one} for one in profile_of(function, self.device)]

    # ---- what they share ---------------------------------------------------------------------------------------------

    def _both_ways(self) -> list[tuple[list[list[int]], float, float]]:
        """The clips captioned the plain way and capkit's, in turns; of each way the tokens, median seconds a caption,
        and median seconds a token while decoding."""
        if self._captioned is None:
            ways = (self._plain_caption, self._quick_caption)
            steps = (StepTimes(self.plain), StepTimes(self.captioner.model))
            runs = [], []
            self._warm_up(lambda: self._quick_caption(self.clips[0]))
            for clip in [self.clips[0], *self.clips]:
                for way, times, some in zip(ways, steps, runs, strict=True):
                    with times:
                        some.append(seconds_of(partial(way, clip), self.device))
            self._captioned = [
                ([ids for _, ids in some[1:]], statistics.median(seconds for seconds, _ in some[1:]), times.seconds)
                for some, times in zip(runs, steps, strict=True)
            ]
        return self._captioned

    def _warm_up(self, function):
        """Where decoding is compiled once a size has come often enough, what is measured is what comes after."""
        for _ in range(EAGER_BATCHES + 2 if self.device.type in STATIC_DEVICES else 0):
            function()

    def _plain_caption(self, clip):
        decoding = Decoding(max_new_tokens=self.size.num_tokens)
        return plain_caption(self.plain, self.processor, clip, PROMPTS[0], decoding)

    def _quick_caption(self, clip):
        return self.captioner.caption(clip, decoding=Decoding(max_new_tokens=self.size.num_tokens)).token_ids

    def _timed_batch(self, clips):
        decoding = Decoding(max_new_tokens=self.size.num_tokens)
        return seconds_of(partial(self.captioner.caption_batch, clips, decoding=decoding), self.device)

    def _first_words(self):
        stream = self.captioner.stream(self.clips[0], decoding=Decoding(max_new_tokens=self.size.num_tokens))
        next(stream)
        stream.stop()

    def _add_memory(self, name, baseline, baseline_mb, mb, equal):
        if min(baseline_mb, mb) > 1:  # less fits into what the process holds already, and is not seen
            self._add(name, baseline, "MB", baseline_mb, mb, equal)
            return
        self.skipped.append({"part": name, "why": f"too little to be seen ({baseline_mb:.1f} and {mb:.1f} MB)"})

    def _ids(self):
        return self.processor.prompt_ids(self.clips[0], Prompt(PROMPTS[0]))

    def _bytes_per_step(self, num_rows: int) -> int:
        """What one decoding step must read: the decoder, the head, and each row's keys and values."""
        decoder = (self.plain.model.layers, self.plain.model.norm, self.plain.lm_head)
        weights = sum(weight.nbytes for module in decoder for weight in module.parameters())
        config = self.plain.config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * len(self._ids())
        return weights + num_rows * values * self.plain.dtype.itemsize


PLAIN = "one clip, one plain generate()"


def _prefill(model, cache_class, ids, features):
    cache = cache_class(config=model.config)
    read_ids(model, cache, ids, features)
    return cache.layers[-1].values


def _decode(model, cache):
    """Ten tokens more for each row; which places they are at does not matter to the time."""
    ids = torch.zeros(PROFILED_ROWS, 1, dtype=torch.long, device=model.device)
    for _ in range(10):
        model(input_ids=ids, position_ids=ids + 100, past_key_values=cache, use_cache=True)


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(some) for name, some in seconds.items()}


def _peak_mb(function, device) -> float:
    with PeakMemory(device) as memory:
        function()
    return memory.num_bytes / 1e6


def _num_equal(found: list[list[int]], expected: list[list[int]]) -> str:
    return f"{sum(map(list.__eq__, found, expected))} of {len(expected)} captions"
