"""CogVLM2-Video: a vision tower and a bridge in front of transformers' Llama, with rotary positions of its own.

Module names are the published checkpoint's, so that only the decoder's fused and renamed weights need converting.
Facts: the published `config.json` and modeling files of `THUDM/cogvlm2-llama3-caption`, and arXiv 2408.16500.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, LlamaModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils import is_accelerate_available

from capkit.cogvlm2 import loading
from capkit.cogvlm2.configuration import CogVLM2VideoConfig
from capkit.cogvlm2.linear import use_onednn
from capkit.cogvlm2.vision import PatchEmbedding, VisionTower

FRAMES_TOGETHER = 64  # in the vision tower, so that its memory does not grow with clips and batches


class _SplitQueryKeyValue(ConversionOps):
    """Rows of the published fused weight: all query heads, then the key heads, then the value heads."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        fused = next(iter(input_dict.values()))
        fused = fused[0] if isinstance(fused, list) else fused
        key_rows = config.num_key_value_heads * config.head_dim
        rows = [config.num_attention_heads * config.head_dim, key_rows, key_rows]
        return {name: part.contiguous() for name, part in zip(target_patterns, fused.split(rows), strict=True)}

    @property
    def reverse_op(self):
        return _JoinQueryKeyValue()


class _JoinQueryKeyValue(ConversionOps):
    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        parts = [input_dict[name] for name in source_patterns]
        return {target_patterns[0]: torch.cat([part[0] if isinstance(part, list) else part for part in parts])}

    @property
    def reverse_op(self):
        return _SplitQueryKeyValue()


# Each pattern is written out: a short one such as `mlp.language_mlp.` -> `mlp.` would, applied backwards on saving,
# rename the vision tower too.
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
    overwrite=True,  # this module may be reloaded in a notebook
)


def padding_mask(input_ids: torch.Tensor, video_token_id: int) -> torch.Tensor:
    """1 where a position takes part, 0 on left padding: ids before the first that is not `video_token_id`.

    Args:
        input_ids: int64 (B, N). Padding and image positions carry the same id, but every sequence begins with bos.

    Returns:
        int64 (B, N).
    """
    return ((input_ids != video_token_id).cumsum(-1) > 0).long()


def image_mask(input_ids: torch.Tensor, video_token_id: int) -> torch.Tensor:
    """True at the frames' positions of whole, left-padded sequences: bool (B, N) from int64 (B, N)."""
    return (padding_mask(input_ids, video_token_id) == 1) & (input_ids == video_token_id)


def place_features(embeds: torch.Tensor, image: torch.Tensor, video_features: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, N, hidden_size) with the frames' features at the True positions of `image`, bool (B, N).

    Raises:
        ValueError: positions and frames disagree in number.
    """
    features = video_features.flatten(0, 1)
    if (num_positions := int(image.sum())) != len(features):
        raise ValueError(f"the ids have {num_positions} image positions, the frames have {len(features)} features")
    return embeds.masked_scatter(image[..., None], features.to(embeds.dtype))


def rotary_position_ids(input_ids: torch.Tensor, video_token_id: int) -> torch.Tensor:
    """Rotary positions from whole sequences of ids alone, so that batching and caches cannot change them.

    The first and the last image position of a run of image positions count like text; all those between them share
    one position (the original's `build_position_ids`): bos 0, frame 0 is 1, 2, 2, ..., 2, 3, its number 4, and so on.

    Args:
        input_ids: int64 (B, N), complete from bos on and padded on the left.

    Returns:
        int64 (B, N); 0 on padding.
    """
    image = F.pad(image_mask(input_ids, video_token_id), (1, 1))
    inside = image[:, :-2] & image[:, 1:-1] & image[:, 2:]
    shares = inside & F.pad(inside, (1, 0))[:, :-1]
    taking_part = padding_mask(input_ids, video_token_id).bool()
    return ((taking_part & ~shares).cumsum(-1) - 1).clamp_min(0)


class _CogVLM2VideoPreTrainedModel(LlamaPreTrainedModel):
    config: CogVLM2VideoConfig
    input_modalities = ("video", "text")
    # FlashAttention takes repeated positions for packed sequences and cuts a cached prefix wrongly.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _no_split_modules = ["LlamaDecoderLayer", "VisionLayer"]
    # Recomputed from the configuration; the published checkpoint carries 32 copies.
    _keys_to_ignore_on_load_unexpected = [loading.IGNORED_TENSORS]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        embeddings = {PatchEmbedding: ["cls_embedding"], VisionTower: ["boi", "eoi"]}
        for name in embeddings.get(type(module), []):
            nn.init.normal_(getattr(module, name), std=self.config.initializer_range)


class CogVLM2VideoModel(_CogVLM2VideoPreTrainedModel, LlamaModel):
    """transformers' Llama, with video features at the image positions."""

    def __init__(self, config: CogVLM2VideoConfig):
        super().__init__(config)
        self.vision = VisionTower(config)
        self.post_init()

    def get_video_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Encode frames, each on its own.

        Args:
            pixel_values_videos: floating point (N, 3, image_size, image_size), normalised; frames of all clips.

        Returns:
            (N, tokens_per_frame, hidden_size), in the model's dtype.
        """
        some = pixel_values_videos.split(FRAMES_TOGETHER)
        return torch.cat([self.vision(frames.to(self.vision.boi.dtype)) for frames in some])

    def embed(
        self,
        input_ids: torch.LongTensor,
        pixel_values_videos: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings (B, N, hidden_size), with the frames' features in place at the image positions.

        Args:
            input_ids: int64 (B, N).
            pixel_values_videos: frames to encode; or
            video_features: from `get_video_features`, where they are known already.

        Raises:
            ValueError: ids and frames disagree in number.
        """
        embeds = self.embed_tokens(input_ids)
        if pixel_values_videos is not None:
            video_features = self.get_video_features(pixel_values_videos)
        if video_features is None:
            return embeds
        return place_features(embeds, image_mask(input_ids, self.config.video_token_id), video_features)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """See `CogVLM2VideoForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        video_token_id = self.config.video_token_id
        if position_ids is None:
            if input_ids is None or (past_key_values is not None and past_key_values.get_seq_length() > 0):
                raise ValueError("pass position_ids: they follow from the whole sequence of ids, which is not given")
            position_ids = rotary_position_ids(input_ids, video_token_id)
        if attention_mask is None and past_key_values is None:
            # Without a mask and a cache, transformers takes positions that do not rise by 1 for packed sequences.
            if input_ids is not None:
                attention_mask = padding_mask(input_ids, video_token_id)
            else:
                attention_mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values_videos)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class CogVLM2VideoForConditionalGeneration(_CogVLM2VideoPreTrainedModel, GenerationMixin):
    """CogVLM2-Video as transformers knows models: `from_pretrained`, `generate`, `save_pretrained`."""

    def __init__(self, config: CogVLM2VideoConfig):
        super().__init__(config)
        self.model = CogVLM2VideoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at each position.

        Args:
            input_ids: int64 (B, N), padded on the left with `config.video_token_id`.
            pixel_values_videos: (sum of frames, 3, image_size, image_size): the frames of all rows, in order; rows may
                have different numbers of frames. None where the ids' image positions are already in the cache.
            attention_mask: int64 (B, past + N), 0 on padding. Left out, it follows from whole sequences of ids.
            position_ids: int64 (B, N). Left out, they follow from whole sequences of ids; needed with a filled cache.
            labels: int64 (B, N), -100 where there is nothing to learn.
            logits_to_keep: only the last so many positions' logits; 0 for all.

        Returns:
            `logits` (B, kept, vocab_size), `past_key_values`, and `loss` where labels were given.

        Raises:
            ValueError: ids and frames disagree in number, or positions cannot be known.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
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

    # generate() asks these three; what is given explicitly never reaches the first two.

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.is_floating_point():
            raise ValueError("pass position_ids: they follow from the ids, and only embeddings are given")
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() >= input_ids.shape[1]:
            raise ValueError("pass position_ids: the ids do not reach back over what is in the cache")
        return rotary_position_ids(input_ids, self.config.video_token_id)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        if inputs_tensor.is_floating_point():
            return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        return padding_mask(inputs_tensor, self.config.video_token_id)  # transformers would mask the frames as padding

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, is_first_iteration=False, **kwargs):
        given = {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **given, **kwargs)
        if is_first_iteration:  # a cache that was given may hold the frames already
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
        **kwargs,
    ) -> CogVLM2VideoForConditionalGeneration:
        """Load the published layout; nothing of the checkpoint's own code is read or run.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face hub.
            device: "auto" takes a CUDA GPU where there is one, else the CPU.
            dtype: "auto" is bfloat16 on GPUs that have it, float16 on older ones, float32 on the CPU.
            quantization: "4bit" (nf4) or "8bit" through bitsandbytes, which leaves the vision tower and the head alone.
            revision: branch, tag or commit on the hub.
            kwargs: go to transformers' `from_pretrained` as they are (`attn_implementation`, for one).

        Raises:
            CheckpointError: no such folder or name, hub out of reach, files missing or cut short, tensors that are
                missing, unexpected or of another shape, no room in memory.
            ImportError: bitsandbytes or accelerate is not installed.
            ValueError: unknown device, dtype or quantization.
        """
        device = loading.choose_device(device)
        dtype = loading.choose_dtype(dtype, device)
        if quantization is not None:
            kwargs["quantization_config"] = loading.quantization_config(quantization, dtype)
        folder = loading.find(pretrained_model_name_or_path, revision)
        config = loading.read_config(folder)
        with torch.device("meta"):
            expected = cls(config).published_state_dict()
        loading.compare(folder, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        loading.check_memory(folder, expected, device, dtype, quantization)
        if quantization is not None or (device.type != "cpu" and is_accelerate_available()):
            kwargs["device_map"] = {"": device}
        with loading.memory_errors_in_words(folder, device):
            model, info = super().from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, **kwargs
            )
            if info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"]:
                raise loading.CheckpointError(folder, f"weights were not all loaded: {info}")
            return use_onednn(model if "device_map" in kwargs else model.to(device))

    def save_pretrained(self, save_directory: str | os.PathLike, *, max_shard_size: str | int = "5GB", **kwargs):
        """Write the published layout: `config.json`, safetensors shards under the published names, their index.

        Raises:
            ValueError: the model is quantised, which the published layout has no room for.
        """
        if getattr(self, "is_quantized", False):
            raise ValueError("a quantised model cannot be saved in the published layout: load it without quantization")
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        pixels = model_kwargs.pop("pixel_values_videos", None)
        if pixels is not None and expand_size > 1:  # row by row, and not frame by frame as transformers would
            num_image_positions = image_mask(input_ids, self.config.video_token_id).sum(-1)
            num_frames = (num_image_positions // self.config.tokens_per_frame).tolist()
            pixels = torch.cat([clip.repeat(expand_size, 1, 1, 1) for clip in pixels.split(num_frames)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | ({} if pixels is None else {"pixel_values_videos": pixels})

    def published_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under their published names and in their published shapes; on `meta`, names and shapes only."""
        return revert_weight_conversion(self, self.state_dict())
