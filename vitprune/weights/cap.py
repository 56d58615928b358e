"""CAP: OBS within blocks of the Fisher information, one weight after the other, and the exact joint update.

Kuznedelev, Kurtic, Frantar and Alistarh, CAP: Correlation-Aware Pruning for Highly-Accurate Sparse Vision Models,
NeurIPS 2023, https://arxiv.org/abs/2210.09223. Differs from the official code: blocks are thinned by the slopes of
the convex hull of their losses, not by the losses themselves (``merge='cumulative'``); weights come from one solve for
the chosen mask instead of traces of all masks; N:M, where theirs fails, closes an N:M group that has lost its share;
blocks are of 64 weights by default instead of 192, since a sweep takes time in proportion to their square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..errors import InputError
from ._fisher import Blocks, FisherMethod, inverted
from ._sweep import Merge, joint, step_scores, sweep
from .base import LayerView, Pattern


@final
@dataclass(frozen=True)
class Cap(FisherMethod):
    """Sequential removal within blocks.

    Attributes:
        merge: how blocks compete: 'hull', or 'cumulative' as published.
    """

    merge: Merge = "hull"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge not in ("hull", "cumulative"):
            raise InputError(f"cap merges blocks by 'hull' or 'cumulative', got {self.merge!r}")

    def block_scores(self, blocks: Blocks, layer: LayerView, pattern: Pattern) -> Tensor:
        alive = layer.alive[blocks.rows].reshape(blocks.weights.shape)
        trace = sweep(blocks.weights, inverted(blocks.fisher(), layer.name), alive, pattern)
        return step_scores(trace, blocks.weights.shape[1] // pattern.group, self.merge, pattern)

    def block_weights(self, blocks: Blocks, mask: Tensor, layer: LayerView, pattern: Pattern) -> Tensor:
        return joint(blocks.fisher(), blocks.weights, mask, layer.name)
