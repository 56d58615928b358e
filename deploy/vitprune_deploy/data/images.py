"""A set of images with their classes, decoded when they are asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, final

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitprune.errors import DamagedFile, InputError

from .classes import ClassMap, class_indices
from .preprocess import MAX_PIXELS
from .sources import Source, open_source

log = logging.getLogger(__name__)

CACHE_BYTES = 2**28  # decoded images are kept when all of the source's would fit in this


@final
class Store:
    """The images of a source. Small sets are decoded once; what cannot be read is remembered with the reason.

    Attributes:
        unreadable: reason by index.
    """

    def __init__(self, source: Source, cache_bytes: int = CACHE_BYTES) -> None:
        self.source = source
        self.unreadable: dict[int, str] = {}
        self._share_bytes = cache_bytes / len(source.entries)
        self._decoded: dict[int, Image.Image] = {}  # plain assignments: threads may both decode, none waits

    def image(self, index: int) -> Image.Image:
        """Image ``index``, decoded, in the mode of its file. Not to be changed.

        Raises:
            DamagedFile: it cannot be read.
        """
        image = self._decoded.get(index)
        if image is not None:
            return image
        try:
            image = self._decode(index)
        except UnidentifiedImageError:  # its text has the address of a buffer
            self.refuse(index, "not an image of a format that Pillow reads")
        except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
            self.refuse(index, f"{error or type(error).__name__}")
        else:
            if image.width * image.height * len(image.getbands()) <= self._share_bytes:
                self._decoded[index] = image
            return image
        raise DamagedFile(f"{self.source.entries[index].name}: {self.unreadable[index]}")

    def refuse(self, index: int, reason: str) -> None:
        """Remember that image ``index`` is of no use, and name it in the log."""
        reason = " ".join(reason.split())
        if index not in self.unreadable:
            log.info("%s: %s is left out: %s", self.source.where, self.source.entries[index].name, reason)
        self.unreadable[index] = reason

    def _decode(self, index: int) -> Image.Image:
        image = self.source.open(index)
        if image.width * image.height > MAX_PIXELS:
            raise OSError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        image.load()
        return image


@final
class ImageSet:
    """Images of one source, or some of them. Indices count within the set.

    Attributes:
        store: the source, shared by all subsets of it.
        indices: which of the source's images, int64 [N].
        labels: the model's output that each image belongs to, int64 [N]; None where that is not known.
        max_unreadable: share of the images that may be unreadable before a pass over them is given up.
    """

    def __init__(self, store: Store, indices: np.ndarray, labels: np.ndarray | None, max_unreadable: float) -> None:
        self.store, self.indices, self.labels, self.max_unreadable = store, indices, labels, max_unreadable

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> Image.Image:
        """Image ``i``, decoded, in the mode of its file. Not to be changed.

        Raises:
            DamagedFile: it cannot be read.
        """
        return self.store.image(int(self.indices[i]))

    def label(self, i: int) -> int | None:
        """The model's output that image ``i`` belongs to; None where that is not known."""
        return None if self.labels is None else int(self.labels[i])

    def name(self, i: int) -> str:
        """Path of image ``i`` inside its source, control characters escaped."""
        return self.store.source.entries[int(self.indices[i])].name

    def read(self, i: int) -> bytes:
        """The file of image ``i``, undecoded."""
        return self.store.source.read(int(self.indices[i]))

    def size_bytes(self, i: int) -> int:
        """Length of the file of image ``i``."""
        return self.store.source.size_bytes(int(self.indices[i]))

    def subset(self, picked: Sequence[int] | np.ndarray) -> ImageSet:
        """The images ``picked``, in that order."""
        picked = np.asarray(picked, np.int64)
        labels = None if self.labels is None else self.labels[picked]
        return ImageSet(self.store, self.indices[picked], labels, self.max_unreadable)

    @property
    def where(self) -> str:
        """The source, for messages."""
        return self.store.source.where

    @property
    def unreadable(self) -> dict[str, str]:
        """Reason by name, of those images of this set that were found to be unreadable so far."""
        bad = self.store.unreadable
        return {self.name(i): bad[int(n)] for i, n in enumerate(self.indices) if int(n) in bad} if bad else {}

    def check_unreadable(self) -> None:
        """Give up if too many images could not be read.

        Raises:
            InputError: more than ``max_unreadable`` of them; the first three are named.
        """
        allowed = int(self.max_unreadable * len(self))
        if len(self.store.unreadable) <= allowed:
            return
        bad = self.unreadable
        if len(bad) > allowed:
            named = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:3])
            raise InputError(
                f"{self.where}: {len(bad)} of {len(self)} images cannot be read, at most {allowed} may be "
                f"(data.max_unreadable {self.max_unreadable:g}): {named}"
            )


def open_images(
    source: str | Path,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    class_map: ClassMap | None = None,
    labelled: Literal["auto"] | bool = "auto",
    max_unreadable: float = 0.01,
) -> ImageSet:
    """The images of ``source`` in the order of their names; nothing is decoded yet.

    Args:
        source: a folder, an archive, a folder inside one, or ``timm:READER`` (see ``sources.open_source``).
        split: a folder inside the source; with a reader, its split.
        root: where a reader keeps its data.
        class_names: the model's classes, in the order of its outputs.
        num_classes: how many outputs it has; None for a model without a classifier.
        class_map: which folder is which class (see ``classes.class_indices``).
        labelled: whether folders name classes; auto: they do if all images lie in folders.
        max_unreadable: share of the images that may be unreadable.

    Raises:
        InputError: no images, or folders that stand for no class.
        DamagedFile: the archive is cut off.
        MissingError: a package that only this source needs is not installed.
    """
    found = open_source(source, split, root)
    folders = [entry.folder for entry in found.entries]
    flat = found.targets is None and None in folders
    if labelled is True and flat:
        stray = next(entry.name for entry in found.entries if entry.folder is None)
        raise InputError(f"{found.where}: data.labelled is true, but {stray} lies in no class folder")
    labels = None
    if labelled is not False and not flat:
        labels = _labels(found, class_names, num_classes, class_map)
    return ImageSet(Store(found), np.arange(len(found.entries)), labels, max_unreadable)


def _labels(
    source: Source, class_names: Sequence[str] | None, num_classes: int | None, class_map: ClassMap | None
) -> np.ndarray:
    indices_of = partial(class_indices, class_names=class_names, num_classes=num_classes, class_map=class_map)
    if source.targets is None:
        folders = [str(entry.folder) for entry in source.entries]
        index = indices_of(sorted(set(folders)), source.where)
        return np.array([index[folder] for folder in folders], np.int64)
    targets = np.asarray(source.targets, np.int64)
    names = source.target_names
    if names is not None and (class_names is not None or class_map is not None):
        index = indices_of(names, source.where)
        targets = np.array([index[name] for name in names], np.int64)[targets]
    if num_classes is not None and targets.max() >= num_classes:
        raise InputError(
            f"{source.where} counts classes up to {targets.max()} and the model has {num_classes}; "
            "name its classes in model.classes, or give data.class_map"
        )
    return targets
