"""OBS on all weights of all layers at once, with their full Fisher information: for small problems.

Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, NeurIPS 1992,
https://papers.nips.cc/paper/647-second-order-derivatives-for-network-pruning-optimal-brain-surgeon.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from ..errors import InputError
from ._fisher import inverted
from ._sweep import joint, sweep
from .base import Layers, LayerView, Pattern, Pruned, WeightMethod, finite

MOST_WEIGHTS = 6000  # the matrix of so many takes 288 MB


@final
@dataclass(frozen=True)
class Obs(WeightMethod):
    """Sequential removal over all layers.

    Attributes:
        damp_rel: what is added to the diagonal, as a share of the mean diagonal of the Fisher information.
    """

    needs = "gradients"
    damp_rel: float = 1e-2

    def prune(self, layers: Layers, pattern: Pattern, sparsity: float) -> Iterator[Pruned]:
        together = _few(layers)
        if all(layer.empty for layer in together):
            yield from (Pruned(layer.name, layer.alive, layer.weight) for layer in together)
            return
        total = sum(layer.weight.numel() for layer in together)
        gradients = [layer.gradients(slice(0, layer.weight.shape[0])).flatten(1).double() for layer in together]
        g = torch.cat(gradients, 1)
        fisher = g.T @ g / len(g)
        fisher.diagonal().add_(self.damp_rel * fisher.diagonal().mean())
        w = torch.cat([layer.weight.double().flatten() for layer in together])[None]
        mask = torch.cat([layer.alive.flatten() for layer in together])[None].clone()
        name = "the layers together"
        count = 0 if pattern.of else round(sparsity * total / pattern.group) - int((~mask).sum()) // pattern.group
        if pattern.of or count > 0:
            trace = sweep(w, inverted(fisher[None], name), mask, pattern, count or None)
            gone = trace.order[trace.order >= 0]
            mask.view(-1, pattern.group)[gone] = False
        weights = finite(joint(fisher[None], w, mask, name), name)[0]
        sizes = [layer.weight.numel() for layer in together]
        for layer, kept, weight in zip(together, mask[0].split(sizes), weights.split(sizes), strict=True):
            shape = layer.weight.shape
            yield Pruned(layer.name, kept.view(shape), weight.view(shape).to(layer.weight))


def _few(layers: Layers) -> list[LayerView]:
    """All of ``layers``; as soon as they have too many weights, no more of them are asked for.

    Raises:
        InputError: they have.
    """
    together, total = [], 0
    for layer in layers:
        total += layer.weight.numel()
        if total > MOST_WEIGHTS:
            raise InputError(
                f"obs inverts one matrix of all weights together and takes {MOST_WEIGHTS} of them, which {layer.name} "
                f"exceeds with {total}; choose fewer layers, or cap, which does the same in blocks"
            )
        together.append(layer)
    return together
