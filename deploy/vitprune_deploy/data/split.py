"""Calibration, recovery and test: three parts of the images that have none in common."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vitprune.errors import InputError

from .images import ImageSet, open_images

if TYPE_CHECKING:
    from vitprune_deploy.profile.schema import Data

HEAD_BYTES = 4096  # what is compared before whole files are


class Wanted(NamedTuple):
    """What one part is drawn from; parts of the very same set share it, without a common image."""

    images: ImageSet
    number: int | None = None  # None: all there are; parts that share a set get equal shares of what is left


class Split(NamedTuple):
    """Three disjoint parts."""

    calibration: ImageSet
    recovery: ImageSet
    test: ImageSet


Items = dict[str, list[int]]  # indices by part


def split_three(calibration: Wanted, recovery: Wanted, test: Wanted, seed: int = 0) -> Split:
    """Three parts, each with the share of every class that its set has, drawn by ``seed`` and disjoint.

    Raises:
        InputError: more images wanted than there are, or the same image in two of the sets.
    """
    wanted = {"calibration": calibration, "recovery": recovery, "test": test}
    by_set: dict[int, dict[str, int | None]] = defaultdict(dict)
    for name, part in wanted.items():
        by_set[id(part.images)][name] = part.number
    parts: dict[str, ImageSet] = {}
    for counts in by_set.values():
        images = wanted[next(iter(counts))].images
        parts |= _draw(images, counts, seed)
    check_disjoint(parts)
    return Split(**parts)


def open_split(
    data: Data, *, class_names: tuple[str, ...] | list[str] | None = None, num_classes: int | None = None, seed: int = 0
) -> Split:
    """The three parts that the section ``data`` of a profile describes.

    Args:
        data: the section.
        class_names: the model's classes, in the order of its outputs.
        num_classes: how many outputs it has; None for a model without a classifier.
        seed: of the draw.

    Raises:
        InputError, DamagedFile, MissingError: as ``open_images`` and ``split_three``.
    """
    opened: dict[tuple[str, str | None], ImageSet] = {}
    wanted = {}
    for name in Split._fields:
        part = getattr(data, name)
        source, split = part.source or data.source, part.split
        if source is None:
            raise InputError(f"nothing says where the images are; set data.source, or data.{name}.source")
        if (source, split) not in opened:
            opened[source, split] = open_images(
                source,
                split=split,
                root=data.root,
                class_names=class_names,
                num_classes=num_classes,
                class_map=data.class_map,
                labelled=data.labelled,
                max_unreadable=data.max_unreadable,
            )
        wanted[name] = Wanted(opened[source, split], part.images)
    return split_three(**wanted, seed=seed)


def check_disjoint(parts: Mapping[str, ImageSet]) -> None:
    """Make sure that no image is in two of ``parts``, whatever its name.

    Images of one source are told apart by their place in it, others by their bytes: first the length, then the
    beginning, and only where these agree the SHA-256 of the whole file.

    Raises:
        InputError: two parts share images; three are named.
    """
    suspects: Items = {name: list(range(len(images))) for name, images in parts.items()}
    same: list[list[tuple[str, int]]] = []
    for key in (_length, _beginning, _hash):
        same = _collisions(parts, suspects, key)
        suspects = {name: [i for group in same for part, i in group if part == name] for name in parts}
    if same:
        shown = ["; ".join(f"{part}: {parts[part].name(i)}" for part, i in group[:3]) for group in same[:3]]
        raise InputError(
            f"{len(same)} images are in more than one of {', '.join(parts)}, which must be disjoint, such as "
            f"({') and ('.join(shown)}); remove them from one of the parts"
        )


def stratified_order(labels: np.ndarray | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of ``count`` images in which every stretch holds the classes in about the shares of the whole."""
    order = rng.permutation(count)
    if labels is None:
        return order
    place = np.empty(count)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def _draw(images: ImageSet, counts: Mapping[str, int | None], seed: int) -> dict[str, ImageSet]:
    """Disjoint subsets of ``images`` of the sizes ``counts``, each in the order of the set."""
    fixed = sum(count or 0 for count in counts.values())
    open_parts = [name for name, count in counts.items() if count is None]
    left = len(images) - fixed
    if left < len(open_parts):
        asked = ", ".join(f"{name} {'the rest' if count is None else count}" for name, count in counts.items())
        raise InputError(f"{images.where} has {len(images)} images, too few for {asked}")
    order = stratified_order(images.labels, len(images), np.random.default_rng(seed))
    parts, start = {}, 0
    for name, count in counts.items():
        if count is None:
            count = left // len(open_parts) + (left % len(open_parts) if name == open_parts[-1] else 0)
        parts[name] = images.subset(np.sort(order[start : start + count]))
        start += count
    return parts


def _collisions(
    parts: Mapping[str, ImageSet], suspects: Items, key: Callable[[ImageSet, int], Hashable]
) -> list[list[tuple[str, int]]]:
    """Groups of images with the same key that are of different sources, or one and the same image."""
    groups: dict[Hashable, list[tuple[str, int]]] = defaultdict(list)
    for part, indices in suspects.items():
        for i in indices:
            try:
                groups[key(parts[part], i)].append((part, i))
            except Exception as error:  # as in Store.image: readers raise nearly anything; such an image is no copy
                parts[part].store.refuse(int(parts[part].indices[i]), f"{error or type(error).__name__}")
    shared = []
    for group in groups.values():
        places = {(id(parts[part].store), int(parts[part].indices[i])) for part, i in group}
        if len({store for store, _ in places}) > 1 or len(places) < len(group):
            shared.append(group)
    return shared


def _length(images: ImageSet, i: int) -> Hashable:
    return images.size_bytes(i)


def _beginning(images: ImageSet, i: int) -> Hashable:
    return images.read(i)[:HEAD_BYTES]


def _hash(images: ImageSet, i: int) -> Hashable:
    return hashlib.sha256(images.read(i)).digest()
