"""What travels between blocks, and what a token method sees of a block's attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenState(NamedTuple):
    """The tokens between two blocks, and all that a token method remembers of them."""

    x: Tensor  # [B, N, C] features; the first `prefix` are class, distillation and register tokens
    prefix: int  # tokens that must never be removed
    patches: int  # patch tokens that the image had; symbolic while a graph with dynamic image size is exported
    size: Tensor | None = None  # [B, N, 1] patches merged into each token; None: one each
    counted: bool = True  # attention adds the logarithm of the sizes to its logits
    source: Tensor | None = None  # [B, N, P] share of each of the image's patches in a token; None: not tracked


class AttentionView(NamedTuple):
    """What a block's attention worked on, for methods that read it. The N x N map is never built."""

    q: Tensor  # [B, H, N, D]
    k: Tensor  # [B, H, N, D]
    scale: float  # what q k^T is multiplied by
    bias: Tensor | None  # [B, 1, 1, N] added to the scaled product (token sizes); None: nothing

    def class_row(self) -> Tensor:
        """Softmax attention of the first token, [B, H, N]: one row, at the cost of H N D multiplications.

        At least fp32: rounded to fp16, attention ties, and ties are broken differently by every runtime.
        """
        logits = (wide(self.q[:, :, :1]) * self.scale) @ wide(self.k).transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias
        return logits.softmax(-1).squeeze(2)


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 where it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
