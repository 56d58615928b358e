"""OBD: weights go in whose direction the loss curves least. LeCun, Denker and Solla, Optimal Brain Damage, NeurIPS
1989, https://papers.nips.cc/paper/250-optimal-brain-damage. Differs from the paper: the diagonal of the Hessian is
Hutchinson's estimate, v * H v with random signs v, as in Yao et al., PyHessian, 2020, https://arxiv.org/abs/1912.07145,
and without labels the loss is KL(dense || changed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from .base import LayerView, Pattern, Scoring, required

TIE = 1e-6  # share of the mean curvature that is added, so that where there is none the smaller weight goes


@final
@dataclass(frozen=True)
class Obd(Scoring):
    """Half the diagonal of the Hessian times the squared weight.

    Estimates scatter about the small entries by what stands beside them in their rows; of one below 0 the absolute
    value counts. As 0 they would all go first, whatever their weight.
    """

    needs = "curvature"
    passes = 80

    def scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        return diagonal_scores(layer.weight, required(layer.curvature, layer, "curvature").abs(), pattern)


def diagonal_scores(weight: Tensor, curvature: Tensor, pattern: Pattern) -> Tensor:
    """Loss of each group under a diagonal ``curvature`` [out, in], which is nowhere below 0."""
    h = curvature.double()
    losses = (h + TIE * h.mean()) * weight.double().square() / 2
    return losses.unflatten(1, (-1, pattern.group)).sum(-1)
