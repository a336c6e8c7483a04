"""Random models of three sizes, clips, and the baseline: captioning as people do it without capkit."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerFast

from capkit.captioning import Captioner, Chooser, Decoding, PreallocatedCache, draw_key, prefill, until_end
from capkit.cogvlm2 import (
    DEFAULT_PROMPT,
    CogVLM2VideoConfig,
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoProcessor,
    Prompt,
    loading,
    rotary_position_ids,
    use_grouped_sdpa,
    use_onednn,
)
from capkit.video import Clip

PROMPTS = (
    DEFAULT_PROMPT,
    "Describe this video in one sentence.",
    "What happens in this video?",
    "Describe how the subjects and the camera move.",
    "List the objects in this video.",
    "Describe the place and the light.",
    "Describe only what can be seen.",
    "What changes from the first frame to the last?",
)
# The first four prompts and decodings are those of the sweep of 4 x 4.
DECODINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"repetition_penalty": 1.2},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.0, "seed": 4},
    {"temperature": 1.0, "top_k": 50, "seed": 5},
    {"no_repeat_ngram_size": 3},
)


@dataclass(frozen=True)
class Size:
    """A model's shape, and the amount of work to measure.

    Attributes:
        config: fields of `CogVLM2VideoConfig`.
        num_frames, height, width: of a clip.
        num_tokens: of a caption.
        num_sweep_tokens: of a caption in a sweep.
        num_long_tokens: of a long caption, alone, in the largest batch and in sweeps; 0: `num_tokens` are long already.
        batches: numbers of clips in a batch.
        large_frame: height and width of the frames that preprocessing is measured with.
        num_minutes: of the video that reading is measured with.
        repeats: of short measurements, whose median counts.
        num_clips: different clips; larger batches repeat them.
        num_plain_cells: cells of a sweep that the baseline captions; the others are assumed to take as long.
        num_grounded: captions to be grounded together, of `num_grounded_tokens`.
        num_sweeps, num_loads: repeats of these.
    """

    config: dict[str, Any] = field(default_factory=dict)
    num_frames: int = 24
    height: int = 480
    width: int = 854
    num_tokens: int = 64
    num_sweep_tokens: int = 32
    num_long_tokens: int = 200
    batches: tuple[int, ...] = (8, 16, 32)
    large_frame: tuple[int, int] = (1080, 1920)
    num_minutes: int = 60
    repeats: int = 3
    num_clips: int = 8
    num_plain_cells: int = 64
    num_grounded: int = 64
    num_grounded_tokens: int = 192
    num_sweeps: int = 3
    num_loads: int = 3


def _config(
    vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: tuple[int, int], *vision: int
) -> dict[str, Any]:
    fields = "hidden_size num_hidden_layers num_heads intermediate_size image_size num_positions".split()
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads[0],
        "num_multi_query_heads": num_heads[1],
        "initializer_range": 1.28 / hidden_size**0.5,  # published: 0.02 x 64; with less, all clips get one caption
        "vision_config": dict(zip(fields, vision, strict=True)),
    }


SIZES = {
    "tiny": Size(
        _config(640, 64, 192, 2, (4, 2), 32, 2, 2, 64, 56, 17),
        num_frames=8,
        height=96,
        width=128,
        num_tokens=8,
        num_sweep_tokens=8,
        num_long_tokens=16,
        batches=(8,),
        num_grounded=8,
        num_grounded_tokens=24,
        num_minutes=1,
    ),
    "small": Size(_config(32000, 512, 1536, 8, (8, 2), 256, 6, 4, 1024, 224, 257)),
    "full": Size(  # takes some minutes on a GPU
        num_tokens=200,
        num_sweep_tokens=200,
        num_long_tokens=0,
        batches=(8, 32),
        num_clips=2,
        num_plain_cells=2,
        num_sweeps=1,
        num_loads=1,
    ),
}


# ---- what is measured ------------------------------------------------------------------------------------------------


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of any size, without a download: words of the prompts and numbers of frames are a token each, as in
    Llama-3's; most other tokens are placeholders."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 3, initial_alphabet=alphabet, show_progress=False)
    texts = [f"Question: {prompt} Answer:" for prompt in PROMPTS]
    tokenizer.train_from_iterator(9 * [*texts, *map(str, range(100))], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"Ġword{number}": number for number in range(len(vocabulary), vocab_size - 3)}
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), padding_side="left", **special
    )


def make_captioner(
    size: Size, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", seed: int = 0
) -> tuple[CogVLM2VideoForConditionalGeneration, Captioner]:
    """A random model, made on the device: as transformers runs it, and a captioner with the same weights.

    Raises:
        ValueError: unknown device or dtype.
        CheckpointError: the weights do not fit into memory.
    """
    device = loading.choose_device(device)
    dtype = loading.choose_dtype(dtype, device)
    config = CogVLM2VideoConfig(**size.config)
    tokenizer = make_tokenizer(config.vocab_size)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        weights = CogVLM2VideoForConditionalGeneration(config).published_state_dict()
    loading.check_memory(Path("the random model"), weights, device, dtype, None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(seed)
        with torch.device(device), loading.translate_errors(Path("the random model"), device):
            model = CogVLM2VideoForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    vision: Any = config.vision_config
    processor = CogVLM2VideoProcessor(tokenizer, vision.image_size, config.tokens_per_frame)
    quick = copy.deepcopy(model, shared)
    use_onednn(quick)  # in place
    use_grouped_sdpa(quick)
    return model, Captioner(quick, processor, "random weights")


def decoder_weights(model: CogVLM2VideoForConditionalGeneration) -> list[torch.Tensor]:
    """All that is read for each token: the decoder's layers, the last norm and the head."""
    modules: tuple[torch.nn.Module, ...] = model.model.layers, model.model.norm, model.lm_head
    return [weight for module in modules for weight in module.parameters()]


def make_clip(size: Size, seed: int, frame: tuple[int, int] | None = None) -> Clip:
    """A clip of random coloured blocks; `frame` is another height and width than the size's."""
    height, width = frame or (size.height, size.width)
    side = max(height, width) // 16 + 1
    blocks = np.random.default_rng(seed).integers(0, 256, (size.num_frames, 16, 16, 3), dtype=np.uint8)
    return Clip.from_frames(blocks.repeat(side, 1).repeat(side, 2)[:, :height, :width].copy())


def prefilled_values(
    model: CogVLM2VideoForConditionalGeneration, ids: list[int], features: torch.Tensor
) -> torch.Tensor:
    """Read a prompt into a new cache as capkit does; returns values of its last layer."""
    cache = PreallocatedCache(model.config)
    prefill(model, cache, ids, features)
    return cache.layers[-1].values


def decode(model: CogVLM2VideoForConditionalGeneration, cache: DynamicCache, num_rows: int) -> None:
    """Ten more tokens of each row, at any positions: these do not matter to the time."""
    ids = torch.zeros(num_rows, 1, dtype=torch.long, device=model.device)
    for _ in range(10):
        model(input_ids=ids, position_ids=ids + 100, past_key_values=cache, use_cache=True)


# ---- the baseline: what people run today. Frozen: do not make it faster ---------------------------------------------


def plain_pixels(frames: np.ndarray, image_size: int) -> torch.Tensor:
    """All frames normalised at full size as floats, then resized and cropped: float32 (T, 3, S, S)."""
    video = torch.as_tensor(frames).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    video = (video - mean) / std
    height, width = video.shape[2:]
    short = min(height, width)
    resized = (int(height / short * image_size), int(width / short * image_size))
    video = F.interpolate(video, size=resized, mode="bilinear", align_corners=False)
    top, left = (round((side - image_size) / 2) for side in resized)
    return video[:, :, top : top + image_size, left : left + image_size].contiguous()


def plain_prefilled_values(
    model: CogVLM2VideoForConditionalGeneration, ids: list[int], features: torch.Tensor
) -> torch.Tensor:
    """Read a prompt into a new cache as transformers does; returns values of its last layer."""
    all_ids = torch.tensor([ids], device=model.device)
    cache = DynamicCache(config=model.config)
    model.model(
        inputs_embeds=model.model.embed(all_ids, video_features=features),
        attention_mask=torch.ones_like(all_ids),
        position_ids=rotary_position_ids(all_ids, model.config.video_token_id),
        past_key_values=cache,
        use_cache=True,
    )
    layer: Any = cache.layers[-1]
    return layer.values


@torch.inference_mode()
def plain_caption(
    model: CogVLM2VideoForConditionalGeneration,
    processor: CogVLM2VideoProcessor,
    clip: Clip,
    prompt: str,
    decoding: Decoding,
) -> list[int]:
    """New token ids of one clip, from one call of `generate()` with its own dynamic cache; nothing shared or reused.

    transformers applies penalties to the prompt too and samples differently. All but greedy search chooses by capkit's
    rule, which costs about the same, so that tokens can be compared.
    """
    ids = torch.tensor([processor.prompt_ids(clip, Prompt(prompt))], device=model.device)
    config = model.config
    new_ids = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=plain_pixels(clip.frames, processor.image_size).to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ),
        logits_processor=LogitsProcessorList(
            [] if len(decoding.to_dict()) == 1 else [Chooser([decoding], [draw_key(clip)], ids.shape[1])]
        ),
    )[0, ids.shape[1] :]
    return until_end(new_ids.tolist(), config)
