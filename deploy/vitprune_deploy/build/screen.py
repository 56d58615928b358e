"""Of many token methods, the few that are worth a search: one schedule of each is tried before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import METHOD_WEIGHTS, METHODS, OWN_COUNTS, Bench, save_weights, write_json
from .embedding import choose_channels

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.model.vit import Vit

SEARCHED_METHODS = 2
SHARE = 0.7  # of the patches that enter each of three blocks stays: the schedule that EViT and DynamicViT are known by
IMAGES = 256
CALIBRATION = 64  # images that a method finds out about the model from


def screen_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``methods`` depends on besides the model and the images."""
    return {
        "methods": [method.name for method in bench.candidates()],
        "holdout": bench.profile.search.holdout_images,
        "own": _own(bench),
        **({} if bench.profile.prune.embedding is None else {"embedding": bench.profile.prune.embedding}),
    }


def screen(bench: Bench, folder: Path) -> None:
    """Choose the token methods that are searched: all, or those that lose least at the same counts.

    First of all, which channels of the residual stream stay, where the profile asks for fewer.
    """
    choose_channels(bench, folder)
    judged, losses = {method.name: method.judged_as for method in bench.candidates()}, {}
    names, weights = list(judged), calibrate(bench, sorted(set(judged.values())), folder)
    if len(names) > SEARCHED_METHODS:
        found = one_schedule(bench.base, weights, bench.search_images[:IMAGES])
        losses = {name: found[method] for name, method in judged.items()}
        kept = sorted(names, key=lambda name: losses[name])[:SEARCHED_METHODS]
        shown = ", ".join(f"{name} {losses[name]:.4f}" for name in sorted(names, key=lambda name: losses[name]))
        bench.shows.say(f"loss at the same token counts: {shown}; {' and '.join(kept)} are searched")
        names = [name for name in names if name in kept]
    write_json(folder / METHODS, {"searched": names, "losses": losses})
    if _own(bench) is not None:
        search_own_counts(bench, names[0], weights.get(names[0], {}), folder)


def search_own_counts(bench: Bench, name: str, weights: dict[str, Tensor], folder: Path) -> None:
    """Find the counts by the search of the method's own authors, as the profile asks for it."""
    from vitprune.search.own import search_own

    bench.schedule()  # refuses what the method cannot do
    images, number = bench.search_images[:CALIBRATION], _own(bench)
    assert number is not None
    found = search_own(name, bench.base, images, number, bench.shows.progress)
    # the search tells of the blocks that it reduces; the losses of others are measured too
    save_weights({**weights, **found.method_weights}, folder / f"{name}{METHOD_WEIGHTS}")
    write_json(folder / OWN_COUNTS, list(found.patches))
    bench.shows.say(f"{name}'s own search leaves {' '.join(map(str, found.patches))} patches")


def _own(bench: Bench) -> float | None:
    """The number for the method's own search, where the profile asks for that."""
    from vitprune.search.own import own_number

    return own_number(bench.profile.prune.tokens.schedule)


def calibrate(bench: Bench, names: list[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of each token method: those that came with the model, or that it finds out from images."""
    from vitprune import parts
    from vitprune.tokens.base import Reducer

    found = {}
    for name in names:
        if name == bench.profile.model.checkpoint_format:
            found[name] = bench.method_weights(name)
            continue
        kind = parts.load("vitprune.tokens", name, Reducer)  # type: ignore[type-abstract]
        found[name] = kind.calibrated(bench.base, bench.search_images[:CALIBRATION])
        if found[name]:
            save_weights(found[name], folder / f"{name}{METHOD_WEIGHTS}")
    return found


def one_schedule(dense: Vit, methods: dict[str, dict[str, Tensor]], images: Tensor) -> dict[str, float]:
    """Mean loss of ``dense`` on ``images`` with each token method by itself, all at about the same counts.

    Args:
        methods: the weights of each method by its name.
    """
    import torch

    from vitprune.search.probes import distance
    from vitprune.statistics import batches
    from vitprune.surgery import reduce_tokens

    models = {name: reduce_tokens(dense, name, _counts(dense, name), weights) for name, weights in methods.items()}
    sums = dict.fromkeys(methods, 0.0)
    with torch.no_grad():
        for batch in batches(dense, images):
            wanted = dense(batch)
            for name, model in models.items():
                sums[name] += float(distance(dense)(wanted, model(batch)).sum())
    return {name: total / len(images) for name, total in sums.items()}


def _counts(dense: Vit, name: str) -> dict[int, int]:
    """Patch tokens that leave three blocks; where a method cannot leave so few, the fewest."""
    from vitprune import parts
    from vitprune.tokens.base import Reducer, thrice

    kind = parts.load("vitprune.tokens", name, Reducer)  # type: ignore[type-abstract]
    patches, counts = dense.config.patches, {}
    for block in sorted(thrice(len(dense.config.blocks))):
        fewest = kind.fewest(patches, dense.config.prefix)
        patches = fewest if kind.grid else max(fewest, round(SHARE * patches))
        counts[block] = patches
    return counts
