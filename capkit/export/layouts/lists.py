"""Layouts of two lists, one line a clip: CogVideo's finetune/, diffusers, cogvideox-factory.

All three read UTF-8 with `readlines()`, which breaks lines at "\\n", "\\r\\n" and a lone "\\r", strip every line and
drop blank ones; a caption with a line break would shift all captions after it. Clips are relative to the folder of
`videos.txt`. The lists must have the same length, and all clips must exist.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from capkit.export.layouts.base import Layout, Pair, write_text


class TwoLists(Layout):
    """`prompts.txt` and `videos.txt`, and the clips in `videos/`."""

    tables = ("prompts.txt", "videos.txt")

    def as_read(self, text: str) -> list[str]:
        return list(_lines(io.StringIO(text, newline=None)))

    def write(self, root: Path, pairs: Iterable[Pair]) -> None:
        write_text(root / "prompts.txt", (f"{pair.text}\n" for pair in pairs))
        write_text(root / "videos.txt", (f"{self.clip_folder}/{pair.name}\n" for pair in pairs))

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        with (
            open(root / "prompts.txt", encoding="utf-8") as prompts,
            open(root / "videos.txt", encoding="utf-8") as clips,
        ):
            num_captions, num_clips = (sum(1 for _ in _lines(file)) for file in (prompts, clips))
            if num_captions != num_clips:
                raise ValueError(f"{num_captions} captions and {num_clips} clips")
            prompts.seek(0)
            clips.seek(0)
            for line, caption in zip(_lines(clips), _lines(prompts), strict=True):
                if not (root / line).is_file():
                    raise ValueError(f"{root / line} is not a file")
                yield root / line, caption


def _lines_of(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from _lines(file)


def _lines(file: Iterable[str]) -> Iterator[str]:
    return (line.strip() for line in file if line.strip())


class CogVideo(TwoLists):
    """zai-org/CogVideo, `finetune/`: one line a clip in `prompts.txt` and `videos.txt`, the clips in `videos/`.

    Captions must not contain line breaks. Latents and first frames are cached by the clip's stem.
    """

    name = "cogvideo"
    trainer = "CogVideo's finetune/"
    latents = ("cache", "first_frames", ".cache")
    launch = (
        "accelerate launch train.py --model_path THUDM/CogVideoX1.5-5B --model_name cogvideox1.5-t2v "
        "--model_type t2v --training_type lora --train_resolution 81x768x1360 --train_epochs 10 "
        "--mixed_precision bf16 --data_root {root} --caption_column prompts.txt --video_column videos.txt "
        "--output_dir OUTPUT_DIR  # in CogVideo/finetune"
    )


class Diffusers(TwoLists):
    """diffusers, `examples/cogvideo`: one line a clip in `prompts.txt` and `videos.txt`, the clips in `videos/`.

    Captions must not contain line breaks. `--id_token` is put before them without a space, so it must end with one.
    """

    name = "diffusers"
    trainer = "diffusers' train_cogvideox_lora.py"
    adds_trigger = True
    trigger_end = " "
    launch = (
        "accelerate launch examples/cogvideo/train_cogvideox_lora.py "
        "--pretrained_model_name_or_path THUDM/CogVideoX-5b --instance_data_root {root} "
        "--caption_column prompts.txt --video_column videos.txt {trigger}--height 480 --width 720 --fps 8 "
        "--max_num_frames 49 --train_batch_size 1 --num_train_epochs 30 --mixed_precision bf16 "
        "--output_dir OUTPUT_DIR  # in diffusers"
    )


class CogVideoXFactory(TwoLists):
    """cogvideox-factory, now finetrainers' `examples/_legacy`: two lists as for CogVideo's `finetune/`.

    Its data preparation caches latents beside the folder of clips.
    """

    name = "cogvideox-factory"
    trainer = "cogvideox-factory"
    latents = ("video_latents", "image_latents", "prompt_embeds", "cache", ".cache")
    adds_trigger = True
    launch = (
        "accelerate launch training/cogvideox_text_to_video_lora.py "
        "--pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root {root} --caption_column prompts.txt "
        "--video_column videos.txt {trigger}--height_buckets 480 --width_buckets 720 --frame_buckets 49 "
        "--mixed_precision bf16 --output_dir OUTPUT_DIR  # in cogvideox-factory"
    )
