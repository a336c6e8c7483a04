"""Two lists, a line each for captions and clips: CogVideo's finetune/, diffusers, cogvideox-factory.

All three read UTF-8 with `readlines()`, which breaks lines at "\\n", "\\r\\n" and a lone "\\r", strip every line and
drop those that are blank; a caption with a line break would move all captions after it. Clips stand relative to the
folder of `videos.txt`. Numbers of lines must be equal, and all clips there.
"""

from __future__ import annotations

import io
from pathlib import Path
from shlex import quote

from capkit.export.base import Layout, Pair, write_text


class TwoLists(Layout):
    """`prompts.txt` and `videos.txt`, and the clips in `videos/`."""

    def as_read(self, text: str) -> list[str]:
        return _lines(io.StringIO(text, newline=None))

    def write(self, root: Path, pairs: list[Pair]) -> None:
        write_text(root / "prompts.txt", "".join(f"{pair.text}\n" for pair in pairs))
        write_text(root / "videos.txt", "".join(f"{self.clip_folder}/{pair.name}\n" for pair in pairs))

    def read(self, root: Path) -> list[tuple[Path, str]]:
        with open(root / "prompts.txt", encoding="utf-8") as file:
            captions = _lines(file)
        with open(root / "videos.txt", encoding="utf-8") as file:
            clips = [root / line for line in _lines(file)]
        if len(captions) != len(clips):
            raise ValueError(f"{len(captions)} captions and {len(clips)} clips")
        if missing := [clip for clip in clips if not clip.is_file()]:
            raise ValueError(f"{missing[0]} is no file")
        return list(zip(clips, captions, strict=True))

    def caption_files(self, names: list[str]) -> set[str]:
        return {"prompts.txt", "videos.txt"}


def _lines(file) -> list[str]:
    return [line.strip() for line in file.readlines() if len(line.strip()) > 0]


class CogVideo(TwoLists):
    """zai-org/CogVideo, `finetune/`: a line for each clip in `prompts.txt` and `videos.txt`, the clips in `videos/`.

    Captions have no line breaks of their own. Latents and first frames are kept by the clip's stem.
    """

    name = "cogvideo"
    trainer = "CogVideo's finetune/"
    latents = ("cache", "first_frames", ".cache")

    def command(self, root: Path, trigger_word: str) -> str:
        return (
            "accelerate launch train.py --model_path THUDM/CogVideoX1.5-5B --model_name cogvideox1.5-t2v "
            "--model_type t2v --training_type lora --train_resolution 81x768x1360 --train_epochs 10 "
            f"--mixed_precision bf16 --data_root {quote(str(root))} --caption_column prompts.txt "
            "--video_column videos.txt --output_dir OUTPUT_DIR  # in CogVideo/finetune"
        )


class Diffusers(TwoLists):
    """diffusers, `examples/cogvideo`: a line for each clip in `prompts.txt` and `videos.txt`, the clips in `videos/`.

    Captions have no line breaks of their own. `--id_token` is put before them without a space: it must have one itself.
    """

    name = "diffusers"
    trainer = "diffusers' train_cogvideox_lora.py"
    adds_trigger = True

    def command(self, root: Path, trigger_word: str) -> str:
        trigger = f"--id_token {quote(trigger_word + ' ')} " if trigger_word else ""
        return (
            "accelerate launch examples/cogvideo/train_cogvideox_lora.py "
            "--pretrained_model_name_or_path THUDM/CogVideoX-5b "
            f"--instance_data_root {quote(str(root))} --caption_column prompts.txt --video_column videos.txt {trigger}"
            "--height 480 --width 720 --fps 8 --max_num_frames 49 --train_batch_size 1 --num_train_epochs 30 "
            "--mixed_precision bf16 --output_dir OUTPUT_DIR  # in diffusers"
        )


class CogVideoXFactory(TwoLists):
    """cogvideox-factory, now finetrainers' `examples/_legacy`: two lists as for CogVideo's `finetune/`.

    Its own preparation keeps latents beside the folder of clips.
    """

    name = "cogvideox-factory"
    trainer = "cogvideox-factory"
    latents = ("video_latents", "image_latents", "prompt_embeds", "cache", ".cache")
    adds_trigger = True

    def command(self, root: Path, trigger_word: str) -> str:
        trigger = f"--id_token {quote(trigger_word)} " if trigger_word else ""
        return (
            "accelerate launch training/cogvideox_text_to_video_lora.py "
            f"--pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root {quote(str(root))} "
            f"--caption_column prompts.txt --video_column videos.txt {trigger}--height_buckets 480 "
            "--width_buckets 720 --frame_buckets 49 --mixed_precision bf16 --output_dir OUTPUT_DIR"
            "  # in cogvideox-factory"
        )
