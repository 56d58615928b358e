"""NViT: the squared sum of weight times gradient over all that a unit reads with, averaged over batches.

Yang et al., Global Vision Transformer Pruning with Hessian-Aware Saliency, CVPR 2023,
https://arxiv.org/abs/2110.04869. A head's sum goes over its rows of q, k and v with their biases and is divided by 12,
as the official code does in effect; a hidden unit's over its row of fc1 and the bias; a dim's of queries and keys over
its row of q, a dim's of values over its row of v, of all heads, so that the same dims go in each, divided by 2. It is
squared once for every batch, after the sum, averaged over an interval of batches, and intervals are joined by a moving
average.

Differs from the code: the loss is the negative log-likelihood of labels drawn from the model's own output, in place of
a distillation from a CNN, so that a batch's gradients average to zero and few batches measure little but noise, which
``batch=1`` avoids (in Python; a profile has the default); weights stay as they are from one interval to the next. The
latency term is an allocation (``nvit`` in ``vitprune.search.allocation``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from .base import Criterion, DimRanking, DimsView, LayerView, Ranking, batch_means, required

DIVISORS = {"attn": 12.0, "mlp": 1.0}
DIM_DIVISOR = 2.0


@final
@dataclass(frozen=True)
class Nvit(Criterion):
    """Squared sums of weight times gradient.

    Attributes:
        batch: images whose mean loss is differentiated at once.
        interval: batches that are averaged before they enter the moving average.
        momentum: what the average keeps of itself at each interval.
    """

    needs = "gates"
    batch: int = 128
    interval: int = 100
    momentum: float = 0.9

    def rank(self, layer: LayerView) -> Ranking:
        return self._ranking(required(layer.reading_gates, "nvit", "reading gates") / DIVISORS[layer.kind])

    def rank_dims(self, dims: DimsView) -> DimRanking:
        gates = required(dims.reading_gates, "nvit", "reading gates")
        of_all_heads = gates.unflatten(1, (dims.heads, -1)).sum(1)
        return DimRanking.of_heads([self._ranking(of_all_heads / DIM_DIVISOR)] * dims.heads)

    def _ranking(self, sums: Tensor) -> Ranking:
        """By the sums [M, units] of weight times gradient of each image."""
        squares = batch_means(sums, self.batch).square()
        intervals = [some.mean(0) for some in squares.split(self.interval)]
        return Ranking.from_scores(moving_average(intervals, self.momentum))


def moving_average(values: list[Tensor], momentum: float) -> Tensor:
    """The exponential moving average that begins with the first of ``values``."""
    average = values[0]
    for value in values[1:]:
        average = momentum * average + (1 - momentum) * value
    return average
