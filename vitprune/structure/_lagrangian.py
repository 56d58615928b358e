"""A budget as a constraint of a loss: WDPruning's augmented Lagrangian, whose multipliers rise while it is missed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Group

ASCENT_LR = 10.0  # published


class Lagrangian(nn.Module):
    """``lam1 (R - T) + lam2 (R - T)^2`` while what is kept, R, is more than the target T, and 0 else.

    Both multipliers start at 0, and are trained to make it large.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lam1, self.lam2 = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, kept: Tensor, target: float) -> Tensor:
        over = (kept - target).clamp_min(0)
        return self.lam1 * over + self.lam2 * over.square()

    def group(self, begins: float = 0.0) -> Group:
        """How the multipliers are trained, from a share ``begins`` of the training on."""
        return Group([self.lam1, self.lam2], ASCENT_LR, ascent=True, begins=begins)
