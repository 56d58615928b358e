"""What travels between blocks, and what a token method sees of a block's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    packages: int = 0  # patch tokens, the last ones, that a method made of those it removed
    score: Tensor | None = None  # [B, N, 1] what a method has found out about each token so far
    parked: TokenState | None = None  # patch tokens that no block works on for now
    ids: Tensor | None = None  # [n] which of the image's patches the patch tokens are, alike in all images; None: all
    policy: Tensor | None = None  # [B, N, 1] while a method trains: 1 for what it keeps, 0 for what it would remove
    log_chance: Tensor | None = None  # [B] while a method learns by reward: log-probability of what it drew
    penalty: Tensor | None = None  # while a method trains: what it adds to the training loss; None: nothing

    def penalised(self, error: Tensor) -> TokenState:
        """The same state, with ``error`` added to the training loss."""
        return self._replace(penalty=error if self.penalty is None else self.penalty + error)

    def marks(self) -> Tensor:
        """The policy, [B, N, 1]; ones where nothing has been marked."""
        return torch.ones_like(self.x[..., :1]) if self.policy is None else self.policy

    def marked(self, kept: Tensor) -> TokenState:
        """The same state, the patches for which ``kept`` [B, n, 1] is 0 marked as removed, besides those before."""
        before = self.marks()
        return self._replace(policy=torch.cat([before[:, : self.prefix], kept * before[:, self.prefix :]], dim=1))

    def unparked(self) -> TokenState:
        """All tokens, those that were parked behind the others."""
        if self.parked is None:
            return self
        whole: dict[str, Any] = {}
        for name in ("x", "size", "source", "score"):
            part, waiting = getattr(self, name), getattr(self.parked, name)
            whole[name] = None if part is None else torch.cat([part, waiting], dim=1)
        return self._replace(**whole, parked=None)

    def select(self, pick: Callable[[Tensor], Tensor]) -> TokenState:
        """The tokens that ``pick`` takes from each tensor [B, N, ...], with all that is remembered of them."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("x", "size", "source", "score", "policy")}
        parts |= {name: pick(part) for name, part in parts.items() if part is not None}
        return self._replace(**parts)


class AttentionView(NamedTuple):
    """What a block's attention worked on, for methods that read it."""

    q: Tensor  # [B, H, N, D]; of the prefix alone where a method has yet to say which tokens ask
    k: Tensor  # [B, H, N, D]
    v: Tensor  # [B, H, N, V]
    scale: float  # what q k^T is multiplied by
    bias: Tensor | None  # [B, 1, 1, N] added to the scaled product (token sizes); None: nothing

    def all_rows(self) -> Tensor:
        """Softmax attention of all tokens, [B, H, N, N], at least fp32: twice the work of the attention itself."""
        logits = (wide(self.q) * self.scale) @ wide(self.k).transpose(-2, -1)
        return (logits if self.bias is None else logits + self.bias).softmax(-1)

    def class_row(self, policy: Tensor | None = None) -> Tensor:
        """Softmax attention of the first token, [B, H, N]: one row, at the cost of H N D multiplications.

        ``policy`` [B, N, 1]: over those tokens alone for which it is 1. At least fp32: rounded to fp16, attention ties,
        and ties are broken differently by every runtime.
        """
        logits = (wide(self.q[:, :, :1]) * self.scale) @ wide(self.k).transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias
        row = logits.softmax(-1).squeeze(2)
        if policy is None:
            return row
        row = row * policy.transpose(1, 2)
        return row / row.sum(-1, keepdim=True)


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 where it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
