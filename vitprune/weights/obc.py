"""OBC: layer by layer, each row thinned by OBS so that the layer's output changes least. Needs neither labels nor
gradients.

Frantar, Singh and Alistarh, Optimal Brain Compression, NeurIPS 2022, https://arxiv.org/abs/2208.11580. Differs from
the official code: inputs are those behind what has been pruned already; the Hessian is damped; rows compete by the
slopes of the convex hull of their losses; weights come from one solve for the chosen mask instead of traces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ._fisher import CHUNK_BYTES, inverted
from ._sweep import joint, step_scores, sweep
from .base import LayerView, Pattern, Scope, Scoring, required


@final
@dataclass(frozen=True)
class Obc(Scoring):
    """Sequential removal within rows; time grows with out * in^3.

    Attributes:
        damping: share of the mean square of the inputs that is added to the diagonal of their second moments.
    """

    needs = "moments"
    passes = 27
    scope: Scope = field(default="uniform", kw_only=True)
    damping: float = 1e-4

    def scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        inverse = inverted(damped_moments(layer, self.damping)[None], layer.name)
        trace = sweep(read_weights(layer), inverse, layer.alive, pattern)
        return step_scores(trace, layer.weight.shape[1] // pattern.group, "hull", pattern)

    def weights(self, layer: LayerView, mask: Tensor, pattern: Pattern) -> Tensor:
        hessian = damped_moments(layer, self.damping)[None]
        rows = max(1, CHUNK_BYTES // hessian.nbytes)
        parts = zip(read_weights(layer).split(rows), mask.split(rows), strict=True)
        return torch.cat([joint(hessian, some, kept, layer.name) for some, kept in parts])


def damped_moments(layer: LayerView, damping: float) -> Tensor:
    """Second moments [in, in] with ``damping`` of their mean diagonal added; inputs that are always 0 count by that."""
    moments = required(layer.moments, layer, "moments").double()
    mean = moments.diagonal().mean()
    ridge = torch.where(moments.diagonal() > 0, damping * mean, mean)
    return moments + torch.diag(ridge)


def read_weights(layer: LayerView) -> Tensor:
    """The weights in fp64; 0 where their input always is, since there they do nothing."""
    return torch.where(required(layer.moments, layer, "moments").diagonal() > 0, layer.weight.double(), 0)
