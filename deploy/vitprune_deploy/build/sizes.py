"""The sizes that a search may choose from, as the profile allows them and the model has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..profile import Profile
from .bench import Bench

if TYPE_CHECKING:
    from vitprune.search.counts import Counts, Sizes

MOST_WIDTHS = 12  # of an MLP: between them the loss curve is as good as straight
MOST_DIMS = 4  # of a head's queries and keys, and of its values: each pair of them is a choice for each number of heads
FEWEST_PATCHES = 16  # the last token level is this part of all patches


def sizes(bench: Bench) -> Sizes:
    """The sizes that the search may choose from, as the profile allows them."""
    from vitprune.search.counts import Sizes
    from vitprune.search.problem import ladder, multiples

    profile, config = bench.profile, bench.dense.config
    may, block = profile.prune, config.blocks[0]
    removal = [0] if may.depth.enabled else []
    heads = multiples(block.heads, profile.head_multiple, 1) if may.heads.enabled else (block.heads,)
    units = (
        multiples(block.mlp, _step(block.mlp, profile.mlp_multiple, MOST_WIDTHS), 1)
        if may.mlp.enabled
        else (block.mlp,)
    )
    levels, schedule = may.tokens.levels, bench.schedule()
    if may.tokens.method == "none":
        patches: tuple[int, ...] = ()
    elif schedule is not None:
        patches = tuple(sorted({config.patches, *schedule}, reverse=True))
    elif isinstance(levels, int):
        patches = ladder(config.patches, levels, max(1, config.patches // FEWEST_PATCHES))
    else:
        patches = tuple(sorted({max(1, round(config.patches * share)) for share in (1.0, *levels)}, reverse=True))
    if schedule is None:
        patches = _with_folds(patches, bench)
    prefix_only = [0] if may.last_block == "prefix" and config.reads_prefix_only else []
    dims = {} if not may.head_dims.enabled else {"qk": _dims(bench, block.qk_dim), "v": _dims(bench, block.v_dim)}
    held = {"qk": config.qk_norm, "v": config.attn_norm}  # by a norm over them
    offered = {name: some for name, some in dims.items() if not held[name]}
    return Sizes((*heads, *removal), (*units, *removal), (*patches, *prefix_only), **offered)


def _dims(bench: Bench, size: int) -> tuple[int, ...]:
    """The dims that each of a block's heads of ``size`` may keep, all of them first."""
    from vitprune.search.problem import multiples

    profile = bench.profile
    step = _step(size, profile.head_dim_multiple, MOST_DIMS)
    return tuple(kept for kept in multiples(size, step, profile.prune.head_dims.minimum) if kept)


def _with_folds(patches: tuple[int, ...], bench: Bench) -> tuple[int, ...]:
    """``patches``, and the counts that a grid method can leave; these alone where there is no other method."""
    config, methods = bench.dense.config, bench.token_methods()
    folds = {config.patches}
    for method in methods:
        while method.grid and min(folds) * FEWEST_PATCHES > config.patches:
            fewer = method.fewest(min(folds), config.prefix)
            if fewer in folds:
                break
            folds.add(fewer)
    if methods and all(method.grid for method in methods):
        return tuple(sorted(folds, reverse=True))
    return tuple(sorted({*patches, *folds}, reverse=True)) if len(folds) > 1 else patches


def multiples_of_units(profile: Profile, units: int, dims: int) -> tuple[int, int]:
    """What kept counts of an MLP's ``units`` and of a head's ``dims`` are multiples of."""
    return _step(units, profile.mlp_multiple, MOST_WIDTHS), _step(dims, profile.head_dim_multiple, MOST_DIMS)


def _step(size: int, multiple: int, most: int) -> int:
    """The smallest step that is a multiple of ``multiple`` and makes at most ``most`` sizes up to ``size``."""
    return multiple * max(1, -(-size // (multiple * most)))


def dense_counts(bench: Bench) -> Counts:
    """What the unpruned model has."""
    from vitprune.search.counts import Counts

    blocks = bench.dense.config.blocks
    return Counts.dense([b.heads for b in blocks], [b.mlp for b in blocks], bench.dense.config.patches)
