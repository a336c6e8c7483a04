"""What the parts of the benchmark share: the models and clips, the rows, and the work that a figure stands for."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from capkit.benchmark import models
from capkit.benchmark.measuring import (
    OtherLoad,
    PeakMemory,
    StepTimes,
    count_flops,
    describe_machine,
    measure_limits,
    num_equal,
    seconds_of,
)
from capkit.benchmark.models import PROMPTS, make_clip, plain_caption, prefilled_values
from capkit.benchmark.results import warning_if_busy
from capkit.captioning import Decoding
from capkit.cogvlm2 import Prompt, preprocess_frames
from capkit.video import Clip

PLAIN = "one clip, one plain generate()"


class Captioned(NamedTuple):
    """Tokens of each clip, median seconds of a caption, and of a decoding step."""

    ids: list[list[int]]
    seconds: float
    step_seconds: float


class Measurements:
    """The models, the clips, and a row for each figure; see `Benchmark`."""

    def __init__(self, size: str, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"):
        if size not in models.SIZES:
            raise ValueError(f"size={size!r}: must be one of {', '.join(map(repr, models.SIZES))}")
        self.name, self.size = size, models.SIZES[size]
        self.plain, self.captioner = models.make_captioner(self.size, device, dtype)
        self.device, self.processor = self.plain.device, self.captioner.processor
        self.clips = [make_clip(self.size, seed) for seed in range(self.size.num_clips)]
        self.machine = describe_machine(self.device)
        self.other_load = OtherLoad()
        self.limits = measure_limits(self.device, self.plain.dtype)
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.profile: list[dict[str, Any]] = []
        self._captioned: dict[int, tuple[Captioned, Captioned]] = {}  # from _both

    def results(self) -> dict[str, Any]:
        """All results so far: size, command, machine, warning, model, limits, rows, skipped parts, profile."""
        parameters = sum(weight.numel() for weight in self.plain.parameters())
        return {
            "size": self.name,
            "command": f"python -m capkit.benchmark --size {self.name}",
            "machine": self.machine,
            "warning": warning_if_busy(self.machine),
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

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _add(
        self, name: str, baseline: str, unit: str, values: Sequence[float], equal: str = "", **more: float
    ) -> None:
        """Add a row; values: the baseline's and capkit's."""
        row = {"part": "", "name": name, "baseline": baseline, "unit": unit, "baseline_value": values[0]}
        self.rows.append({**row, "value": values[1], "ratio": values[0] / values[1], "equal": equal, **more})

    def _add_captions(
        self,
        name: str,
        baseline: str,
        seconds: tuple[float, float],
        ids: list[list[int]],
        expected_ids: list[list[int]],
        num_per_run: int,
        **more: float,
    ) -> str:
        """Add a row for captions that take `seconds` together, the baseline and capkit; returns how many have the
        baseline's tokens."""
        equal = num_equal(ids, expected_ids)
        rate = {"captions_an_hour": 3600 * num_per_run / seconds[1]}
        more = {"num_tokens": sum(map(len, ids)), "num_captions": len(ids), **rate, **more}
        self._add(name, baseline, "s", seconds, equal, **more)
        return equal

    def _add_decoding(self, count: int, plain: Captioned, step_seconds: float, equal: str, how: str = "") -> None:
        rate = count / step_seconds
        limit = count * self.limits["copied_gb_per_second"] * 1e9 / self._bytes_per_step(count)
        more = {"tokens_per_second": rate, "limit_tokens_per_second": limit}
        more |= self._shares(step_seconds, num_tokens=count, num_steps=1, num_caches=count)
        name = f"a token while decoding, {count} together{how}"
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

    # ---- captions ----------------------------------------------------------------------------------------------------

    @property
    def _lengths(self) -> list[int]:
        """Tokens of the captions that are measured; long ones are measured once, and for fewer clips."""
        return [length for length in (self.size.num_tokens, self.size.num_long_tokens) if length]

    def _is_long(self, num_tokens: int) -> bool:
        return num_tokens == self.size.num_long_tokens

    def _both(self, num_tokens: int) -> tuple[Captioned, Captioned]:
        """Each clip captioned by the baseline and by capkit, in turns; measured once."""
        if num_tokens not in self._captioned:
            decoding = Decoding(max_new_tokens=num_tokens)
            functions = partial(self._plain_caption, decoding=decoding), partial(self._caption, decoding=decoding)
            steps = StepTimes(self.plain), StepTimes(self.captioner.model)
            runs: tuple[list[tuple[float, list[int]]], ...] = [], []
            self._warm_up(self.clips[:1])
            for clip in self.clips[:2] if self._is_long(num_tokens) else [self.clips[0], *self.clips]:
                for function, times, results in zip(functions, steps, runs, strict=True):
                    with times:
                        results.append(seconds_of(partial(function, clip), self.device))
            if not self._is_long(num_tokens):
                runs = runs[0][1:], runs[1][1:]  # the first was a warm-up
            plain, quick = (
                Captioned([ids for _, ids in results], statistics.median(s for s, _ in results), times.seconds)
                for results, times in zip(runs, steps, strict=True)
            )
            self._captioned[num_tokens] = plain, quick
        return self._captioned[num_tokens]

    def _warm_up(self, clips: list[Clip]) -> None:
        """What comes with the first batch of a size only, such as recording its decoding, is not measured."""
        self.captioner.caption_batch(clips, decoding=Decoding(max_new_tokens=min(self.size.num_tokens, 4)))

    def _plain_caption(self, clip: Clip, decoding: Decoding) -> list[int]:
        return plain_caption(self.plain, self.processor, clip, PROMPTS[0], decoding)

    def _caption(self, clip: Clip, decoding: Decoding) -> list[int]:
        return self.captioner.caption(clip, decoding=decoding).token_ids

    # ---- work --------------------------------------------------------------------------------------------------------

    def _shares(
        self,
        seconds: float,
        num_encoded: float = 0,
        num_prefilled: float = 0,
        num_tokens: int = 0,
        num_steps: int = 0,
        num_caches: int = 0,
    ) -> dict[str, float]:
        """How near to the machine's limits these seconds are: the least that had to be read, at the rate of the memory,
        and the least that had to be multiplied, at the rate of a matrix product, as shares of them.

        Args:
            seconds: what it took.
            num_encoded: clips whose frames went through the vision tower.
            num_prefilled: clips whose prompts were read.
            num_tokens: that were decoded, of all captions.
            num_steps: in which they were decoded.
            num_caches: clips whose keys and values each step reads.
        """
        tower, prefill, token = self._flops
        flops = num_encoded * tower + num_prefilled * prefill + num_tokens * token
        num_bytes = num_encoded * _num_bytes(self.plain.model.vision) + num_prefilled * self._bytes_per_step(0)
        num_bytes += num_steps * self._bytes_per_step(num_caches)
        return {
            "share_of_bandwidth": num_bytes / seconds / 1e9 / self.limits["copied_gb_per_second"],
            "share_of_matmul": flops / seconds / 1e9 / self.limits["matmul_gflops"],
        }

    @functools.cached_property
    def _flops(self) -> tuple[int, int, int]:
        """Floating point operations of encoding a clip, of prefilling it, and of a token (without attention)."""
        pixels, features, ids = self._inputs()
        tower = count_flops(self.plain, partial(self.plain.model.get_video_features, pixels))
        prefill = count_flops(self.plain, partial(prefilled_values, self.plain, ids, features))
        return tower, prefill, 2 * sum(weight.numel() for weight in models.decoder_weights(self.plain))

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Pixels, features and prompt ids of the first clip."""
        pixels = preprocess_frames(self.clips[0].frames, self.processor.image_size).to(self.device)
        return pixels, self.plain.model.get_video_features(pixels), self._ids()

    def _ids(self) -> list[int]:
        return self.processor.prompt_ids(self.clips[0], Prompt(PROMPTS[0]))

    def _bytes_per_step(self, num_caches: int) -> int:
        """What one decoding step must read: the decoder, the head, and the keys and values of so many clips."""
        config: Any = self.plain.config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * len(self._ids())
        weights = sum(weight.nbytes for weight in models.decoder_weights(self.plain))
        return weights + num_caches * values * self.plain.dtype.itemsize


def _num_bytes(module: torch.nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
