"""Attention on CPUs without copies of keys and values for the query heads that share them, and watched attention.

transformers repeats them where there is a mask, because CUDA needs it; on a CPU that takes longer than the attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "grouped_sdpa"
WATCHED = "watched"


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
    if torch.is_grad_enabled() or query.device.type != "cpu":  # also of a model that was moved since
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


class AttentionSum:
    """Adds up the attention weights of one row of tokens over layers and heads.

    Args:
        num_keys: only the weights of the first so many positions are kept.
    """

    def __init__(self, num_keys: int) -> None:
        self.num_keys, self._num_added = num_keys, 0
        self._total: Any = 0.0

    def add(self, weights: torch.Tensor) -> None:
        """Add weights, float32 (heads, new positions, all positions)."""
        self._total = self._total + weights[..., : self.num_keys].sum(0)
        self._num_added += len(weights)

    def mean(self) -> torch.Tensor:
        """The mean over all that was added, float32 (new positions, num_keys)."""
        return self._total / self._num_added


def watched_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "eager" for one row, whose weights go into `module.attention_sum`; those of few heads at a time."""
    outputs = []
    for heads, keys, values in zip(query[0].chunk(key.shape[1]), key[0], value[0], strict=True):
        weights = (heads @ keys.T * scaling + attention_mask[0]).softmax(-1, dtype=torch.float32)
        module.attention_sum.add(weights)
        outputs.append(weights.to(values.dtype) @ values)
    return torch.cat(outputs).transpose(0, 1)[None], None


AttentionInterface.register(WATCHED, watched_attention)


def watch_attention(model: Any, num_keys: int) -> tuple[Any, AttentionSum]:
    """A model that shares all weights, of which each forward pass of one row adds to an `AttentionSum`.

    The model itself is left as it is, so that other threads can use it meanwhile.

    Args:
        model: a `CogVLM2VideoForConditionalGeneration`.
        num_keys: as for `AttentionSum`.
    """
    config, watched = copy.deepcopy(model.config), AttentionSum(num_keys)
    config._attn_implementation = WATCHED

    def twin(module: Any, **parts: nn.Module) -> Any:
        other = copy.copy(module)
        other.__dict__.pop("forward", None)  # accelerate's, of models in 4 bit: it would call the original's
        other._modules = module._modules | parts
        other.config = config
        return other

    layers = []
    for layer in model.model.layers:
        attention = twin(layer.self_attn)
        attention.attention_sum = watched
        layers.append(twin(layer, self_attn=attention))
    return twin(model, model=twin(model.model, layers=nn.ModuleList(layers))), watched
