"""Position embeddings at another grid, as two matrix products that every runtime can run.

The weights are those of ``interpolate(mode="bicubic", antialias=True)``: Keys, Cubic Convolution Interpolation for
Digital Image Processing, IEEE ASSP 1981, https://doi.org/10.1109/TASSP.1981.1163711, with a = -0.5, widened by the
scale when the grid shrinks. Differs from that operator: the few weights per output become a dense [out, in] matrix,
computed from the sizes by operations that export with symbolic sizes (TensorRT-RTX refuses an antialiased Resize).
"""

from __future__ import annotations

import torch
from torch import Tensor


def resample_grid(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Embeddings [1, old_h old_w, C] of one grid of patches at another, [1, new_h new_w, C].

    Sizes of ``new`` may be symbolic. At ``new == old`` both matrices are exact identities.
    """
    rows, columns = (resample_matrix(o, n, positions.device).to(positions.dtype) for o, n in zip(old, new, strict=True))
    grid = positions.reshape(old[0], old[1] * positions.shape[-1])
    grid = (rows @ grid).reshape(new[0], old[1], positions.shape[-1])
    return (columns @ grid).reshape(1, new[0] * new[1], positions.shape[-1])


def resample_matrix(old: int, new: int, device: torch.device) -> Tensor:
    """Weights [new, old] of antialiased bicubic interpolation along one axis; each row sums to one."""
    outputs = torch.arange(new, device=device, dtype=torch.float32)[:, None]
    inputs = torch.arange(old, device=device, dtype=torch.float32)
    step = old / torch.scalar_tensor(new, device=device)
    distance = (inputs + 0.5 - (outputs + 0.5) * step) / step.clamp(min=1)
    weights = _cubic(distance.abs())
    return weights / weights.sum(dim=1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys's kernel for a = -0.5 at ``x >= 0``."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
