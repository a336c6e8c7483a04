"""CogVLM2-Video as transformers knows models: configuration, model, processor."""

from capkit.cogvlm2.configuration import CogVLM2VideoConfig, CogVLM2VisionConfig
from capkit.cogvlm2.loading import CheckpointError
from capkit.cogvlm2.modeling import CogVLM2VideoForConditionalGeneration, CogVLM2VideoModel
from capkit.cogvlm2.processing import DEFAULT_PROMPT, CogVLM2VideoProcessor

__all__ = [
    "DEFAULT_PROMPT",
    "CheckpointError",
    "CogVLM2VideoConfig",
    "CogVLM2VideoForConditionalGeneration",
    "CogVLM2VideoModel",
    "CogVLM2VideoProcessor",
    "CogVLM2VisionConfig",
]
