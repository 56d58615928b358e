"""PS-ViT's own search: from the last block to the first, as many positions as the next block's error allows.

Tang et al., Patch Slimming for Efficient Vision Transformers, CVPR 2022, https://arxiv.org/abs/2106.02852. The authors
published no code; written from the paper's procedure as others quote it.
Differs from the paper: no block is trained while positions are added, so more of them are needed for the same error;
the error is the squared difference of the block's output to the dense model's as a share of the squared output, which
the paper leaves open; the distillation and register tokens stay with the class token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ..errors import InputError
from ..model.state import TokenState
from ..model.vit import Block, Vit
from ..recover import Progress
from ..schedules import Found
from ..surgery import check_method

AT_ONCE = 16  # images


@torch.no_grad()
def search_counts(
    model: Vit, images: Tensor, tolerance: float = 0.01, step: int = 10, *, progress: Progress | None = None
) -> Found:
    """Patches that each block of ``model`` is to leave by PS-ViT, and at which positions.

    ``reduce_tokens(model, "psvit", found.patches, found.method_weights)`` makes the model. Its last block leaves what
    the one before does, though the class token alone is read of it: that the last block is computed for the prefix
    only is asked for elsewhere.

    Args:
        model: a dense model that reads the class token, on the device to search on; it stays as it is.
        images: calibration images [M, channels, height, width].
        tolerance: error that each block may have; the paper tries 0.01 and 0.02.
        step: positions that are added at a time.

    Raises:
        InputError: there are no images, or the tolerance or the step is not above 0.
        NotSupported: the model has no class token, or takes images of several sizes.
    """
    check_method("psvit", model.config)
    if not len(images) or not tolerance > 0 or step < 1:
        raise InputError(
            f"psvit's search needs images, a tolerance above 0 and a step from 1 on, got {len(images)} images, "
            f"{tolerance} and {step}"
        )
    states = _dense_states(model, images)
    prefix, patches = model.config.prefix, model.config.patches
    kept = torch.zeros(0, dtype=torch.long, device=images.device)  # patches that the block in question leaves
    reach = [torch.zeros(len(some.x), *2 * (prefix + patches,), device=images.device) for some in states[0]]
    for one in reach:
        one[:, 0, 0] = 1.0
    blocks = [cast(Block, block) for block in model.blocks]
    counts, weights = [patches] * len(blocks), {}
    for number in reversed(range(1, len(blocks))):
        if progress is not None:
            progress(len(blocks) - 1 - number, len(blocks) - 1, f"positions that block {number} needs")
        block, before = blocks[number], blocks[number - 1]
        reach = [_reached(block, state, seen, prefix, kept) for state, seen in zip(states[number], reach, strict=True)]
        significance = torch.cat(
            [
                seen.diagonal(dim1=-2, dim2=-1) * _lengths(before, state)
                for state, seen in zip(states[number - 1], reach, strict=True)
            ]
        ).mean(0)[prefix:]
        around = list(zip(states[number], states[number + 1], strict=True))
        kept = _enough(block, around, prefix, kept, significance.argsort(descending=True), tolerance, step)
        counts[number - 1] = len(kept)
        # those that stay rank before all others
        first = torch.zeros_like(significance).index_fill(0, kept, 1.0)
        weights[f"blocks.{number - 1}.reducer.significance"] = first + significance / significance.sum()
    counts[-1] = counts[-2:][0]  # a model of one block keeps all
    changed = {block for block, (n, k) in enumerate(zip((patches, *counts), counts, strict=False)) if k < n}
    return Found(tuple(counts), {name: w for name, w in weights.items() if int(name.split(".")[1]) in changed})


def _dense_states(model: Vit, images: Tensor) -> list[list[TokenState]]:
    """For each block the tokens that enter it, in parts of the images; behind the last those that leave it."""
    states = [[model.embed(some) for some in images.split(AT_ONCE)]]
    for block in model.blocks:
        states.append([block(state) for state in states[-1]])
    return states


def _reached(block: Block, state: TokenState, reach: Tensor, prefix: int, kept: Tensor) -> Tensor:
    """How much of each pair of tokens that enter ``block`` is read in the end, by what it leaves: [B, N, N]."""
    seen = block.attend(state)[2].all_rows()
    mask = torch.zeros(reach.shape[-1], device=reach.device)
    mask[:prefix], mask[prefix + kept] = 1.0, 1.0
    reach = mask[:, None] * reach * mask
    return (seen.transpose(-2, -1) @ reach[:, None] @ seen).mean(1)


def _lengths(block: Block, state: TokenState) -> Tensor:
    """The squared length of what the attention of ``block`` makes of each token, [B, N]."""
    seen = block.attend(state)[2].all_rows()
    return (seen @ state.x.abs()[:, None]).square().sum(-1).mean(1)


def _enough(
    block: Block,
    around: list[tuple[TokenState, TokenState]],
    prefix: int,
    wanted: Tensor,
    ranked: Tensor,
    tolerance: float,
    step: int,
) -> Tensor:
    """As few of the patches that enter ``block`` as it needs for those that it leaves, ``wanted``, these included.

    They are added in the order ``ranked``, until the error is within the tolerance or there are no more.
    """
    others = ranked[~torch.isin(ranked, wanted)]
    for added in _numbers(len(others), step, least=0 if len(wanted) else 1):
        kept = torch.cat([wanted, others[:added]]).sort().values
        if _error(block, around, prefix, wanted, kept) <= tolerance:
            break
    return kept


def _numbers(most: int, step: int, least: int) -> Iterator[int]:
    """``least``, and every ``step``-th number up to ``most``, which is the last one."""
    yield least
    yield from range(step, most, step)
    yield most


def _error(
    block: Block, around: list[tuple[TokenState, TokenState]], prefix: int, wanted: Tensor, kept: Tensor
) -> float:
    """What ``block`` gets wrong of the prefix and the patches ``wanted`` where it reads the patches ``kept`` alone.

    ``around`` are the dense model's tokens in front of it and behind it.
    """
    first = torch.arange(prefix, device=kept.device)
    reading, asking = torch.cat([first, prefix + kept]), torch.cat([first, prefix + wanted])
    wrong = length = 0.0
    for before, after in around:
        found = block(before.select(lambda of: of[:, reading])).x[:, torch.isin(reading, asking)]
        right = after.x[:, asking]
        wrong += float((found - right).square().sum())
        length += float(right.square().sum())
    return wrong / length
