"""CogVLM2-Video as transformers knows models: configuration, model, processor."""

from capkit.cogvlm2.attention import GROUPED_SDPA, use_grouped_sdpa, watch_attention
from capkit.cogvlm2.checkpoint import CheckpointError, CheckpointNotFound, fingerprint
from capkit.cogvlm2.configuration import CogVLM2VideoConfig, CogVLM2VisionConfig
from capkit.cogvlm2.linear import use_onednn
from capkit.cogvlm2.loading import is_out_of_memory
from capkit.cogvlm2.modeling import (
    CogVLM2VideoForConditionalGeneration,
    CogVLM2VideoModel,
    image_mask,
    place_features,
    rotary_position_ids,
)
from capkit.cogvlm2.processing import (
    CogVLM2VideoProcessor,
    one_prompt_each,
    pixels_to_frames,
    preprocess_frames,
)
from capkit.cogvlm2.prompt import DEFAULT_PROMPT, FRAME_NUMBERS, TEMPLATES, Prompt, PromptLike

__all__ = [
    "DEFAULT_PROMPT",
    "FRAME_NUMBERS",
    "GROUPED_SDPA",
    "TEMPLATES",
    "CheckpointError",
    "CheckpointNotFound",
    "CogVLM2VideoConfig",
    "CogVLM2VideoForConditionalGeneration",
    "CogVLM2VideoModel",
    "CogVLM2VideoProcessor",
    "CogVLM2VisionConfig",
    "Prompt",
    "PromptLike",
    "fingerprint",
    "image_mask",
    "is_out_of_memory",
    "one_prompt_each",
    "pixels_to_frames",
    "place_features",
    "preprocess_frames",
    "rotary_position_ids",
    "use_grouped_sdpa",
    "use_onednn",
    "watch_attention",
]
