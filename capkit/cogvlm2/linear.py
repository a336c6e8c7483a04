"""Matrix products on x86 CPUs through oneDNN, which torch carries beside MKL and does not use for them.

MKL takes a slow path on processors that are not Intel's: with the shapes of notebook 06's `small` model, oneDNN was 1.5
to 3 times as fast on an AMD EPYC (notebook 06 measures the ratio where it runs). Same float32, other rounding.
"""

from __future__ import annotations

import platform

import torch
from torch import nn
from torch.nn import functional as F

MIN_ROWS = 8  # a product with fewer rows waits for memory and gains nothing


class OneDNNLinear(nn.Linear):
    """nn.Linear that goes through oneDNN where that is the faster way: float32 on a CPU, several rows, no gradients."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        is_plain = hidden.dtype == self.weight.dtype == torch.float32 and hidden.device.type == "cpu"
        if not is_plain or torch.is_grad_enabled() or hidden.numel() < MIN_ROWS * self.in_features:
            return F.linear(hidden, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> nn.Module:
    """Make a model's linear layers `OneDNNLinear` where torch has oneDNN for x86; returns the model, changed in place.

    Weights, their names and what is saved stay as they are. Quantised layers are left alone.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear
    return model
