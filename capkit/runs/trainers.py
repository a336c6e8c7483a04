"""Which frames of a clip a trainer looks at, and which clips it cannot take; as read in the trainers' sources.

- "cogvideo" (zai-org/CogVideo 7a1af71, finetune/datasets/utils.py) and "cogkit" (THUDM/CogKit 1633285,
  src/cogkit/finetune/datasets/utils.py): of n frames every (n // F)-th from the first, F in all; a shorter clip is used
  in full, and its last frame repeated.
- "diffusers" (huggingface/diffusers 02303d1, examples/cogvideo/train_cogvideox_lora.py): the same; what is left is cut
  to 4k + 1 frames, and a clip of which one frame is left stops it, because `squeeze` takes the frame's dimension away.
- "cogvideox-factory" (a-r-r-o-w/cogvideox-factory 223add1, training/cogvideox/dataset.py, one frame bucket of F): as
  "cogvideo"; fewer than F frames stop it, because n // F is 0.
- "finetrainers" (a-r-r-o-w/finetrainers f476c37, finetrainers/functional/video.py, one bucket of F): F frames spread
  over the entire clip; a shorter clip is used in full.
- "sat" (zai-org/CogVideo 7a1af71, sat/data_video.py, SFTDataset): without the first 3 frames, F frames at about `fps` a
  second; of clips too short for that every ((n - 6) // F)-th without the last 3 either, or 4k + 1 frames as they come.
  It stops where the last frame that it wants is not there, as in clips that are hardly longer than F / fps seconds.
- "videox-fun" (aigc-apps/VideoX-Fun 804a425, videox_fun/data/dataset_image_video.py, ImageVideoDataset): each time
  another stretch, drawn at random, of which it takes every `video_sample_stride`-th frame, F in all or as many as there
  are. It never shows a clip of fewer frames than the stride: it prints the error and takes another clip.
- "diffsynth" (modelscope/DiffSynth-Studio fed7b18, diffsynth/core/data/operators.py) and "musubi"
  (kohya-ss/musubi-tuner 30c658c, src/musubi_tuner/dataset/image_video_dataset.py, `frame_extraction` "full"): the
  first F frames, or of a shorter clip the first 4k + 1.
- "ltx-2" (Lightricks/LTX-2 400fd31, packages/ltx-trainer/scripts/process_videos.py, one bucket of F): the first F
  frames; a shorter clip is left out.
- "diffusion-pipe" (tdrussell/diffusion-pipe 8f83dbf, utils/dataset.py, models/base.py): the clip is brought to the
  model's rate, 16 a second for Wan, by frames spread over it; of these the first F. A clip of fewer is left out.
- "fastvideo" (hao-ai-lab/FastVideo 2f3d407, fastvideo/workflow/preprocess/components.py): the first F frames at 16 a
  second. A clip of fewer, or one that lasts longer than 5 F of them, is left out.
- "ai-toolkit" (ostris/ai-toolkit 27a03a9, toolkit/dataloader_mixins.py, `num_frames`): F frames spread over the entire
  clip; of a shorter one all, some several times.
- "simpletuner" (bghira/SimpleTuner bc8e6ab, simpletuner/helpers/caching/vae.py, prepare_video_latents, and
  data_backend/factory.py): the first F frames, as `num_frames` and `min_frames` are; a shorter clip is left out. For
  models that take only 8k + 1 frames it lowers F to that.
- "onetrainer" (Nerogar/mgds 3a6994a, src/mgds/pipelineModules/LoadVideo.py, as in Nerogar/OneTrainer 23df383,
  modules/dataLoader/mixin/DataLoaderText2ImageMixin.py): each time F consecutive frames from another place, drawn from
  the seconds that are left as if the clip had 24 frames a second. The frame in which that place lies is dropped, so
  that the first of the clip is never seen; where the clip ends, its last frame is repeated. A single frame stops it.
- "videotuna" (VideoVerses/VideoTuna 0d49a54, videotuna/data/datasets.py and transforms.py): each time another stretch
  of F * `frame_interval` frames, drawn at random but never the last one, of which it takes F evenly. A clip of fewer is
  replaced by another at random. F is its `num_frames`; the `video_length` in its configurations of CogVideoX is not
  read, and leaves F at 16.
- "open-sora" (hpcaitech/Open-Sora 7ad6a96, opensora/datasets/bucket.py, datasets.py and utils.py, and
  configs/diffusion/train/image.py and stage1.py): a clip of `fps_max` frames a second or more counts as n // s frames,
  s = fps / `fps_max` rounded up, and goes to the largest bucket that it fills, of 5, 9, ..., F frames, or to that of
  one; F is 129 in stage1.py. Each time another stretch of s times as many frames, as of "videotuna". A clip that fills
  no bucket is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from capkit.text import unknown_name
from capkit.video import at_least_one, positive

SAT_SKIPPED_FRAMES = 3
WAN_RATE = 16
ONETRAINER_RATE = 24
SMALLEST_BUCKET = 5  # of Open-Sora, beside that of one frame
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "sat": {"frames_per_second": 8.0},
    "open-sora": {"frames_per_second": 24.0},
    "videox-fun": {"stride": 3},
    "videotuna": {"stride": 1},
}
"""Settings that only some trainers have, with their defaults."""
_FEWER_AT_16 = "it leaves out clips of fewer than {} at 16 a second"


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer is set to.

    Attributes:
        num_frames: F, how many frames of a clip it trains on, or at most.
        frames_per_second: of "sat", 8 for CogVideoX and 16 for CogVideoX 1.5; of "open-sora" its `fps_max`.
        stride: of "videox-fun" and "videotuna", which take every so many-th frame.

    None stands for the trainer's default, see `OWN_SETTINGS`; `of` fills it in.

    Raises:
        ValueError: a number out of range.
    """

    num_frames: int = 49
    frames_per_second: float | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        for name, check in (("num_frames", at_least_one), ("frames_per_second", positive), ("stride", at_least_one)):
            if name == "num_frames" or getattr(self, name) is not None:
                object.__setattr__(self, name, check(name, getattr(self, name)))

    @classmethod
    def of(cls, trainer: str, values: TrainerSettings | Mapping[str, Any] | None) -> TrainerSettings:
        """What a trainer is set to, its defaults included, by a dictionary of the fields; None stands for a default.

        Raises:
            ValueError: also for an unknown field, or one that the trainer does not have, and a number of frames that it
                does not take.
        """
        if values is not None and not isinstance(values, (TrainerSettings, Mapping)):
            raise ValueError(f"trainer={values!r}: must be a dictionary of what it is set to, such as num_frames")
        values = asdict(values) if isinstance(values, TrainerSettings) else values or {}
        given = {name: value for name, value in values.items() if value is not None}
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError("trainer settings: " + unknown_name("field", name, names, "there are"))
            owners = [owner for owner, own in OWN_SETTINGS.items() if name in own]
            if owners and trainer not in owners:
                belongs = " and ".join(map(repr, owners))
                raise ValueError(f"{name}={given[name]!r}: has no effect on {trainer!r}; it belongs to {belongs}")
        settings = cls(**OWN_SETTINGS.get(trainer, {}) | given)
        if (settings.num_frames - 1) % (step := FRAMES_STEP.get(trainer, 1)):
            raise ValueError(f"num_frames={settings.num_frames}: {trainer!r} takes only {step} N + 1")
        return settings


FRAMES_STEP = dict.fromkeys(("cogvideo", "cogkit", "ltx-2"), 8)
FRAMES_STEP |= dict.fromkeys(("musubi", "diffsynth", "diffusion-pipe", "fastvideo"), 4)
"""The number of frames that these trainers are set to must be a multiple of it, and 1."""
DEFAULTS = TrainerSettings()
Taken = tuple[Sequence[int], str]  # the frames, or none and the reason


def trainer_indices(
    trainer: str, num_video_frames: int, average_fps: float, settings: TrainerSettings = DEFAULTS
) -> list[int]:
    """The positions of the frames of a video that a trainer may see, each once, in order.

    Args:
        trainer: one of `TRAINERS`.
        num_video_frames, average_fps: of the video, as the trainer's decoder counts them.

    Returns:
        None where the trainer cannot take the clip: `trainer_problem` says why.

    Raises:
        ValueError: unknown trainer, or no frames.
    """
    return [*_taken(trainer, num_video_frames, average_fps, settings)[0]]


def trainer_problem(
    trainer: str, num_video_frames: int, average_fps: float, settings: TrainerSettings = DEFAULTS
) -> str:
    """Why a trainer cannot take a clip of so many frames, or ""; arguments and errors as of `trainer_indices`."""
    return _taken(trainer, num_video_frames, average_fps, settings)[1]


def check_trainer(trainer: str) -> None:
    """Raise ValueError unless it is one of `TRAINERS`."""
    if trainer not in TRAINERS:
        raise ValueError(unknown_name("trainer", trainer, TRAINERS, "there are"))


def _taken(trainer: str, num_video_frames: int, average_fps: float, settings: TrainerSettings) -> Taken:
    check_trainer(trainer)
    settings = TrainerSettings.of(trainer, settings)
    return _RULES[trainer](at_least_one("num_video_frames", num_video_frames), average_fps, settings)


def _cogvideo(n: int, fps: float, settings: TrainerSettings) -> Taken:
    return range(0, n, max(n // settings.num_frames, 1))[: settings.num_frames], ""


def _diffusers(n: int, fps: float, settings: TrainerSettings) -> Taken:
    indices, _ = _cogvideo(n, fps, settings)
    indices = indices[: _4k_plus_1(len(indices))]
    return (indices, "") if len(indices) > 1 else ([], f"{n} frames are too few: it keeps 4k + 1, and stops at one")


def _cogvideox_factory(n: int, fps: float, settings: TrainerSettings) -> Taken:
    if n < settings.num_frames:
        return [], f"{n} frames are too few: it stops at fewer than its frame bucket, {settings.num_frames}"
    return _cogvideo(n, fps, settings)


def _finetrainers(n: int, fps: float, settings: TrainerSettings) -> Taken:
    if n <= settings.num_frames:
        return range(n), ""
    import torch  # whose float32 rounding decides

    return torch.linspace(0, n - 1, settings.num_frames).long().tolist(), ""


def _sat(n: int, fps: float, settings: TrainerSettings) -> Taken:
    num_frames, rate, start, end = settings.num_frames, settings.frames_per_second or 8.0, SAT_SKIPPED_FRAMES, n
    at_fps = f"{n} frames at {fps:.6g} a second"
    if n / fps * rate > num_frames:
        end = int(start + num_frames / rate * fps)
        step = (end - start) // num_frames
        if not step:
            return [], f"{at_fps}: it stops at fewer than the {rate:g} a second that it is set to"
        wanted = range(start, end, step)
        if wanted[-1] >= n:
            return [], f"{at_fps}: it stops, because it wants frame {wanted[-1]} too (the first is 0)"
        return wanted[:num_frames], ""
    end -= SAT_SKIPPED_FRAMES
    if n > num_frames:
        wanted = range(start, end, max((end - start) // num_frames, 1))[:num_frames]
    else:
        wanted = range(start, start + _4k_plus_1(end - start))
    return (wanted, "") if wanted else ([], f"{n} frames are too few: it drops the first and the last 3")


def _videox_fun(n: int, fps: float, settings: TrainerSettings) -> Taken:
    stride = settings.stride or 1
    count = min(settings.num_frames, n // stride)
    if not count:
        return [], f"{n} frames are too few: it passes over clips of fewer than its stride, {stride}"
    length = (count - 1) * stride + 1
    return _stretches(n - length + 1, length, count), ""


def _videotuna(n: int, fps: float, settings: TrainerSettings) -> Taken:
    length = settings.num_frames * (settings.stride or 1)
    if n < length:
        return [], f"{n} frames are too few: it passes over clips of fewer than {length}"
    return _stretches(max(n - length, 1), length, settings.num_frames), ""


def _open_sora(n: int, fps: float, settings: TrainerSettings) -> Taken:
    fps, fps_max = round(fps, 3), settings.frames_per_second or 24.0  # rounded as in the table that it reads
    interval = 1 if fps < fps_max else math.ceil(fps / fps_max)
    count = _4k_plus_1(min(n // interval, settings.num_frames))
    if count < SMALLEST_BUCKET and n // interval != 1:
        return [], f"{n} frames at {fps:.6g} a second are too few: they fill none of its buckets"
    return _stretches(max(n - count * interval, 1), count * interval, count), ""


def _stretches(num_starts: int, length: int, count: int) -> Sequence[int]:
    """What may be seen of a clip where `count` frames are spread over a stretch that begins at 0 to num_starts - 1."""
    if count == 1:
        return range(num_starts)
    if num_starts * (count - 1) >= length:  # frames are no further apart than stretches begin
        return range(num_starts + length - 1)
    starts = np.arange(num_starts)
    return sorted({*np.linspace(starts, starts + length - 1, count, dtype=int).ravel().tolist()})


def _onetrainer(n: int, fps: float, settings: TrainerSettings) -> Taken:
    if n == 1:
        return [], "1 frame is too few: it drops the first, and stops"
    latest = n - 1 - (settings.num_frames - 1) * fps / ONETRAINER_RATE  # place at which it may begin, in frames
    return range(1, min(max(math.ceil(latest), 1) + settings.num_frames, n)), ""


def _first(n: int, fps: float, settings: TrainerSettings) -> Taken:
    return range(_4k_plus_1(min(n, settings.num_frames))), ""


def _first_all(n: int, fps: float, settings: TrainerSettings) -> Taken:
    if n < settings.num_frames:
        return [], f"{n} frames are too few: it leaves out clips of fewer than it is set to, {settings.num_frames}"
    return range(settings.num_frames), ""


def _diffusion_pipe(n: int, fps: float, settings: TrainerSettings) -> Taken:
    if (count := int(n * WAN_RATE / fps)) < settings.num_frames:
        return [], f"{n} frames at {fps:.6g} a second are too few: {_FEWER_AT_16.format(settings.num_frames)}"
    import torch  # whose float32 rounding decides

    return sorted({*torch.linspace(0, n - 1, count).int()[: settings.num_frames].tolist()}), ""


def _fastvideo(n: int, fps: float, settings: TrainerSettings) -> Taken:
    if n / fps > (longest := 5 * settings.num_frames / WAN_RATE):
        return [], f"{n / fps:.6g} s are too long: it leaves out clips of more than {longest:.6g} s"
    if len(indices := np.arange(0, n, fps / WAN_RATE).astype(int)) < settings.num_frames:
        return [], f"{n} frames at {fps:.6g} a second are too few: {_FEWER_AT_16.format(settings.num_frames)}"
    return sorted({*indices[: settings.num_frames].tolist()}), ""


def _ai_toolkit(n: int, fps: float, settings: TrainerSettings) -> Taken:
    interval = (n - 1) / max(settings.num_frames - 1, 1)
    return sorted({min(round(number * interval), n - 1) for number in range(settings.num_frames)}), ""


def _4k_plus_1(count: int) -> int:
    return max(count - (count - 1) % 4, 0)


_RULES: dict[str, Callable[[int, float, TrainerSettings], Taken]] = {
    "cogvideo": _cogvideo,
    "cogkit": _cogvideo,
    "diffusers": _diffusers,
    "cogvideox-factory": _cogvideox_factory,
    "finetrainers": _finetrainers,
    "sat": _sat,
    "videox-fun": _videox_fun,
    "diffsynth": _first,
    "musubi": _first,
    "ltx-2": _first_all,
    "diffusion-pipe": _diffusion_pipe,
    "fastvideo": _fastvideo,
    "ai-toolkit": _ai_toolkit,
    "simpletuner": _first_all,
    "onetrainer": _onetrainer,
    "videotuna": _videotuna,
    "open-sora": _open_sora,
}
TRAINERS = tuple(_RULES)
"""Names of the trainers, which are those of layouts in `capkit.export`."""
