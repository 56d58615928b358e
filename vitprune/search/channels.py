"""Which channels of the residual stream matter: by how strongly the norms pass them on, over calibration images.

Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, NeurIPS 2024,
https://arxiv.org/abs/2407.14679 (Minitron), with the aggregation of NVIDIA's Model-Optimizer: the root of the summed
squares over images of the mean absolute activation over tokens. Differs from theirs: added over all norms of the
residual stream, and needs nothing but images of the task.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.vit import Vit
from ..statistics import batches, blocks_of


@torch.no_grad()
def channel_scores(model: Vit, images: Tensor) -> Tensor:
    """The importance of each channel, [C], in fp64, over normalised ``images`` [M, channels, height, width]."""
    squares = [torch.zeros(model.config.dim, dtype=torch.float64) for _ in _norms(model)]

    def watch(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            mean = output.flatten(1, -2).abs().mean(1) if output.ndim > 2 else output.abs()  # [B, C]
            total.add_(mean.double().square().sum(0).cpu())

        return add

    handles = [norm.register_forward_hook(watch(total)) for norm, total in zip(_norms(model), squares, strict=True)]
    try:
        for batch in batches(model, images):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([total.sqrt() for total in squares]).sum(0)


def kept_channels(model: Vit, images: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` channels of the residual stream that matter most, ascending.

    Raises:
        InputError: the model has no more channels than that.
    """
    if count >= model.config.dim:
        raise InputError(f"{count} channels are not fewer than the {model.config.dim} of the model")
    return tuple(sorted(channel_scores(model, images).topk(count).indices.tolist()))


def _norms(model: Vit) -> list[nn.Module]:
    """The norms that read the residual stream, or write to it."""
    found: list[nn.Module] = [norm for block in blocks_of(model) for norm in (block.norm1, block.norm2)]
    return [norm for norm in (*found, model.norm) if not isinstance(norm, nn.Identity)]
