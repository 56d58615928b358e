"""DiffRate's own search: how many tokens each block drops and merges, learned by gradients for a number of operations.

Chen et al., DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023,
https://arxiv.org/abs/2305.17997. The model's weights stay as they are; two vectors for each block are trained, one over
the numbers of patches that dropping may leave and one over those that merging may leave.
Differs from the authors' code: without labels, the dense model's answers are learned; the images are not mixed; the
operations of the model's own blocks are counted, whose heads and widths may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..macs import block_macs, macs
from ..model.state import AttentionView, TokenState, wide
from ..model.vit import Vit
from ..recover import Batches, Progress, endless, learning_rate_share
from ..schedules import Found
from ..surgery import check_method
from ..tokens.base import Reducer, keep_patches


@dataclass(frozen=True)
class RateSettings:
    """How DiffRate's search runs; the defaults are the authors'.

    Attributes:
        steps: optimiser steps; the authors take three epochs of ImageNet in batches of 1024.
        lr, last_lr: of AdamW, at the start and at the end of a cosine.
        granularity: patches between two numbers that are tried.
        weight: of the squared difference between the operations and those wanted, in units of ``unit_macs``. A model
            much smaller than DeiT-T needs a smaller unit, or its operations weigh nothing.
    """

    steps: int = 3750
    lr: float = 0.01
    last_lr: float = 0.001
    granularity: int = 4
    weight: float = 5.0
    unit_macs: float = 1e9

    def __post_init__(self) -> None:
        if self.steps < 1 or self.granularity < 1 or not self.lr > 0 or not self.unit_macs > 0:
            raise InputError(f"a search needs steps, granularity, lr and unit_macs above 0, got {self}")


def search_counts(
    model: Vit,
    batches: Batches,
    target_macs: float,
    settings: RateSettings = RateSettings(),
    *,
    progress: Progress | None = None,
) -> Found:
    """Patches that each block of ``model`` is to leave by DiffRate, and how it comes to them.

    ``reduce_tokens(model, "diffrate", found.patches, found.method_weights)`` makes the model.

    Args:
        model: a dense model, on the device to search on; it stays as it is.
        batches: calibration images, with labels or without.
        target_macs: multiply-accumulates wanted of the reduced model for one image.

    Raises:
        InputError: the target is not below those of the model, or there are no images.
        NotSupported: the model has no class token.
    """
    check_method("diffrate", model.config)
    dense_macs = macs(model.config)
    if not 0 < target_macs < dense_macs:
        raise InputError(f"target_macs must lie above 0 and below the model's {dense_macs:.3g}, got {target_macs:.3g}")
    device = next(model.parameters()).device
    searching = _searching(model, settings.granularity).to(device).train()
    learned = [parameter for parameter in searching.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.lr, weight_decay=0.0)
    every = endless(batches, "diffrate's search needs calibration images, got none")
    for step, batch in enumerate(islice(every, settings.steps)):
        share = learning_rate_share(step / settings.steps, 0.0, settings.last_lr / settings.lr)
        optimizer.param_groups[0]["lr"] = settings.lr * share
        images = batch.images.to(device)
        with torch.no_grad():
            wanted = model(images).softmax(-1) if batch.labels is None else batch.labels.to(device)
        answers = searching(images)
        excess = (_macs(searching) - target_macs) / settings.unit_macs
        loss = F.cross_entropy(answers, wanted) + settings.weight * excess.square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, settings.steps, f"{float(_macs(searching).detach()):.3g} of {target_macs:.3g} MACs")
    return _found(searching)


class Rate(nn.Module):
    """Chances of the numbers of patches that may be left, all alike at first.

    Args:
        patches: the most; every ``granularity``-th number from there down to 1 may be chosen.
    """

    def __init__(self, patches: int, granularity: int) -> None:
        super().__init__()
        self.numbers: Tensor
        self.register_buffer("numbers", torch.arange(patches, 0, -granularity, dtype=torch.float32))
        self.logits = nn.Parameter(torch.zeros(len(self.numbers)))

    def left(self) -> Tensor:
        """The expected number, rounded up; its gradient is that of the number before."""
        expected = self.logits.softmax(0) @ self.numbers
        return expected + (expected.ceil() - expected).detach()

    def mask(self, left: int, among: int, patches: int) -> Tensor:
        """One for each of ``patches`` in order of rank, but 0 from ``left`` to ``among``, [patches, 1].

        Its gradient is that of the chance that as many are left as the rank needs.
        """
        ranks = torch.arange(patches, device=self.numbers.device)
        chance = (self.logits.softmax(0)[:, None] * (self.numbers[:, None] > ranks)).sum(0)
        kept = 1 - ((ranks >= left) & (ranks < among)).to(chance.dtype)
        return (kept + chance - chance.detach())[:, None]


class _Step(NamedTuple):
    """What one block did: the numbers of patches that its rates said, with gradients."""

    dropping: Tensor
    merging: Tensor


class _Searched(Reducer):
    """DiffRate while its counts are searched: what it drops and merges is marked by the policy, and stays."""

    proportional = True

    def __init__(self, patches: int, granularity: int) -> None:
        super().__init__()
        self.dropping, self.merging = Rate(patches, granularity), Rate(patches, granularity)
        self.last: _Step

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def keep_anyway(self, state: TokenState) -> int:
        return state.x.shape[1] - state.prefix

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        ones, prefix = torch.ones_like(state.x[..., :1]), state.prefix
        before = state.marks()
        state = state._replace(policy=before, size=ones if state.size is None else state.size)
        among = _whole(before[0, prefix:].sum())
        score = attention.class_row(before).mean(1)[:, prefix:].detach()
        state = keep_patches(state, score.argsort(dim=1, descending=True))
        self.last = _Step(self.dropping.left(), self.merging.left())
        ranked = min(among, _whole(self.last.dropping))
        left = min(ranked, _whole(self.last.merging))
        state = _marked(state, self.dropping, ranked, among)
        return _marked(_merged(state, left, ranked), self.merging, left, ranked)


def _marked(state: TokenState, rate: Rate, left: int, among: int) -> TokenState:
    """``state`` with its patches from ``left`` to ``among`` marked as removed."""
    return state if left == among else state.marked(rate.mask(left, among, state.x.shape[1] - state.prefix))


def _merged(state: TokenState, left: int, ranked: int) -> TokenState:
    """``state`` with its patches from ``left`` to ``ranked`` merged into those before, where they stay as well."""
    if left == ranked:
        return state
    assert state.size is not None
    x, size, first = state.x, state.size, state.prefix
    stay, go = slice(first, first + left), slice(first + left, first + ranked)
    unit = F.normalize(wide(x.detach()), dim=-1)
    alike, into = (unit[:, go] @ unit[:, stay].transpose(1, 2)).max(2, keepdim=True)
    merge = F.one_hot(into.squeeze(2), left).transpose(1, 2).to(x.dtype)  # [B, left, ranked - left]
    means = (x[:, stay] + merge @ x[:, go]) / (1 + merge.sum(2, keepdim=True))
    sizes = size[:, stay].clamp(min=1) + merge @ (size[:, go] * alike).clamp(min=1)
    return state._replace(
        x=torch.cat([x[:, :first], means, x[:, first + left :]], dim=1),
        size=torch.cat([size[:, :first], sizes, size[:, first + left :]], dim=1),
    )


def _searching(model: Vit, granularity: int) -> Vit:
    """A copy of ``model`` whose blocks, all but the first, search; nothing but their rates learns."""
    patches, depth = model.config.patches, len(model.config.blocks)
    rates = {block: _Searched(patches, granularity) for block in range(1, depth)}
    searching = Vit(model.config, rates)
    searching.load_state_dict(model.state_dict(), strict=False)
    for parameter in searching.parameters():
        parameter.requires_grad_(False)
    for rate in rates.values():
        rate.requires_grad_()
    return searching


def _macs(model: Vit) -> Tensor:
    """Multiply-accumulates of what the last forward pass of a searching model left, with gradients."""
    config = model.config
    left = torch.tensor(float(config.patches), device=next(model.parameters()).device)
    all_of_them, total = config.prefix + left, macs(config) + torch.zeros_like(left)
    for module, block in zip(model.blocks, config.blocks, strict=True):
        entering = config.prefix + left
        if isinstance(module.reducer, _Searched):
            left = _least(left, module.reducer.last)
        total = total + block_macs(config, block, entering, entering, config.prefix + left)
        total = total - block_macs(config, block, *3 * (all_of_them,))
    return total


def _least(entering: Tensor, step: _Step) -> Tensor:
    """The least of three numbers; its gradient goes to the two that are searched, whichever it is."""
    both = step.dropping + step.merging
    return torch.minimum(entering, torch.minimum(*step)).detach() + both - both.detach()


def _whole(number: Tensor) -> int:
    return round(float(number.detach()))


def _found(searching: Vit) -> Found:
    """The counts as they stand, and the authors' second number for each block that merges."""
    left, weights, entering = [], {}, searching.config.patches
    for number, block in enumerate(searching.blocks):
        if isinstance(block.reducer, _Searched):
            ranked = min(entering, _whole(block.reducer.dropping.left()))
            after = min(ranked, _whole(block.reducer.merging.left()))
            if after < entering:
                weights[f"blocks.{number}.reducer.ranked"] = torch.tensor(ranked)
            entering = after
        left.append(entering)
    return Found(tuple(left), weights)
