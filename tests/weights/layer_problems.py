"""Layers with the statistics that a test wants, made without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune.weights.base import LayerView, Read


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_with(gradients: Tensor, weight: Tensor | None = None, name: str = "layer") -> LayerView:
    """A layer [out, in] with just these ``gradients`` [m, out, in]: its token t is what row t alone reads."""
    m, out, _ = gradients.shape
    weight = random(*gradients.shape[1:], seed=99) if weight is None else weight
    slopes = torch.eye(out, dtype=gradients.dtype).expand(m, out, out)
    return LayerView(name, weight, weight != 0, reads=(Read(slice(0, out), gradients, slopes),))


def layer_reading(inputs: Tensor, weight: Tensor) -> LayerView:
    """A layer that read ``inputs`` [tokens, in]."""
    return LayerView("layer", weight, weight != 0, moments=inputs.T @ inputs / len(inputs))


def correlated(rows: int, samples: int, width: int, share: float, seed: int = 0) -> Tensor:
    """[samples, rows, width] of which ``share`` of the variance is that of three factors; scales differ."""
    factors = random(rows, 3, width, seed=seed)
    common = torch.einsum("srf,rfw->srw", random(samples, rows, 3, seed=seed + 1), factors)
    x = (1 - share) ** 0.5 * random(samples, rows, width, seed=seed + 2) + share**0.5 * common
    return x * (0.5 * random(rows, width, seed=seed + 3)).exp()


def closed_form(hessian: Tensor, w: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Least quadratic loss without the weights ``gone`` [n, k], and the weights that have it; batched over n."""
    inverse = torch.linalg.inv(hessian)
    every = torch.arange(len(w))[:, None]
    square = inverse[every[..., None], gone[:, :, None], gone[:, None, :]]
    share = torch.linalg.solve(square, w[every, gone])
    loss = (w[every, gone] * share).sum(1) / 2
    return loss, w - torch.einsum("nbk,nk->nb", inverse.transpose(1, 2)[every, gone].transpose(1, 2), share)
