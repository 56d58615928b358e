"""Torch-Pruning on a timm ViT: the recipes of its examples/transformers/prune_timm_vit.py, with Taylor importance.

Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, https://github.com/VainF/Torch-Pruning. Differs from
its example: num_heads, head_dim, attn_dim and scale are set after pruning, in place of a forward function for older
timm; head_pruning_ratio, fixed to 0.5 there, is tried at three values; gradients come from all calibration images.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from _one_number import Family
from vitprune.errors import InputError
from vitprune.model.checkpoint import read_checkpoint
from vitprune.model.timm import convert
from vitprune.model.vit import fingerprint
from vitprune_deploy.build.bench import Bench
from vitprune_deploy.data import batches

DIMS = (0.2, 0.4, 0.6, 0.8)  # shares surveyed
UNITS = (0.05, 0.35, 0.65, 0.95)  # where the heads' share is fixed; at 0 Torch-Pruning would remove no head either


def families(bench: Bench) -> list[Family]:
    """Every recipe as a family; the share is its pruning_ratio."""
    model = timm_model(bench)
    _accumulate(model, *_labelled(bench))
    make = partial(pruned, model, bench.dense.config)
    found = [
        Family("uniform", partial(make, everywhere=True), DIMS),
        Family("bottleneck", make, DIMS),
        Family("bottleneck, global", partial(make, across=True), DIMS),
    ]
    for heads in (0.25, 0.5, 0.75):
        found.append(Family(f"{heads:.0%} of heads, MLP", partial(make, heads=heads), UNITS, whole_at_zero=False))
    return found


def timm_model(bench: Bench) -> Any:
    """The dense model as timm has it, checked to be the one that the other rows prune."""
    profile = bench.profile
    arguments = dict(profile.model.args) | ({"img_size": profile.image_size} if profile.image_size else {})
    checkpoint = profile.model.checkpoint
    model = timm.create_model(profile.model.name, pretrained=profile.model.pretrained and not checkpoint, **arguments)
    if checkpoint:
        model.load_state_dict(read_checkpoint(Path(checkpoint)))
    if fingerprint(convert(model)) != fingerprint(bench.dense):
        raise InputError(f"timm's {profile.model.name} has not the weights that the profile's dense model has")
    return model.eval()


def _labelled(bench: Bench) -> tuple[Tensor, Tensor]:
    """Calibration images and their classes; where they have none, what the dense model says."""
    found = list(batches(bench.images.calibration, bench.preprocess, 64))
    images = torch.cat([torch.from_numpy(pixels) for pixels, _ in found])
    labels = torch.cat([torch.from_numpy(known) for _, known in found])
    with torch.no_grad():
        said = torch.cat([bench.dense(part).argmax(dim=1) for part in images.split(64)])
    return images, torch.where(labels >= 0, labels, said)


def _accumulate(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Gradients of the cross-entropy, summed over batches of 64."""
    model.zero_grad()
    for part, known in zip(images.split(64), labels.split(64), strict=True):
        F.cross_entropy(model(part), known).backward()


def pruned(
    model: nn.Module,
    config: Any,
    share: float,
    *,
    everywhere: bool = False,
    across: bool = False,
    heads: float = 0.0,
) -> Any:
    """A smaller copy of ``model``.

    Args:
        share: of MLP units, and of each head's channels unless ``heads`` is given.
        everywhere: of the embedding too, as the example does without --bottleneck.
        across: rank over all layers, not in each of them.
        heads: share of whole heads to remove in place of their channels.
    """
    small = copy.deepcopy(model)
    for own, theirs in zip(small.parameters(), model.parameters(), strict=True):
        own.grad = None if theirs.grad is None else theirs.grad.clone()  # deepcopy leaves gradients behind
    attentions = [part for part in small.modules() if isinstance(part, Attention)]
    ignored = [small.head]
    if not everywhere:
        ignored += [part.fc2 for part in small.modules() if isinstance(part, Mlp)]
    warnings.filterwarnings(
        "ignore", "Unwrapped parameters detected"
    )  # class token and positions: pruned as they must be
    pruner = tp.pruner.BasePruner(
        small,
        torch.zeros(1, config.channels, *config.image_size),
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=across,
        pruning_ratio=share,
        ignored_layers=ignored,
        num_heads={part.qkv: part.num_heads for part in attentions},
        prune_num_heads=heads > 0,
        prune_head_dims=not heads,
        head_pruning_ratio=heads,
        round_to=1,
        in_channel_groups={},
        out_channel_groups={},
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for part in attentions:
        part.num_heads = pruner.num_heads[part.qkv]
        part.head_dim = part.qkv.out_features // (3 * part.num_heads)
        part.attn_dim = part.num_heads * part.head_dim
        part.scale = part.head_dim**-0.5
        if part.attn_dim != part.proj.in_features:
            raise InputError(f"Torch-Pruning left {part.qkv} and {part.proj}, which do not fit")
    small.zero_grad()
    return small.eval()
