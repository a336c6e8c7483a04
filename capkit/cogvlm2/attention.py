"""Attention on CPUs without copies of keys and values for the query heads that share them.

transformers repeats them where there is a mask, because CUDA needs it; on a CPU that takes longer than the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "grouped_sdpa"


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", (B, heads, N, D) with keys and values of fewer heads -> (B, N, heads, D)."""
    if torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    shape, length = query.shape, query.shape[2]
    if length == 1:  # all query heads that share keys and values are the rows of one product
        query = query.reshape(shape[0], key.shape[1], -1, shape[3])
    is_causal = attention_mask is None and length > 1
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    )
    return output.reshape(shape).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def use_grouped_sdpa(model: PreTrainedModel) -> None:
    """Let a model on a CPU use `grouped_sdpa` in place of transformers' "sdpa"."""
    config: Any = model.config
    if model.device.type == "cpu" and config._attn_implementation == "sdpa":
        config._attn_implementation = GROUPED_SDPA
