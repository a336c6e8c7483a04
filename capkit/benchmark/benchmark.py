"""Measure capkit's speed and memory beside a plain baseline in the same run, on a random model of a chosen size.

    python -m capkit.benchmark --size small --out results.json

needs no download, no notebook and no video library; parts whose library is missing are skipped with a message.
Notebook 06 explains the figures.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from capkit.benchmark.base import PLAIN, Measurements
from capkit.benchmark.grounding import measure_left_out, measure_together, random_captions, score_and_attend
from capkit.benchmark.measuring import PeakMemory, StepTimes, profile_of, seconds_of, take_turns
from capkit.benchmark.models import (
    DECODINGS,
    PROMPTS,
    decode,
    make_clip,
    plain_caption,
    plain_pixels,
    plain_prefilled_values,
    prefilled_values,
)
from capkit.benchmark.results import describe, warning_if_busy
from capkit.benchmark.second_day import Reused, measure_in_another_process, measure_reuse, store_features
from capkit.benchmark.video import measure_reading
from capkit.captioning import MAX_BRANCHES, Caption, Decoding, PreallocatedCache, SharedVideo, load_captioner, prefill
from capkit.cogvlm2 import Prompt, preprocess_frames
from capkit.video import Clip

PARTS = (
    "reading",
    "preprocessing",
    "stages",
    "captions",
    "batches",
    "sweeps",
    "second_day",
    "grounding",
    "compiled",
    "loading",
    "profiling",
)
SWEEPS = (4, 8)  # numbers of prompts, and of decodings for each
PROFILED_ROWS = 8  # of the decoding step that is profiled
NUM_GROUNDED_ALONE = 4  # captions that are grounded one by one; the others are assumed to take as long


class Benchmark(Measurements):
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
        if warning := warning_if_busy(self.machine):
            print(warning, flush=True)
        for part in parts or PARTS:
            count = len(self.rows)
            try:
                with torch.inference_mode():
                    getattr(self, f"_{part}")()
            except Exception as error:  # the other parts are measured first
                traceback.print_exc()
                self.skipped.append({"part": part, "why": repr(error)})
                failed = failed or error
            self.machine["other_cores"] = max(self.machine["other_cores"], round(self.other_load(), 2))
            for row in self.rows[count:]:
                row["part"] = part
                print(describe(row), flush=True)
            if out:
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                Path(out).write_text(json.dumps(self.results(), indent=1) + "\n", encoding="utf-8")
        if failed:
            raise failed
        return self.results()

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
        prefills = [partial(plain_prefilled_values, plain, ids, features)]
        prefills += [partial(prefilled_values, quick, ids, features)]
        for name, pair, work in (
            (f"vision tower, {len(pixels)} frames", towers, {"num_encoded": 1}),
            (f"prefill, {len(ids)} positions", prefills, {"num_prefilled": 1}),
        ):
            seconds = take_turns(pair, self.size.repeats, self.device)
            expected = pair[0]()
            equal = f"to {(expected - pair[1]()).abs().max() / expected.std():.0e} of the spread"
            self._add(name, "as transformers runs it", "s", seconds, equal, **self._shares(seconds[1], **work))

    def _captions(self) -> None:
        for length in self._lengths:
            plain, quick = self._both(length)
            shares = self._shares(quick.seconds, 1, 1, length, length, 1)
            name, seconds = f"one caption of {length} tokens", (plain.seconds, quick.seconds)
            equal = self._add_captions(name, PLAIN, seconds, quick.ids, plain.ids, 1, **shares)
            if self._is_long(length):
                continue
            first = statistics.median(seconds_of(self._first_words, self.device)[0] for _ in range(self.size.repeats))
            against = "the whole caption: nothing shows before"
            shares = self._shares(first, 1, 1)
            self._add("its first words, as a stream", against, "s", (plain.seconds, first), "", **shares)
            self._add_decoding(1, plain, quick.step_seconds, equal)
            pair = [partial(run, self.clips[0], Decoding(length)) for run in (self._plain_caption, self._caption)]
            self._add_memory("extra memory for one caption", PLAIN, pair, self.device, equal)

    def _batches(self) -> None:
        for length in self._lengths:
            plain, _ = self._both(length)
            for count in self.size.batches[-1:] if self._is_long(length) else self.size.batches:
                clips = [self.clips[number % len(plain.ids)] for number in range(count)]
                self._warm_up(clips)
                batch = partial(self.captioner.caption_batch, clips, decoding=Decoding(length))
                with StepTimes(self.captioner.model) as steps, PeakMemory(self.device) as memory:
                    runs = [seconds_of(batch, self.device) for _ in range(self.size.repeats if count <= 8 else 1)]
                seconds = statistics.median(seconds for seconds, _ in runs)
                equal = self._add_captions(
                    f"{count} clips in a batch, {length} tokens each",
                    f"{count} x {PLAIN}",
                    (count * plain.seconds, seconds),
                    [caption.token_ids for caption in runs[0][1]],
                    [plain.ids[number % len(plain.ids)] for number in range(count)],
                    count,
                    peak_mb=memory.num_bytes / 1e6,
                    **self._shares(seconds, count, count, count * length, length, count),
                )
                if not self._is_long(length):
                    self._add_decoding(count, plain, steps.seconds, equal)

    def _sweeps(self) -> None:
        clip, plain = self.clips[0], {}
        plain_caption(self.plain, self.processor, clip, PROMPTS[0], Decoding(max_new_tokens=2))
        for length in [length for length in (self.size.num_sweep_tokens, self.size.num_long_tokens) if length]:
            decodings = [Decoding(max_new_tokens=length, **settings) for settings in DECODINGS]
            for side in SWEEPS:
                cells = [(prompt, decoding) for prompt in PROMPTS[:side] for decoding in decodings[:side]]
                measured = cells[: 4 if self._is_long(length) else self.size.num_plain_cells]
                sweep = partial(self._sweep, clip, [(Prompt(text), decoding) for text, decoding in cells])
                runs = [seconds_of(sweep, self.device)]  # the others come after the baseline: load may change
                for cell in measured:
                    if cell not in plain:
                        function = partial(plain_caption, self.plain, self.processor, clip, *cell)
                        plain[cell] = seconds_of(function, self.device)
                num_more = 0 if self._is_long(length) else self.size.num_sweeps - 1
                runs += [seconds_of(sweep, self.device) for _ in range(num_more)]
                seconds = statistics.median(seconds for seconds, _ in runs)
                num_steps = length * -(-len(cells) // MAX_BRANCHES)
                against = f"{len(cells)} captions, nothing shared"
                self._add_captions(
                    f"sweep of {len(cells)} cells, {length} tokens each",
                    against + (f" ({len(measured)} measured)" if len(measured) < len(cells) else ""),
                    (len(cells) * statistics.mean(plain[cell][0] for cell in measured), seconds),
                    [caption.token_ids for caption in runs[0][1]],
                    [plain[cell][1] for cell in measured],
                    len(cells),
                    **self._shares(seconds, 1, 1, length * len(cells), num_steps, 1),
                )

    def _second_day(self) -> None:
        """Each row's baseline is capkit without stored features, for the same clips and prompt."""
        size, model = self.size, self.plain
        with tempfile.TemporaryDirectory() as folder:
            clips = self.clips[:8]
            in_memory = store_features(self.captioner, clips, folder)
            for length in self._lengths:
                for count in (1, len(clips)):
                    repeats = size.repeats if count == 1 and not self._is_long(length) else 1
                    for where, stored in (("in memory", in_memory), ("on disk", Path(folder))):
                        reused = measure_reuse(self.captioner, clips[:count], length, stored, repeats)
                        self._add_reused(where, count, length, reused)
            length = size.num_tokens
            try:
                elsewhere = measure_in_another_process(size, self.device, model.dtype, length, folder, size.repeats)
                self._add_reused("on disk by another process", 1, length, elsewhere)
            except subprocess.CalledProcessError as error:  # its own message is above; a second model may not fit
                self.skipped.append({"part": "second_day in another process", "why": str(error)[-200:]})

    def _add_reused(self, where: str, count: int, length: int, reused: Reused) -> None:
        self._add_captions(
            f"a new prompt for {'a clip' if count == 1 else f'{count} clips in a batch'}, features stored {where}, "
            f"{length} tokens",
            "frames encoded anew",
            reused.seconds,
            reused.ids,
            reused.expected_ids,
            count,
            num_encoded=reused.num_encoded,
            **self._shares(reused.seconds[1], 0, count, count * length, length, count),
        )

    def _grounding(self) -> None:
        size, frames = self.size, self.size.num_frames
        captions = random_captions(self.captioner, size.num_grounded, size.num_grounded_tokens)
        together = measure_together(self.captioner, self.clips[0], captions, NUM_GROUNDED_ALONE)
        self._add(
            f"ground {len(captions)} captions of {size.num_grounded_tokens} tokens in one call",
            f"one call for each ({NUM_GROUNDED_ALONE} measured)",
            "s",
            together.seconds,
            f"to {together.difference:.0e} nats",
            **self._shares(together.seconds[1], 1, 2, 2 * size.num_grounded * size.num_grounded_tokens),
        )
        left_out = measure_left_out(self.captioner, self.clips[0], captions[0], size.num_loads)
        score, seconds = left_out.seconds
        self._add(
            f"ground a caption with each of {frames} frames left out",
            f"{frames + 2} x scoring it",
            "s",
            ((frames + 2) * score, seconds),
            f"to {left_out.difference:.0e} nats",
            scorings=seconds / score,
            **self._shares(seconds, 1, 2 + (frames + 1) / 2, (frames + 2) * size.num_grounded_tokens),
        )
        pair = score_and_attend(self.captioner, self.clips[0], captions[0])
        score, seconds = take_turns(pair, size.num_loads, self.device)
        shares = self._shares(seconds, 1, 1, size.num_grounded_tokens)
        self._add("see where a caption's words look", "2 x scoring it", "s", (2 * score, seconds), "", **shares)
        self._add_memory("extra memory to see where a caption's words look", "scoring it", pair, self.device, "")

    def _compiled(self) -> None:
        """Decoding as it is once a size has gone on so long that its step is compiled."""
        graphs = self.captioner._graph_decoder
        if not graphs.is_useful:
            self.skipped.append({"part": "compiled", "why": f"nothing is compiled on {self.device.type}"})
            return
        compile_after, graphs.compile_after = graphs.compile_after, 1
        graphs.forget()
        plain, _ = self._both(self.size.num_tokens)
        for count in (1, max(self.size.batches)):
            clips = [self.clips[number % len(self.clips)] for number in range(count)]
            self._warm_up(clips)
            with StepTimes(self.captioner.model) as steps:
                self.captioner.caption_batch(clips, decoding=Decoding(self.size.num_tokens))
            self._add_decoding(count, plain, steps.seconds, "", ", compiled")
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
        share = num_bytes / seconds[1] / 1e9 / self.limits["copied_gb_per_second"]
        self._add(name, "safetensors' load_file alone", "s", seconds, share_of_bandwidth=share)

    def _profiling(self) -> None:
        pixels, features, ids = self._inputs()
        for name, model, cache_class, read in (
            ("plain", self.plain, DynamicCache, plain_prefilled_values),
            ("capkit", self.captioner.model, PreallocatedCache, prefilled_values),
        ):
            cache = cache_class(config=model.config)
            prefill(model, cache, ids, features)
            cache.batch_repeat_interleave(PROFILED_ROWS)
            stages: dict[str, Callable[[], Any]] = {
                "vision tower": partial(model.model.get_video_features, pixels),
                "prefill": partial(read, model, ids, features),
                f"decoding {PROFILED_ROWS} together": partial(decode, model, cache, PROFILED_ROWS),
            }
            for stage, function in stages.items():
                self.profile += [{"stage": stage, "way": name, **row} for row in profile_of(function, self.device)]

    def _sweep(self, clip: Clip, cells: list[tuple[Prompt, Decoding]]) -> list[Caption]:
        return list(SharedVideo(self.captioner, clip).caption(cells))

    def _first_words(self) -> None:
        stream = self.captioner.stream(self.clips[0], decoding=Decoding(self.size.num_tokens))
        next(stream)
        stream.stop()
