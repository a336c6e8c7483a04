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
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    prefix: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", (B, heads, N, D) with keys and values of fewer heads -> (B, N, heads, D).

    `prefix` has each layer's keys and values (1, heads, P, D) of positions that all rows see before their own; N is 1.
    """
    if prefix is not None:
        output = _attend_after_prefix(query, key, value, attention_mask, scaling, *prefix[module.layer_idx])
        return output.reshape(len(query), 1, query.shape[1], -1), None
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


def _attend_after_prefix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
) -> torch.Tensor:
    """Attention of one query a row: to the prefix in one product for all rows, to each row's own keys, then summed."""
    attend, num_rows, width = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, len(query), query.shape[-1]
    grouped = query.reshape(num_rows, key.shape[1], -1, width)
    own, own_logsumexp = attend(grouped, key, value, attn_mask=mask, scale=scale)
    rows_together = grouped.transpose(0, 1).flatten(1, 2)[None]
    shared, logsumexp = attend(rows_together, prefix_key, prefix_value, scale=scale)
    shared = shared[0].unflatten(1, (num_rows, -1)).transpose(0, 1)
    logsumexp = logsumexp[0].unflatten(1, (num_rows, -1)).transpose(0, 1)
    return own.lerp(shared, torch.sigmoid(logsumexp - own_logsumexp)[..., None].to(own.dtype))


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def use_grouped_sdpa(model: PreTrainedModel) -> None:
    """Let a model on a CPU use `grouped_sdpa` in place of transformers' "sdpa"."""
    config: Any = model.config
    if model.device.type == "cpu" and config._attn_implementation == "sdpa":
        config._attn_implementation = GROUPED_SDPA
