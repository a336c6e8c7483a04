"""Linear layers through oneDNN on x86 CPUs; torch includes oneDNN but runs float32 linear layers through MKL.

MKL is slow on processors that are not Intel's: with the layer shapes of notebook 06's `small` model, oneDNN was 1.5 to
3 times as fast on an AMD EPYC (notebook 06 measures the ratio). Results are float32 too and differ in rounding only.
"""

from __future__ import annotations

import platform
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

Model = TypeVar("Model", bound=nn.Module)
MIN_ROWS = 8  # products with fewer rows are limited by memory bandwidth, where oneDNN gains nothing


class OneDNNLinear(nn.Linear):
    """nn.Linear that uses oneDNN where it is faster: float32 on a CPU, at least MIN_ROWS rows, no gradients."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        is_plain = hidden.dtype == self.weight.dtype == torch.float32 and hidden.device.type == "cpu"
        if not is_plain or torch.is_grad_enabled() or hidden.numel() < MIN_ROWS * self.in_features:
            return F.linear(hidden, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")


def use_onednn(model: Model) -> Model:
    """Turn a model's linear layers into `OneDNNLinear`, in place, where torch has oneDNN for x86; return the model.

    Weights and their names stay as they are. Quantised layers are left alone.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear
    return model
