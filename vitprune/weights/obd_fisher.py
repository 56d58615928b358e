"""OBD with the diagonal of the Fisher information in place of the Hessian's: the mean squared gradient of an image.

LeCun, Denker and Solla, Optimal Brain Damage, NeurIPS 1989, https://papers.nips.cc/paper/250-optimal-brain-damage;
Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, https://arxiv.org/abs/1801.05787.
Differs from code that squares a batch's mean gradient, in which the images' gradients cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ._fisher import image_count, row_chunks
from .base import LayerView, Pattern, Scoring
from .obd import diagonal_scores


@final
@dataclass(frozen=True)
class ObdFisher(Scoring):
    """Half the mean squared gradient times the squared weight."""

    needs = "gradients"
    passes = 5

    def scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        parts = [layer.gradients(rows).double().square().mean(0) for rows in row_chunks(layer, image_count(layer))]
        return diagonal_scores(layer.weight, torch.cat(parts), pattern)
