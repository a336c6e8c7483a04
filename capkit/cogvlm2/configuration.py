"""CogVLM2-Video's configuration: Llama's fields, and the vision tower's under `vision_config`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, PreTrainedConfig, __version__


class CogVLM2VisionConfig(PreTrainedConfig):
    """EVA2-CLIP-E, which encodes each frame. Defaults: `config.json` of `THUDM/cogvlm2-llama3-caption`."""

    model_type = "cogvlm2_video_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    num_hidden_layers: int = 63
    num_heads: int = 16
    intermediate_size: int = 15360
    image_size: int = 224
    patch_size: int = 14
    num_positions: int = 257
    in_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout_prob: float = 0.0


class CogVLM2VideoConfig(LlamaConfig):
    """Configuration of CogVLM2-Video (`THUDM/cogvlm2-llama3-caption` and its siblings for video).

    The published `config.json` is Llama's, flat, with `num_multi_query_heads` for `num_key_value_heads`, a
    `vision_config`, and no `model_type`; it is read and written in this form. The defaults are the published values;
    the rotary base 500000 is a constant in the original's code and not in its `config.json`.
    """

    model_type = "cogvlm2_video"
    attribute_map = {"num_multi_query_heads": "num_key_value_heads"}
    sub_configs = {"vision_config": CogVLM2VisionConfig}
    default_theta = 500_000.0

    vocab_size: int = 128256
    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    pad_token_id: int = 128002
    template_version: str = "base"
    if TYPE_CHECKING:
        vision_config: CogVLM2VisionConfig
    else:  # what may be passed; checked at run time
        vision_config: dict | CogVLM2VisionConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, CogVLM2VisionConfig):
            self.vision_config = CogVLM2VisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)

    @property
    def video_token_id(self) -> int:
        """The id at every image position, `<|reserved_special_token_0|>`, which is also the padding token."""
        return self.pad_token_id

    @property
    def tokens_per_frame(self) -> int:
        """Positions of one frame: its patches pooled 2 x 2, and a begin and an end embedding (published model: 66)."""
        vision = self.vision_config
        return (vision.image_size // vision.patch_size // 2) ** 2 + 2

    def to_json_string(self, use_diff: bool = True) -> str:
        """`config.json` in the published layout, without `auto_map`. `use_diff` has no effect."""
        config = {name: getattr(self, name) for name in _PUBLISHED_FIELDS}
        config |= {
            "architectures": ["CogVLMVideoForCausalLM"],
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "transformers_version": __version__,
            "vision_config": {name: getattr(self.vision_config, name) for name in _PUBLISHED_VISION_FIELDS},
        }
        theta = self.rope_parameters["rope_theta"]  # LlamaConfig has filled it in
        if theta != self.default_theta:
            config["rope_theta"] = theta
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


_PUBLISHED_FIELDS = (
    "vocab_size bos_token_id eos_token_id pad_token_id hidden_act initializer_range max_position_embeddings "
    "rms_norm_eps template_version tie_word_embeddings use_cache hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_multi_query_heads"
).split()
_PUBLISHED_VISION_FIELDS = tuple(CogVLM2VisionConfig.__annotations__)
