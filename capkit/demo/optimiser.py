"""The optimiser of the demo model's training: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

MOMENTUM = 0.95  # of Muon


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal: https://kellerjordan.github.io/posts/muon/

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in float32: without instructions for bfloat16, in which
    torch computes, its steps take some 20 times as long.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], learning_rate: float, weight_decay: float):
        super().__init__(matrices, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever passed
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    momentum.lerp_(weight.grad, 1 - MOMENTUM)
                    step = _orthogonal(weight.grad.lerp(momentum, MOMENTUM))
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(step, alpha=group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with singular values near 1, by five Newton-Schulz steps with Muon's coefficients."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of blocks, AdamW for all other weights.

    After 400 steps of the language model 78 % of the content tokens were right; with AdamW alone 66 %.

    Args:
        model: trains its weights that require a gradient now.
        learning_rate: of both; Muon's steps are scaled to AdamW's.
        weight_decay: of both.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float, weight_decay: float):
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        blocks = [name for name in weights if ".layers." in name or ".linear_proj." in name]
        matrices = {name: weights.pop(name) for name in blocks if weights[name].ndim == 2}
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(weights.values(), learning_rate, (0.9, 0.98), weight_decay=weight_decay)
        ]
        if matrices:
            self.parts.insert(0, Muon(matrices.values(), learning_rate, weight_decay))
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever passed
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()
