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

    Captions must not contain line breaks. Latents and first frames are cached by the clip's stem. Clips are read with
    decord. Facts: zai-org/CogVideo 7a1af71, finetune/datasets/utils.py and finetune/schemas/args.py. Flags without
    which it stops: --model_path --model_name --model_type --training_type --output_dir --data_root --caption_column
    --video_column --train_resolution --report_to. Others here: --train_epochs --mixed_precision. Of the resolution,
    frames x height x width, the frames must be 8 N + 1.
    """

    name = "cogvideo"
    trainer = "CogVideo's finetune/"
    decoder = "decord"
    window_rule = "cogvideo"
    latents = ("cache", "first_frames", ".cache")
    launch = (
        "accelerate launch train.py --model_path THUDM/CogVideoX1.5-5B --model_name cogvideox1.5-t2v "
        "--model_type t2v --training_type lora --train_resolution {num_frames}x768x1360 --train_epochs 10 "
        "--mixed_precision bf16 --report_to tensorboard --data_root {root} --caption_column prompts.txt "
        "--video_column videos.txt --output_dir OUTPUT_DIR  # in CogVideo/finetune"
    )


class Diffusers(TwoLists):
    """diffusers, `examples/cogvideo`: one line a clip in `prompts.txt` and `videos.txt`, the clips in `videos/`.

    Captions must not contain line breaks. `--id_token` is put before them without a space, so it must end with one.
    Clips are read with decord, all before training begins. Facts: huggingface/diffusers 02303d1,
    examples/cogvideo/train_cogvideox_lora.py. Its flags here: --pretrained_model_name_or_path --instance_data_root
    --caption_column --video_column --id_token --height --width --fps --max_num_frames --train_batch_size
    --num_train_epochs --mixed_precision --output_dir.
    """

    name = "diffusers"
    trainer = "diffusers' train_cogvideox_lora.py"
    decoder = "decord"
    window_rule = "diffusers"
    adds_trigger = True
    trigger_end = " "
    launch = (
        "accelerate launch examples/cogvideo/train_cogvideox_lora.py "
        "--pretrained_model_name_or_path THUDM/CogVideoX-5b --instance_data_root {root} "
        "--caption_column prompts.txt --video_column videos.txt {trigger}--height 480 --width 720 --fps 8 "
        "--max_num_frames {num_frames} --train_batch_size 1 --num_train_epochs 30 --mixed_precision bf16 "
        "--output_dir OUTPUT_DIR  # in diffusers"
    )


class CogVideoXFactory(TwoLists):
    """cogvideox-factory, now finetrainers' `examples/_legacy`: two lists as for CogVideo's `finetune/`.

    Its data preparation caches latents beside the folder of clips, which are read with decord. Facts:
    a-r-r-o-w/cogvideox-factory 223add1, training/cogvideox/dataset.py and args.py (the same files are in
    a-r-r-o-w/finetrainers f476c37). Its flags here: --pretrained_model_name_or_path --data_root --caption_column
    --video_column --id_token --height_buckets --width_buckets --frame_buckets --max_num_frames --train_batch_size
    --mixed_precision --output_dir.
    """

    name = "cogvideox-factory"
    trainer = "cogvideox-factory"
    decoder = "decord"
    window_rule = "cogvideox-factory"
    latents = ("video_latents", "image_latents", "prompt_embeds", "cache", ".cache")
    adds_trigger = True
    launch = (
        "accelerate launch training/cogvideox/cogvideox_text_to_video_lora.py "
        "--pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root {root} --caption_column prompts.txt "
        "--video_column videos.txt {trigger}--height_buckets 480 --width_buckets 720 --frame_buckets {num_frames} "
        "--max_num_frames {num_frames} --train_batch_size 1 --mixed_precision bf16 --output_dir OUTPUT_DIR"
        "  # in cogvideox-factory"
    )
