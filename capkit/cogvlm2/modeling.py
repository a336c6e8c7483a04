"""CogVLM2-Video: a vision tower in front of transformers' Llama, with rotary positions of its own.

Modules are named as in the published checkpoint; only the decoder's fused and renamed weights need converting.
Sources: the published `config.json` and modeling files of `THUDM/cogvlm2-llama3-caption`, and arXiv 2408.16500.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, GenerationMixin, LlamaModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils import is_accelerate_available

from capkit.cogvlm2 import checkpoint, loading
from capkit.cogvlm2.attention import use_grouped_sdpa
from capkit.cogvlm2.configuration import CogVLM2VideoConfig
from capkit.cogvlm2.linear import use_onednn
from capkit.cogvlm2.vision import PatchEmbedding, VisionTower

# From pixels (N, 3, S, S), and a function that encodes them, to features (N, tokens, D).
FrameFeatures = Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]
FRAMES_PER_CHUNK = 64  # in the vision tower, so that its memory does not grow with clips and batches


class _SplitQueryKeyValue(ConversionOps):
    """Split the published fused weight: rows of all query heads, then the key heads, then the value heads."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        config, fused = kwargs["config"], next(iter(input_dict.values()))
        fused = fused[0] if isinstance(fused, list) else fused
        key_rows = config.num_key_value_heads * config.head_dim
        rows = [config.num_attention_heads * config.head_dim, key_rows, key_rows]
        return {name: part.contiguous() for name, part in zip(target_patterns, fused.split(rows), strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _JoinQueryKeyValue()


class _JoinQueryKeyValue(ConversionOps):
    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        parts = [input_dict[name] for name in source_patterns]
        return {target_patterns[0]: torch.cat([part[0] if isinstance(part, list) else part for part in parts])}

    @property
    def reverse_op(self) -> ConversionOps:
        return _SplitQueryKeyValue()


# Patterns are complete: a short one such as `mlp.language_mlp.` -> `mlp.`, reversed on saving, would rename weights of
# the vision tower too.
register_checkpoint_conversion_mapping(
    CogVLM2VideoConfig.model_type,
    [
        WeightRenaming("self_attn.language_expert_dense.", "self_attn.o_proj."),
        WeightRenaming("mlp.language_mlp.gate_proj.", "mlp.gate_proj."),
        WeightRenaming("mlp.language_mlp.up_proj.", "mlp.up_proj."),
        WeightRenaming("mlp.language_mlp.down_proj.", "mlp.down_proj."),
        WeightConverter(
            "self_attn.language_expert_query_key_value.weight",
            ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            operations=[_SplitQueryKeyValue()],
        ),
    ],
    overwrite=True,  # so that this module can be reloaded
)


def padding_mask(input_ids: torch.Tensor, video_token_id: int) -> torch.Tensor:
    """Attention mask from ids, int64 (B, N): 0 on left padding, else 1.

    Padding and image positions have the same id, `video_token_id`; padding ends where another id (bos) comes first.
    """
    return ((input_ids != video_token_id).cumsum(-1) > 0).long()


def image_mask(input_ids: torch.Tensor, video_token_id: int) -> torch.Tensor:
    """True at the image positions of complete, left-padded sequences: bool (B, N) from int64 (B, N)."""
    return (padding_mask(input_ids, video_token_id) == 1) & (input_ids == video_token_id)


def place_features(embeds: torch.Tensor, image: torch.Tensor, video_features: torch.Tensor) -> torch.Tensor:
    """Put the frames' features into embeddings (B, N, hidden_size), at the True positions of `image`, bool (B, N).

    Raises:
        ValueError: image positions and features differ in number.
    """
    features = video_features.flatten(0, 1)
    if (num_positions := int(image.sum())) != len(features):
        raise ValueError(f"the ids have {num_positions} image positions, the frames have {len(features)} features")
    return embeds.masked_scatter(image[..., None], features.to(embeds.dtype))


def rotary_position_ids(input_ids: torch.Tensor, video_token_id: int) -> torch.Tensor:
    """Rotary positions of complete sequences, as in the original's `build_position_ids`.

    All image positions of a frame but its first and last share one position: bos 0, frame 0 is 1, 2, 2, ..., 2, 3, its
    number 4, and so on. They depend on the ids alone, so that batching and caches cannot change them.

    Args:
        input_ids: int64 (B, N), complete from bos on and padded on the left.

    Returns:
        int64 (B, N); 0 on padding.
    """
    image = F.pad(image_mask(input_ids, video_token_id), (1, 1))
    inside = image[:, :-2] & image[:, 1:-1] & image[:, 2:]
    shares = inside & F.pad(inside, (1, 0))[:, :-1]
    mask = padding_mask(input_ids, video_token_id).bool()
    return ((mask & ~shares).cumsum(-1) - 1).clamp_min(0)


class _CogVLM2VideoPreTrainedModel(LlamaPreTrainedModel):
    config: CogVLM2VideoConfig
    input_modalities = ["video", "text"]
    # FlashAttention would treat repeated positions as packed sequences, and cut a cached prefix in the wrong place.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _no_split_modules = ["LlamaDecoderLayer", "VisionLayer"]
    # Computed from the configuration; the published checkpoint contains 32 copies.
    _keys_to_ignore_on_load_unexpected = [checkpoint.IGNORED_TENSORS]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        embeddings = {PatchEmbedding: ["cls_embedding"], VisionTower: ["boi", "eoi"]}
        for name in embeddings.get(type(module), []):
            nn.init.normal_(getattr(module, name), std=self.config.initializer_range)


class CogVLM2VideoModel(_CogVLM2VideoPreTrainedModel, LlamaModel):
    """transformers' Llama, with video features at the image positions."""

    def __init__(self, config: CogVLM2VideoConfig) -> None:
        super().__init__(config)
        self.vision = VisionTower(config)
        self.frame_features: FrameFeatures | None = None
        self.post_init()

    def get_video_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Encode frames, each on its own. With `frame_features` set, only those that it does not keep.

        Args:
            pixel_values_videos: normalised frames of all clips, floating point (N, 3, image_size, image_size).

        Returns:
            (N, tokens_per_frame, hidden_size), in the model's dtype.
        """
        if self.frame_features is None or torch.is_grad_enabled():
            return self._encode(pixel_values_videos)
        return self.frame_features(pixel_values_videos, self._encode)

    def _encode(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        chunks = pixel_values_videos.split(FRAMES_PER_CHUNK)
        return torch.cat([self.vision(frames.to(self.vision.boi.dtype)) for frames in chunks])

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values_videos: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings (B, N, hidden_size) of ids (B, N), with the features of frames at the image positions.

        Frames are given as pixels or, already encoded, as features; without either, embeddings are of the ids alone.

        Raises:
            ValueError: image positions and frames differ in number.
        """
        embeds = self.embed_tokens(input_ids)
        if pixel_values_videos is not None:
            video_features = self.get_video_features(pixel_values_videos)
        if video_features is None:
            return embeds
        return place_features(embeds, image_mask(input_ids, self.config.video_token_id), video_features)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `CogVLM2VideoForConditionalGeneration.forward`."""
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values_videos)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if position_ids is None:
            if input_ids is None or (past_key_values is not None and past_key_values.get_seq_length() > 0):
                raise ValueError("pass position_ids: without the complete sequence of ids they cannot be computed")
            position_ids = rotary_position_ids(input_ids, self.config.video_token_id)
        if attention_mask is None and past_key_values is None:
            # Without either, transformers treats positions that do not rise by 1 as packed sequences.
            if input_ids is None:
                attention_mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
            else:
                attention_mask = padding_mask(input_ids, self.config.video_token_id)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class CogVLM2VideoForConditionalGeneration(_CogVLM2VideoPreTrainedModel, GenerationMixin):
    """CogVLM2-Video as a transformers model: `from_pretrained`, `generate`, `save_pretrained`."""

    def __init__(self, config: CogVLM2VideoConfig) -> None:
        super().__init__(config)
        self.model = CogVLM2VideoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at each position.

        Args:
            input_ids: int64 (B, N), padded on the left with `config.video_token_id`.
            pixel_values_videos: (sum of frames, 3, image_size, image_size): the frames of all rows, in order; rows may
                have different numbers of frames. None where the cache already contains the image positions.
            attention_mask: int64 (B, past + N), 0 on padding. Computed from complete sequences of ids if left out.
            position_ids: int64 (B, N). Computed from complete sequences of ids if left out; required with a filled
                cache.
            labels: int64 (B, N), -100 where no loss is computed.
            logits_to_keep: number of last positions whose logits are computed; 0 for all.

        Returns:
            `logits` (B, kept, vocab_size), `past_key_values`, and `loss` where labels were given.

        Raises:
            ValueError: image positions and frames differ in number, or positions cannot be computed.
        """
        inputs = (input_ids, pixel_values_videos, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = self.model(*inputs, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # generate() calls the next three; the first two only for arguments that the caller left out.

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.is_floating_point():
            raise ValueError("pass position_ids: they cannot be computed from embeddings")
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() >= input_ids.shape[1]:
            raise ValueError("pass position_ids: the ids do not include those of the cache")
        return rotary_position_ids(input_ids, self.config.video_token_id)

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        if inputs_tensor.is_floating_point():
            return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        return padding_mask(inputs_tensor, self.config.video_token_id)  # transformers would mask the frames as padding

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Any = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Any:
        prepare: Any = super().prepare_inputs_for_generation
        inputs = prepare(*args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:  # the caller's cache may already contain the frames
            needed = inputs.get("input_ids") is not None and (inputs["input_ids"] == self.config.video_token_id).any()
        else:
            needed = not kwargs.get("use_cache", True)
        if not needed:
            inputs["pixel_values_videos"] = None
        return inputs

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CogVLM2VideoForConditionalGeneration:
        """Load a checkpoint in the published layout; code in it is neither read nor run.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face hub.
            device, dtype: as in `loading.choose_device` and `loading.choose_dtype`.
            quantization: "4bit" (nf4) or "8bit" through bitsandbytes; the vision tower and the head are not quantised.
            revision: branch, tag or commit on the hub.
            kwargs: passed to transformers' `from_pretrained` (`attn_implementation`, for one).

        Raises:
            CheckpointError: no such folder or name, hub not reachable, files missing or cut short, tensors that are
                missing, unexpected, of another shape, NaN or infinite, not enough memory.
            ImportError: bitsandbytes or accelerate is not installed.
            ValueError: unknown device, dtype or quantization, or quantization without a CUDA GPU.
        """
        device = loading.choose_device(device)
        dtype = loading.choose_dtype(dtype, device)
        if quantization is not None:
            kwargs["quantization_config"] = loading.quantization_config(quantization, dtype, device)
        folder = loading.find(pretrained_model_name_or_path, revision)
        config = checkpoint.read_config(folder)
        checkpoint.check_layers(folder, config)
        with torch.device("meta"), loading.translate_errors(folder, device):  # sizes may be beyond what torch counts
            expected = cls(config).published_state_dict()
        checkpoint.check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        goes_straight = quantization is not None or (device.type != "cpu" and is_accelerate_available())
        loading.check_memory(folder, expected, device, dtype, quantization, through_cpu=not goes_straight)
        if goes_straight:
            kwargs["device_map"] = {"": device}
        # Given, so that generation_config.json is not read: its penalties and filters would change every caption.
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        kwargs = {"generation_config": GenerationConfig(**ids)} | kwargs
        kwargs |= {"use_safetensors": True, "local_files_only": True}
        with loading.translate_errors(folder, device), loading.show_progress():
            load: Any = super().from_pretrained  # its type omits output_loading_info
            model, info = load(folder, config=config, dtype=dtype, output_loading_info=True, **kwargs)
            if info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"]:
                raise checkpoint.CheckpointError(folder, f"weights were not all loaded: {info}")
            loading.check_finite(folder, model)
            model = model if "device_map" in kwargs else model.to(device)
            use_grouped_sdpa(model)
            return use_onednn(model)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the published layout: `config.json`, safetensors shards with the published tensor names, their index.

        Arguments are transformers', with a `max_shard_size` of 5 GB unless given.

        Raises:
            ValueError: the model is quantised, for which there is no published layout.
        """
        if getattr(self, "is_quantized", False):
            raise ValueError("a quantised model cannot be saved in the published layout: load it without quantization")
        super().save_pretrained(save_directory, *args, **({"max_shard_size": "5GB"} | kwargs))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> Any:
        pixels = model_kwargs.pop("pixel_values_videos", None)
        expand = super()._expand_inputs_for_generation
        expanded_ids, expanded = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if pixels is not None:  # repeated clip by clip; transformers would repeat frame by frame
            clips = self.split_clips(input_ids, pixels)
            expanded["pixel_values_videos"] = torch.cat([clip.repeat(expand_size, 1, 1, 1) for clip in clips])
        return expanded_ids, expanded

    def split_clips(self, input_ids: torch.Tensor, pixel_values_videos: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The frames of each row of a batch, by the number of the row's image positions."""
        num_positions = image_mask(input_ids, self.config.video_token_id).sum(-1)
        return pixel_values_videos.split((num_positions // self.config.tokens_per_frame).tolist())

    def published_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under their published names and in their published shapes."""
        return revert_weight_conversion(self, self.state_dict())
