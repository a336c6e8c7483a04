"""Layouts of a text file beside each clip for musubi-tuner, SimpleTuner, OneTrainer and ai-toolkit."""

from __future__ import annotations

import io
import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from capkit.export.layouts.base import toml_string
from capkit.export.layouts.text_files import TextFiles
from capkit.runs import TrainerSettings


class BesideClips(TextFiles):
    """`videos/dog.txt` beside `videos/dog.mp4`, as one trainer reads it.

    Attributes:
        newline: how the trainer opens the file: None turns every line end into "\\n", "" leaves them.
    """

    clip_folder = caption_folder = "videos"
    newline: str | None = None

    @abstractmethod
    def split(self, content: str) -> list[str]:
        """The captions that the trainer takes from a file."""

    def as_read(self, text: str) -> list[str]:
        return self.split(io.StringIO(self.content([text]), newline=self.newline).read())

    def read(self, root: Path) -> Iterator[tuple[Path, str]]:
        for name in sorted(os.listdir(root / self.clip_folder)):
            clip = root / self.clip_folder / name
            if clip.suffix in self.clip_suffixes:
                with open(clip.with_suffix(".txt"), encoding="utf-8", newline=self.newline) as file:
                    content = file.read()
                yield from ((clip, text) for text in self.split(content))


class Musubi(BesideClips):
    """musubi-tuner: a text file beside each clip, in `videos/`, and a TOML beside the root that names the folder.

    The caption is the entire UTF-8 file without surrounding white space; "\\r" is read as "\\n". A clip without a file
    stops it. Clips shorter than `target_frames` would be left out in silence, so `frame_extraction` is "full": of every
    clip the first 4 N + 1 frames, at most `max_frames`, read with PyAV. Latents are cached by the clip's stem. Facts:
    kohya-ss/musubi-tuner 30c658c, src/musubi_tuner/dataset/datasources.py, media_utils.py, image_video_dataset.py and
    config_utils.py, docs/dataset_config.md and docs/wan.md.
    """

    name = "musubi"
    trainer = "musubi-tuner"
    config_suffix = ".toml"
    window_rule = "musubi"
    clip_suffixes = frozenset((".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"))
    launch = (
        "python src/musubi_tuner/wan_cache_latents.py --dataset_config {config} --vae VAE_FILE && "
        "python src/musubi_tuner/wan_cache_text_encoder_outputs.py --dataset_config {config} --t5 T5_FILE "
        "--batch_size 16 && accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 "
        "src/musubi_tuner/wan_train_network.py --task t2v-1.3B --dit DIT_FILE --dataset_config {config} --sdpa "
        "--mixed_precision bf16 --fp8_base --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing "
        "--network_module networks.lora_wan --network_dim 32 --timestep_sampling shift --discrete_flow_shift 3.0 "
        "--max_train_epochs 16 --output_dir OUTPUT_DIR --output_name NAME  # in musubi-tuner"
    )

    def split(self, content: str) -> list[str]:
        return [content.strip()]

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        return musubi_toml("video_directory", root / self.clip_folder, root, settings)


def musubi_toml(source: str, path: Path, root: Path, settings: TrainerSettings) -> str:
    """musubi-tuner's data set: where the clips are, by `video_directory` or `video_jsonl_file`."""
    return (
        "# Written by capkit's export.\n"
        '[general]\nresolution = [832, 480]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n\n'
        f"[[datasets]]\n{source} = {toml_string(str(path))}\ncache_directory = {toml_string(str(root / 'cache'))}\n"
        f'frame_extraction = "full"\nmax_frames = {settings.num_frames}\n'
    )


class SimpleTuner(BesideClips):
    """SimpleTuner: a text file beside each clip, in `videos/`, and a data backend in JSON beside the root.

    The lines of a file are alternatives: it is broken at "\\n" only, empty lines are dropped, and nothing is stripped.
    Of each clip the first `num_frames` are used; clips of fewer than `min_frames` are left out with a warning. Facts:
    bghira/SimpleTuner bc8e6ab,
    simpletuner/helpers/prompts.py (prepare_instance_prompt_from_textfile), simpletuner/helpers/training/__init__.py and
    documentation/DATALOADER.md; captions can be dropped with `--caption_dropout_probability`.
    """

    name = "simpletuner"
    trainer = "SimpleTuner"
    holds_several = True
    config_suffix = ".json"
    newline = ""
    window_rule = "simpletuner"
    takes_short = False
    clip_suffixes = Musubi.clip_suffixes | {".3gp", ".ogv"}
    launch = "simpletuner train  # in SimpleTuner, with {config} as data_backend_config in config/config.json"

    def content(self, texts: Sequence[str]) -> str:
        return "\n".join(texts)

    def split(self, content: str) -> list[str]:
        return [line for line in content.split("\n") if line] if "\n" in content else [content]

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        frames = {"num_frames": settings.num_frames, "min_frames": settings.num_frames}
        clips = {"id": "capkit", "type": "local", "dataset_type": "video", "crop": False, "resolution": 480}
        clips |= {"resolution_type": "pixel_area", "cache_dir_vae": str(root / "cache" / "vae"), "video": frames}
        clips |= {"instance_data_dir": str(root / self.clip_folder), "caption_strategy": "textfile"}
        clips |= {"metadata_backend": "discovery"}
        texts = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True}
        return json.dumps([clips, texts | {"cache_dir": str(root / "cache" / "text")}]) + "\n"


class OneTrainer(BesideClips):
    """OneTrainer: a text file beside each clip, in `videos/`, and a concept in JSON beside the root.

    The lines of a UTF-8 file are alternatives, one drawn for each step; they are stripped, and empty ones dropped.
    Commas stay while the concept's tag shuffling and dropping are off, as they are here. A random stretch of a clip is
    read with PyAV, as long as `frames` in the configuration file says; a clip of a single frame stops it. Facts:
    Nerogar/OneTrainer 23df383, modules/dataLoader/mixin/DataLoaderText2ImageMixin.py, modules/util/config/
    ConceptConfig.py, modules/util/path_util.py, modules/util/args/TrainArgs.py and scripts/train.py; Nerogar/mgds
    3a6994a, LoadMultipleTexts.py, SelectRandomText.py and LoadVideo.py.
    """

    name = "onetrainer"
    trainer = "OneTrainer"
    window_rule = "onetrainer"
    fewest_frames = 2
    holds_several = True
    config_suffix = ".json"
    clip_suffixes = frozenset((".webm", ".mkv", ".flv", ".avi", ".mov", ".wmv", ".mp4", ".mpeg", ".m4v"))
    launch = (
        "python scripts/train.py --config-path CONFIG_FILE --config-value concept_file_name={config} "
        "--config-value frames={num_frames}  # in OneTrainer"
    )

    def split(self, content: str) -> list[str]:
        return [line for line in map(str.strip, content.split("\n")) if line] or [""]

    def config(self, root: Path, trigger_word: str, settings: TrainerSettings) -> str:
        concept = {"__version": 2, "name": "capkit", "path": str(root / self.clip_folder), "enabled": True}
        return json.dumps([concept]) + "\n"


class AIToolkit(BesideClips):
    """ai-toolkit: a text file beside each clip, in `videos/`.

    The caption is the entire UTF-8 file, not stripped; "\\r" is read as "\\n". It is broken at every comma and joined
    with ", ", so that "a, b" would become "a,  b": the space behind a comma is left out in the file. A comma without a
    space behind it, as in 1,000, cannot be held, nor "[trigger]" and "[name]", which it replaces. Of every clip
    `num_frames` frames are taken, spread over it, with OpenCV or else PyAV. Facts: ostris/ai-toolkit 27a03a9,
    toolkit/dataloader_mixins.py (load_caption, get_caption), toolkit/prompt_utils.py and toolkit/data_loader.py;
    captions can be dropped with `caption_dropout_rate`.
    """

    name = "ai-toolkit"
    trainer = "ai-toolkit"
    window_rule = "ai-toolkit"
    clip_suffixes = frozenset((".mp4", ".avi", ".mov", ".webm", ".mkv", ".wmv", ".m4v", ".flv"))
    latents = ("videos/_latent_cache", "videos/_t_e_cache")
    launch = (
        'python run.py CONFIG_FILE  # in ai-toolkit, with datasets: [{{folder_path: "{path}/videos", caption_ext: txt, '
        "num_frames: {num_frames}}}] in the file"
    )

    def content(self, texts: Sequence[str]) -> str:
        return texts[0].replace(", ", ",")

    def split(self, content: str) -> list[str]:
        return [", ".join(content.split(",")).replace("[trigger]", "").replace("[name]", "")]
