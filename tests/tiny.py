"""Tiny models and images that all tests share: seeded, and large enough in their weights for logits to differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.model.config import BlockConfig, VitConfig
from vitprune.model.vit import Vit
from vitprune.recover import Batch
from vitprune.surgery import build


def tiny_config(
    depth: int = 2,
    dim: int = 32,
    heads: int = 4,
    mlp: int = 64,
    image: int = 28,
    patch: int = 4,
    classes: int = 10,
    keep: Mapping[int, int] | None = None,
    **config: Any,
) -> VitConfig:
    """A configuration with 49 patches; ``keep`` says how many of them leave a block (with ``reducer=``)."""
    size = dim // heads
    blocks = tuple(BlockConfig(heads, size, size, size**-0.5, mlp, (keep or {}).get(i)) for i in range(depth))
    return VitConfig(**{"image_size": (image, image), "patch_size": (patch, patch), "channels": 3, "dim": dim,
                        "classes": classes, "blocks": blocks} | config)  # fmt: skip


def tiny_vit(*, seed: int = 0, **config: Any) -> Vit:
    """A ``Vit`` of ``tiny_config(**config)`` with random weights, in eval mode."""
    model = build(tiny_config(**config))
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights under which every layer passes on signals of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name in ("pos_embed", "prefix_tokens"):
            parameter.copy_(0.5 * noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:  # norms and LayerScale
            parameter.copy_(1 + 0.2 * noise)


def labelled_by(teacher: nn.Module) -> Callable[[int], Iterator[Batch]]:
    """Four batches of eight random images an epoch, with what ``teacher`` takes them for."""

    def batches(epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(4):
            some = torch.randn(8, 3, 28, 28, generator=generator)
            yield Batch(some, labels=teacher(some).argmax(1))

    return batches


def images(count: int, size: int = 28, channels: int = 3, seed: int = 0) -> Tensor:
    """Random normalised images [count, channels, size, size]."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1000 + seed))
