"""Attention without repeated keys and values: the numbers of the plain formula."""

import pytest
import torch
from paths import GOLDEN
from torch import nn

from capkit.cogvlm2 import CogVLM2VideoForConditionalGeneration
from capkit.cogvlm2.attention import GROUPED_SDPA, grouped_sdpa


def plain_attention(query, key, value, seen):
    """softmax(query key / sqrt(width)) value, head by head, of the positions that are seen."""
    num_shared = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // num_shared].mT / query.shape[-1] ** 0.5
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, head // num_shared])
    return torch.stack(heads, 2)


@pytest.mark.parametrize("num_queries, num_keys, has_mask", [(1, 9, False), (1, 9, True), (7, 7, False), (4, 9, True)])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_numbers_are_those_of_the_formula(num_queries, num_keys, has_mask, with_gradients):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, num_queries, 16), *torch.randn(2, 3, 2, num_keys, 16)
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries).expand(3, -1, -1).clone()
    if has_mask:
        seen[1:, :, :2] = False
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    with torch.inference_mode(not with_gradients):
        found, _ = grouped_sdpa(module, query, key, value, seen[:, None] if has_mask else None, scaling=0.25)
    assert torch.allclose(found, plain_attention(query, key, value, seen), atol=1e-6)


def test_loading_on_a_cpu_makes_use_of_it_unless_another_is_named(captioner):
    assert captioner.model.config._attn_implementation == GROUPED_SDPA
    model = CogVLM2VideoForConditionalGeneration.from_pretrained(GOLDEN, device="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
