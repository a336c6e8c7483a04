"""Vision tower (EVA2-CLIP-E), which encodes each frame on its own, and the projection into the language model's space.

Module names are those of the published checkpoint, `THUDM/cogvlm2-llama3-caption`; source: its modeling files.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from capkit.cogvlm2.configuration import CogVLM2VideoConfig, CogVLM2VisionConfig


class PatchEmbedding(nn.Module):
    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # (N, 3, S, S) -> (N, 1 + patches, D)
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        cls = self.cls_embedding.expand(len(patches), -1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class _VisionAttention(nn.Module):
    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # (N, P, D)
        query, key, value = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.dense(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.attention = _VisionAttention(config)
        fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # normalised after each block, before the residual sum
        hidden = hidden + self.input_layernorm(self.attention(hidden))
        return hidden + self.post_attention_layernorm(self.mlp(hidden))


class _Projection(nn.Module):
    """From the vision tower's space into the language model's."""

    def __init__(self, config: CogVLM2VideoConfig) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(config.vision_config.hidden_size, config.hidden_size, bias=False)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.norm1(self.linear_proj(hidden)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(hidden)) * self.dense_h_to_4h(hidden))


class VisionTower(nn.Module):
    def __init__(self, config: CogVLM2VideoConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.grid = vision.image_size // vision.patch_size
        self.patch_embedding = PatchEmbedding(vision)
        layers = nn.Sequential(*(VisionLayer(vision) for _ in range(vision.num_hidden_layers)))
        self.transformer = nn.Sequential(OrderedDict(layers=layers))
        self.conv = nn.Conv2d(vision.hidden_size, vision.hidden_size, kernel_size=2, stride=2)
        self.linear_proj = _Projection(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # (N, 3, S, S) -> (N, tokens_per_frame, D)
        patches = self.transformer(self.patch_embedding(pixel_values))[:, 1:]  # without the cls row
        pooled = self.conv(patches.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        embeds = self.linear_proj(pooled.flatten(2).transpose(1, 2))
        begin, end = (edge.expand(len(embeds), -1, -1) for edge in (self.boi, self.eoi))
        return torch.cat([begin, embeds, end], dim=1)
