"""oneDNN's matrix products: the same numbers but for rounding, and nothing else changed."""

import platform

import pytest
import torch
from torch import nn

from capkit.cogvlm2 import use_onednn
from capkit.cogvlm2.linear import MIN_ROWS, OneDNNLinear

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 only")


@pytest.fixture
def layers():
    torch.manual_seed(0)
    plain = nn.Linear(48, 80)
    quick = use_onednn(nn.Sequential(nn.Linear(48, 80)))[0]
    quick.load_state_dict(plain.state_dict())
    return plain, quick


@pytest.mark.parametrize("shape", [(1, 48), (MIN_ROWS, 48), (2, 3, 48), (3, 50, 48), (0, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_numbers(layers, shape, dtype):
    plain, quick = (layer.to(dtype) for layer in layers)
    hidden = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        assert torch.allclose(plain(hidden), quick(hidden), atol=1e-5)
        assert torch.allclose(plain(hidden.mT.contiguous().mT), quick(hidden.mT.contiguous().mT), atol=1e-5)


def test_oneDNN_does_the_work_where_there_is_enough_of_it(layers, monkeypatch):
    calls = []
    monkeypatch.setattr("capkit.cogvlm2.linear.F.linear", lambda *given: calls.append(given) or torch.zeros(1))
    with torch.inference_mode():
        layers[1](torch.randn(MIN_ROWS, 48))
        assert not calls
        layers[1](torch.randn(MIN_ROWS - 1, 48))
    layers[1](torch.randn(MIN_ROWS, 48))
    assert len(calls) == 2  # too few rows; gradients


def test_gradients_are_the_plain_ones(layers):
    hidden = torch.randn(30, 48)
    for layer in layers:
        layer(hidden).square().sum().backward()
    assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)


def test_only_plain_layers_are_changed_and_weights_keep_their_names(captioner):
    class Quantised(nn.Linear):
        pass

    model = use_onednn(nn.ModuleDict({"plain": nn.Linear(4, 4), "quantised": Quantised(4, 4)}))
    assert [type(layer) for layer in model.values()] == [OneDNNLinear, Quantised]
    assert [*model.state_dict()] == ["plain.weight", "plain.bias", "quantised.weight", "quantised.bias"]
    assert isinstance(captioner.model.lm_head, OneDNNLinear)  # load_captioner makes use of it
