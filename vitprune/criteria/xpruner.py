"""X-Pruner, without its training: how much a unit's gate matters to each class, summed over the classes.

After Yu and Xiang, X-Pruner: eXplainable Pruning for Vision Transformers, CVPR 2023, https://arxiv.org/abs/2303.04935,
which learns a mask for every class and ranks units by the sum of its absolute values. A surrogate of ours, unofficial:
the authors published no code. The mask's gradient at 1 stands in for the learned mask: the gradients of the images of
a class at a unit's gate are summed, and the absolute values of these sums, over the number of images, are the score.
The class of an image is the one that its loss is of, drawn from the model's own output.
"""

from __future__ import annotations

from typing import final

from .base import Criterion, LayerView, Ranking, required


@final
class XPruner(Criterion):
    """Sum over classes of the absolute gradient of their mask."""

    needs = "gates"

    def rank(self, layer: LayerView) -> Ranking:
        gates = required(layer.gates, "xpruner", "gates").double()
        classes, number = required(layer.labels, "xpruner", "classes").unique(return_inverse=True)
        sums = gates.new_zeros(len(classes), gates.shape[1]).index_add(0, number.to(gates.device), gates)
        return Ranking.from_scores(sums.abs().sum(0) / len(gates))
