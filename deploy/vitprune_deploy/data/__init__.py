"""Images: where they come from, which class they show, how they are split and fed. Needs numpy and Pillow only."""

from __future__ import annotations

from .feed import Augmented, batches, picked
from .images import ImageSet, open_images
from .preprocess import Preprocess
from .split import Split, Wanted, check_disjoint, open_split, split_three

__all__ = [
    "Augmented",
    "ImageSet",
    "Preprocess",
    "Split",
    "Wanted",
    "batches",
    "check_disjoint",
    "open_images",
    "open_split",
    "picked",
    "split_three",
]
