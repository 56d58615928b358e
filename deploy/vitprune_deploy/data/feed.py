"""Images in batches: as the model wants them, or varied a little for training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import final

import numpy as np
from PIL import Image

from vitprune.errors import DamagedFile, InputError

from .images import ImageSet
from .preprocess import INTERPOLATIONS, Preprocess, to_mode

SMALL_PIXELS = 64  # inputs up to this side are shifted: cutting out and enlarging would blur them
AREA, ASPECT = (0.8, 1.0), (0.9, 1.1)  # of the piece cut out of larger ones: share of the area, width by height


def batches(
    images: ImageSet, preprocess: Preprocess, size: int, *, threads: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of images, float32 [B, C, H, W], and classes, int64 [B], -1 where unknown; in the order of the set.

    Images that cannot be read are left out, so every pass over a set gives the same. All batches but the last hold
    ``size``.

    Args:
        images: the set.
        preprocess: what the model wants.
        size: images in a batch.
        threads: decode in as many threads, two batches ahead; 0: when asked for.

    Raises:
        InputError: more images than ``images.max_unreadable`` cannot be read.
    """

    rows: list[np.ndarray] = []
    labels: list[int] = []
    for i, row in enumerate(
        _in_order(lambda i: _look(images, i, preprocess.pixels), len(images), threads, ahead=2 * size)
    ):
        if row is None:
            images.check_unreadable()
            continue
        rows.append(row)
        labels.append(-1 if images.labels is None else int(images.labels[i]))
        if len(rows) == size:
            yield preprocess.normalise(np.stack(rows)), np.array(labels)
            rows, labels = [], []
    if rows:
        yield preprocess.normalise(np.stack(rows)), np.array(labels)


def picked(images: ImageSet, preprocess: Preprocess, wanted: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """The images ``wanted`` of the set, float32 [B, C, H, W], and their indices.

    In place of an image that cannot be read comes the next one that can: unlike a subset of a few images, the whole
    set may hold some that are unreadable.

    Raises:
        InputError: more images than ``images.max_unreadable`` cannot be read.
    """
    rows, indices = [], []
    for i in wanted:
        while (row := _look(images, i, preprocess.pixels)) is None:
            images.check_unreadable()  # ends the loop before it comes round
            i = (i + 1) % len(images)
        rows.append(row)
        indices.append(i)
    return preprocess.normalise(np.stack(rows)), indices


@final
class Augmented:
    """Images for training: a map-style data set, as ``torch.utils.data.DataLoader`` takes it.

    An item is the image, float32 [C, H, W], and its index in the set. What is done to an image depends on the seed, the
    epoch and its index alone: mirrored in half of the cases; a piece of 80 to 100% of its area cut out and resized, or,
    for inputs of up to 64 pixels, the evaluation view shifted by up to a fifteenth of its side.

    Args:
        images: the set. In place of an image that cannot be read comes the next one that can.
        preprocess: what the model wants.
        seed: of all variation.
        augment: False gives the evaluation view.
    """

    def __init__(self, images: ImageSet, preprocess: Preprocess, *, seed: int = 0, augment: bool = True) -> None:
        self.images, self.preprocess, self.seed, self.augment = images, preprocess, seed, augment
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Vary the images anew. A DataLoader with persistent workers does not see it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        i = index
        while (pixels := _look(self.images, i, partial(self._vary, i))) is None:
            self.images.check_unreadable()  # ends the loop before it comes round
            i = (i + 1) % len(self)
        return self.preprocess.normalise(pixels[None])[0], i

    def _vary(self, i: int, image: Image.Image) -> np.ndarray:
        if not self.augment:
            return self.preprocess.pixels(image)
        rng = np.random.default_rng((self.seed, self.epoch, i))
        mirrored = rng.random() < 0.5
        small = max(self.preprocess.size) <= SMALL_PIXELS
        pixels = self._shifted(image, rng) if small else self._cut_out(image, rng)
        return pixels[:, ::-1] if mirrored else pixels

    def _shifted(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """The evaluation view moved by a few pixels; its edge is repeated."""
        height, width = self.preprocess.size
        most = max(1, round(max(height, width) / 15))
        top, left = rng.integers(0, 2 * most + 1, 2)
        padded = np.pad(self.preprocess.pixels(image), ((most, most), (most, most), (0, 0)), mode="edge")
        return padded[top : top + height, left : left + width]

    def _cut_out(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Inception's random resized crop, gently, of the shape that the evaluation view has."""
        target = self.preprocess.size
        wide = self.preprocess.crop_mode == "squash" or image.width * target[0] > image.height * target[1]
        tall = self.preprocess.crop_mode == "squash" or not wide
        area, aspect = rng.uniform(*AREA), rng.uniform(*ASPECT)
        width = image.width if tall else image.height * target[1] / target[0]
        height = image.height if wide else image.width * target[0] / target[1]
        width, height = (
            min(width * (area * aspect) ** 0.5, image.width),
            min(height * (area / aspect) ** 0.5, image.height),
        )
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        image = to_mode(image, self.preprocess.channels)
        box = (left, top, left + width, top + height)
        resized = image.resize((target[1], target[0]), INTERPOLATIONS[self.preprocess.interpolation], box)
        return np.asarray(resized).reshape(*target, self.preprocess.channels)


def _look(images: ImageSet, i: int, view: Callable[[Image.Image], np.ndarray]) -> np.ndarray | None:
    """``view`` of image ``i``; None, and noted in the set, where it cannot be read or is too thin for the model."""
    try:
        return view(images.image(i))
    except InputError as error:
        images.store.refuse(int(images.indices[i]), str(error))
    except DamagedFile:
        pass
    return None


def _in_order(
    work: Callable[[int], np.ndarray | None], count: int, threads: int, ahead: int
) -> Iterator[np.ndarray | None]:
    """``work(0)``, ``work(1)``, ... in order, done by ``threads`` threads that run at most ``ahead`` calls ahead."""
    if threads <= 0:
        yield from map(work, range(count))
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[np.ndarray | None]] = deque()
        try:
            for i in range(count):
                waiting.append(pool.submit(work, i))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the caller may stop half way
            for future in waiting:
                future.cancel()
