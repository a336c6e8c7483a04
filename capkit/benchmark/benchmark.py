"""Measure capkit's speed and memory beside a plain baseline in the same run, on a random model of a chosen size.

    python -m capkit.benchmark --size small --out results.json

needs no download, no notebook and no video library; parts whose library is missing are skipped with a message.
Notebook 06 explains the figures.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from capkit.benchmark import models
from capkit.benchmark.measuring import (
    PeakMemory,
    StepTimes,
    count_flops,
    describe_machine,
    measure_limits,
    num_equal,
    profile_of,
    seconds_of,
    take_turns,
)
from capkit.benchmark.models import DECODINGS, PROMPTS, decode, make_clip, plain_caption, plain_pixels, prefilled_values
from capkit.benchmark.results import describe
from capkit.benchmark.video import measure_reading
from capkit.captioning import Caption, Decoding, PreallocatedCache, SharedVideo, load_captioner, prefill
from capkit.cogvlm2 import Prompt, preprocess_frames
from capkit.video import Clip

PARTS = ("reading", "preprocessing", "stages", "captions", "batches", "sweeps", "compiled", "loading", "profiling")
SWEEPS = (4, 8)  # numbers of prompts, and of decodings for each
PROFILED_ROWS = 8  # of the decoding step that is profiled


class Benchmark:
    """One run, with a row for each figure.

    Args:
        size: a name of `capkit.benchmark.models.SIZES`.
        device, dtype: as in `load_captioner`.

    Attributes:
        rows: dictionaries of `part`, `name`, `baseline` (what it is), `unit`, `baseline_value`, `value`, `ratio`
            (baseline_value / value, so that more is better), `equal` (how much of the outcome is the baseline's), and
            further figures by their names.
        skipped: `part` that was skipped, and `why`.
        profile: where the time of each stage goes: `stage`, `way`, `operation`, `calls`, `seconds`, `share`.

    Raises:
        ValueError: unknown size, device or dtype.
        CheckpointError: the model does not fit into memory.
    """

    def __init__(self, size: str, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"):
        if size not in models.SIZES:
            raise ValueError(f"size={size!r}: must be one of {', '.join(map(repr, models.SIZES))}")
        self.name, self.size = size, models.SIZES[size]
        self.plain, self.captioner = models.make_captioner(self.size, device, dtype)
        self.device, self.processor = self.plain.device, self.captioner.processor
        self.clips = [make_clip(self.size, seed) for seed in range(self.size.num_clips)]
        self.machine = describe_machine(self.device)
        self.limits = measure_limits(self.device, self.plain.dtype)
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.profile: list[dict[str, Any]] = []
        self.decoding = Decoding(max_new_tokens=self.size.num_tokens)
        self._captioned: tuple[_Captioned, _Captioned] | None = None  # from _both
        self._flops: float | None = None

    def run(self, parts: Sequence[str] = (), out: str | Path | None = None) -> dict[str, Any]:
        """Measure, and write the results after each part.

        Args:
            parts: some of PARTS; none for all.
            out: a JSON file.

        Returns:
            The results, as in the file.

        Raises:
            ValueError: no such part.
        """
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"parts={unknown!r}: must be among {', '.join(PARTS)}")
        failed = None
        for part in parts or PARTS:
            count = len(self.rows)
            try:
                with torch.inference_mode():
                    getattr(self, f"_{part}")()
            except Exception as error:  # the other parts are measured first
                traceback.print_exc()
                self.skipped.append({"part": part, "why": repr(error)})
                failed = failed or error
            for row in self.rows[count:]:
                row["part"] = part
                print(describe(row), flush=True)
            if out:
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                Path(out).write_text(json.dumps(self.results(), indent=1) + "\n", encoding="utf-8")
        if failed:
            raise failed
        return self.results()

    def results(self) -> dict[str, Any]:
        """All results so far: `size`, `command`, `machine`, `model`, `limits`, `rows`, `skipped`, `profile`."""
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

    def _add(
        self, name: str, baseline: str, unit: str, values: Sequence[float], equal: str = "", **more: float
    ) -> None:
        """Add a row; values: the baseline's and capkit's."""
        row = {"part": "", "name": name, "baseline": baseline, "unit": unit, "baseline_value": values[0]}
        self.rows.append({**row, "value": values[1], "ratio": values[0] / values[1], "equal": equal, **more})

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _reading(self) -> None:
        try:
            rows = measure_reading(self.size.num_minutes, self.size.num_frames, self.size.repeats)
        except ImportError as error:
            self.skipped.append({"part": "reading", "why": str(error)})
            print(f"reading: skipped, {error}")
            return
        for row in rows:
            self._add(**row)

    def _preprocessing(self) -> None:
        height, width = self.size.large_frame
        image_size, frames = self.processor.image_size, make_clip(self.size, 0, (height, width)).frames
        pair = partial(plain_pixels, frames, image_size), partial(preprocess_frames, frames, image_size)
        against, equal = "normalised at full size", f"to {(pair[0]() - pair[1]()).abs().max():.0e}"
        seconds = take_turns(pair, self.size.repeats, torch.device("cpu"))
        self._add(f"preprocess {len(frames)} frames of {width} x {height}", against, "s", seconds, equal)
        self._add_memory("extra memory to preprocess them", against, pair, torch.device("cpu"), equal)

    def _stages(self) -> None:
        pixels, features, ids = self._inputs()
        plain, quick = self.plain, self.captioner.model
        towers = [partial(model.model.get_video_features, pixels) for model in (plain, quick)]
        prefills = [partial(prefilled_values, plain, DynamicCache, ids, features)]
        prefills += [partial(prefilled_values, quick, PreallocatedCache, ids, features)]
        stages = {f"vision tower, {len(pixels)} frames": towers, f"prefill, {len(ids)} positions": prefills}
        for name, pair in stages.items():
            seconds = take_turns(pair, self.size.repeats, self.device)
            expected = pair[0]()
            difference = (expected - pair[1]()).abs().max() / expected.std()
            gflops = count_flops(plain, pair[0]) / seconds[1] / 1e9
            share, equal = gflops / self.limits["matmul_gflops"], f"to {difference:.0e} of the spread"
            self._add(name, "as transformers runs it", "s", seconds, equal, gflops=gflops, share_of_matmul=share)

    def _captions(self) -> None:
        plain, quick = self._both()
        name = f"one caption of {self.size.num_tokens} tokens"
        equal = self._add_captions(name, PLAIN, plain.seconds, quick.seconds, quick.ids, plain.ids, 1)
        first = statistics.median(seconds_of(self._first_words, self.device)[0] for _ in range(self.size.repeats))
        against = "the whole caption: nothing shows before"
        self._add("its first words, as a stream", against, "s", (plain.seconds, first))
        self._add_decoding(1, quick.step_seconds, equal)
        pair = partial(self._plain_caption, self.clips[0]), partial(self._caption, self.clips[0])
        self._add_memory("extra memory for one caption", PLAIN, pair, self.device, equal)

    def _batches(self) -> None:
        plain, _ = self._both()
        for count in self.size.batches:
            clips = [self.clips[number % len(self.clips)] for number in range(count)]
            self._warm_up(clips)
            batch = partial(self.captioner.caption_batch, clips, decoding=self.decoding)
            with StepTimes(self.captioner.model) as steps, PeakMemory(self.device) as memory:
                runs = [seconds_of(batch, self.device) for _ in range(self.size.repeats if count <= 8 else 1)]
            seconds = statistics.median(seconds for seconds, _ in runs)
            equal = self._add_captions(
                f"{count} clips in a batch, {self.size.num_tokens} tokens each",
                f"{count} x {PLAIN}",
                count * plain.seconds,
                seconds,
                [caption.token_ids for caption in runs[0][1]],
                [plain.ids[number % len(plain.ids)] for number in range(count)],
                count,
                peak_mb=memory.num_bytes / 1e6,
                share_of_matmul=count * self._flops_per_caption() / seconds / 1e9 / self.limits["matmul_gflops"],
            )
            self._add_decoding(count, steps.seconds, equal)

    def _sweeps(self) -> None:
        decodings = [Decoding(max_new_tokens=self.size.num_sweep_tokens, **settings) for settings in DECODINGS]
        clip = self.clips[0]
        plain: dict[tuple[str, Decoding], tuple[float, list[int]]] = {}
        plain_caption(self.plain, self.processor, clip, PROMPTS[0], Decoding(max_new_tokens=2))
        for side in SWEEPS:
            cells = [(prompt, decoding) for prompt in PROMPTS[:side] for decoding in decodings[:side]]
            measured = cells[: self.size.num_plain_cells]
            for cell in measured:
                if cell not in plain:
                    function = partial(plain_caption, self.plain, self.processor, clip, *cell)
                    plain[cell] = seconds_of(function, self.device)
            sweep = partial(self._sweep, clip, [(Prompt(text), decoding) for text, decoding in cells])
            runs = [seconds_of(sweep, self.device) for _ in range(self.size.num_sweeps)]
            against = f"{len(cells)} captions, nothing shared"
            self._add_captions(
                f"sweep of {len(cells)} cells, {self.size.num_sweep_tokens} tokens each",
                against + (f" ({len(measured)} measured)" if len(measured) < len(cells) else ""),
                len(cells) * statistics.mean(plain[cell][0] for cell in measured),
                statistics.median(seconds for seconds, _ in runs),
                [caption.token_ids for caption in runs[0][1]],
                [plain[cell][1] for cell in measured],
                len(cells),
            )

    def _compiled(self) -> None:
        """Decoding as it is once a size has gone on so long that its step is compiled."""
        graphs = self.captioner._graph_decoder
        if not graphs.is_useful:
            self.skipped.append({"part": "compiled", "why": f"nothing is compiled on {self.device.type}"})
            return
        compile_after, graphs.compile_after = graphs.compile_after, 1
        graphs.forget()
        for count in (1, max(self.size.batches)):
            clips = [self.clips[number % len(self.clips)] for number in range(count)]
            self._warm_up(clips)
            with StepTimes(self.captioner.model) as steps:
                self.captioner.caption_batch(clips, decoding=self.decoding)
            self._add_decoding(count, steps.seconds, "", ", compiled")
        graphs.compile_after = compile_after
        graphs.forget()

    def _loading(self) -> None:
        num_bytes = sum(weight.nbytes for weight in self.plain.parameters())
        with tempfile.TemporaryDirectory() as folder:
            if shutil.disk_usage(folder).free < 1.2 * num_bytes:
                why = f"needs {1.2 * num_bytes / 1e9:.0f} GB of free disk in {folder}"
                self.skipped.append({"part": "loading", "why": why})
                return
            self.captioner.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            device = str(self.device)
            pair = (
                lambda: [load_file(path, device=device) for path in Path(folder).glob("*.safetensors")],
                partial(load_captioner, folder, device=self.device, dtype=self.plain.dtype),
            )
            seconds = take_turns(pair, self.size.num_loads, self.device, warm_up=False)
        name = f"load {num_bytes / 1e9:.2f} GB, checked, from a warm disk"
        self._add(name, "safetensors' load_file alone", "s", seconds)

    def _profiling(self) -> None:
        pixels, features, ids = self._inputs()
        sides = ("plain", self.plain, DynamicCache), ("capkit", self.captioner.model, PreallocatedCache)
        for name, model, cache_class in sides:
            cache = cache_class(config=model.config)
            prefill(model, cache, ids, features)
            cache.batch_repeat_interleave(PROFILED_ROWS)
            stages: dict[str, Callable[[], Any]] = {
                "vision tower": partial(model.model.get_video_features, pixels),
                "prefill": partial(prefilled_values, model, cache_class, ids, features),
                f"decoding {PROFILED_ROWS} together": partial(decode, model, cache, PROFILED_ROWS),
            }
            for stage, function in stages.items():
                self.profile += [{"stage": stage, "way": name, **row} for row in profile_of(function, self.device)]

    # ---- shared by the parts -----------------------------------------------------------------------------------------

    def _both(self) -> tuple[_Captioned, _Captioned]:
        """Each clip captioned by the baseline and by capkit, in turns; measured once."""
        if self._captioned is None:
            functions = self._plain_caption, self._caption
            steps = StepTimes(self.plain), StepTimes(self.captioner.model)
            runs: tuple[list[tuple[float, list[int]]], ...] = [], []
            self._warm_up(self.clips[:1])
            for clip in [self.clips[0], *self.clips]:
                for function, times, results in zip(functions, steps, runs, strict=True):
                    with times:
                        results.append(seconds_of(partial(function, clip), self.device))
            plain, quick = (
                _Captioned([ids for _, ids in results[1:]], statistics.median(s for s, _ in results[1:]), times.seconds)
                for results, times in zip(runs, steps, strict=True)
            )
            self._captioned = plain, quick
        return self._captioned

    def _warm_up(self, clips: list[Clip]) -> None:
        """What comes with the first batch of a size only, such as recording its decoding, is not measured."""
        self.captioner.caption_batch(clips, decoding=Decoding(max_new_tokens=min(self.size.num_tokens, 4)))

    def _plain_caption(self, clip: Clip) -> list[int]:
        return plain_caption(self.plain, self.processor, clip, PROMPTS[0], self.decoding)

    def _caption(self, clip: Clip) -> list[int]:
        return self.captioner.caption(clip, decoding=self.decoding).token_ids

    def _sweep(self, clip: Clip, cells: list[tuple[Prompt, Decoding]]) -> list[Caption]:
        return list(SharedVideo(self.captioner, clip).caption(cells))

    def _first_words(self) -> None:
        stream = self.captioner.stream(self.clips[0], decoding=self.decoding)
        next(stream)
        stream.stop()

    def _add_captions(
        self,
        name: str,
        baseline: str,
        baseline_seconds: float,
        seconds: float,
        ids: list[list[int]],
        expected_ids: list[list[int]],
        num_per_run: int,
        **more: float,
    ) -> str:
        """Add a row for captions that take `seconds` together; returns how many have the baseline's tokens."""
        equal = num_equal(ids, expected_ids)
        rate = {"captions_an_hour": 3600 * num_per_run / seconds}
        more = {"num_tokens": sum(map(len, ids)), "num_captions": len(ids), **rate, **more}
        self._add(name, baseline, "s", (baseline_seconds, seconds), equal, **more)
        return equal

    def _add_decoding(self, count: int, step_seconds: float, equal: str, how: str = "") -> None:
        rate = count / step_seconds
        limit = count * self.limits["copied_gb_per_second"] * 1e9 / self._bytes_per_step(count)
        more = {"tokens_per_second": rate, "limit_tokens_per_second": limit, "share_of_bandwidth": rate / limit}
        name, plain = f"a token while decoding, {count} together{how}", self._both()[0]
        self._add(name, "plain, one clip", "s", (plain.step_seconds, step_seconds / count), equal, **more)

    def _add_memory(
        self, name: str, baseline: str, pair: Sequence[Callable[[], Any]], device: torch.device, equal: str
    ) -> None:
        mb = []
        for function in pair:
            with PeakMemory(device) as memory:
                function()
            mb.append(memory.num_bytes / 1e6)
        if min(mb) > 1:
            self._add(name, baseline, "MB", mb, equal)
        else:  # it fits into memory that the process holds already
            self.skipped.append({"part": name, "why": f"too little to measure ({mb[0]:.1f} and {mb[1]:.1f} MB)"})

    def _flops_per_caption(self) -> float:
        if self._flops is None:
            pixels, _, ids = self._inputs()
            features = self.plain.model.get_video_features
            flops = count_flops(self.plain, lambda: prefilled_values(self.plain, DynamicCache, ids, features(pixels)))
            per_token = 2 * sum(weight.numel() for weight in models.decoder_weights(self.plain))
            self._flops = flops + per_token * self.size.num_tokens
        return self._flops

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Pixels, features and prompt ids of the first clip."""
        pixels = preprocess_frames(self.clips[0].frames, self.processor.image_size).to(self.device)
        return pixels, self.plain.model.get_video_features(pixels), self._ids()

    def _ids(self) -> list[int]:
        return self.processor.prompt_ids(self.clips[0], Prompt(PROMPTS[0]))

    def _bytes_per_step(self, num_rows: int) -> int:
        """What one decoding step must read: the decoder, the head, and each row's keys and values."""
        config: Any = self.plain.config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * len(self._ids())
        weights = sum(weight.nbytes for weight in models.decoder_weights(self.plain))
        return weights + num_rows * values * self.plain.dtype.itemsize


PLAIN = "one clip, one plain generate()"


class _Captioned(NamedTuple):
    """Tokens of each clip, median seconds of a caption, and of a decoding step."""

    ids: list[list[int]]
    seconds: float
    step_seconds: float
