"""Sample images with what is left of them after each block that reduces tokens, as small PNG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from .facts import Frame, Picture

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.model.vit import Vit

MOST_FRAMES = 7  # blocks shown of one image
MOST_BYTES = 1_800_000  # of all pictures together
SIDE = 168  # pixels to which a smaller image is enlarged; larger ones are made smaller than twice that
COLOURS = 64
DARK = 0.2  # brightness left to a patch that no token holds
FUSED = np.array([214.0, 96.0, 24.0])  # tint of patches that only a mixture still has a share of
PARKED = np.array([120.0, 120.0, 220.0])  # tint of patches that wait
BORDER = np.array([0.0, 150.0, 255.0])


class Drawn(NamedTuple):
    """A picture, uint8 [H, W, 3], and what it shows."""

    caption: str
    pixels: np.ndarray


def pictures(
    model: Vit, images: Tensor, *, mean: Sequence[float], std: Sequence[float], names: Sequence[str]
) -> tuple[Picture, ...]:
    """One picture for each of the normalised ``images`` [B, channels, height, width], as many as fit ``MOST_BYTES``.

    Empty where the model reduces no tokens.

    Args:
        model: the pruned model, in eval mode.
        images: of the size of the model.
        mean, std: that the images were normalised with, by channel.
        names: of the images, such as their classes.
    """
    drawn: list[Picture] = []
    for name, frames in zip(names, strips(model, images, mean=mean, std=std, most=MOST_FRAMES), strict=False):
        drawn.append(Picture(name, tuple(Frame(one.caption, data_uri(one.pixels)) for one in frames)))
        if sum(len(frame.uri) for picture in drawn for frame in picture.frames) > MOST_BYTES:
            return tuple(drawn[:-1])
    return tuple(drawn)


def strips(
    model: Vit, images: Tensor, *, mean: Sequence[float], std: Sequence[float], most: int | None = None
) -> Iterator[list[Drawn]]:
    """Each image with what is left of it after the blocks that reduce tokens; nothing where none does.

    Args:
        model, images, mean, std: as for ``pictures``.
        most: frames of one image besides itself, spread over the blocks; None: all.
    """
    from .survivors import survivors

    maps, entering, parked = [], model.config.patches, np.zeros(0)
    for found in survivors(model, images):
        others = found.parked.any() and not np.array_equal(found.parked, parked)
        if found.tokens and (others or found.tokens != entering):  # 0: nothing reads the patches behind a last block
            maps.append(found)
        entering, parked = found.tokens, found.parked
    if not maps:
        return
    shown = [maps[i] for i in np.unique(np.linspace(0, len(maps) - 1, most or len(maps)).round().astype(int))]
    patch, total = model.config.patch_size, model.config.patches
    for number, image in enumerate(images.float().cpu().numpy()):
        pixels = _pixels(image, mean, std)
        frames = [Drawn("the image, as the model gets it", pixels)]
        for one in shown:
            caption = f"after block {one.block}: {one.tokens} of {total} tokens"
            left = draw(pixels, one.holder[number], one.fused[number], one.parked[number], patch)
            frames.append(Drawn(caption, left))
        yield frames


def draw(
    pixels: np.ndarray, holder: np.ndarray, fused: np.ndarray, parked: np.ndarray, patch: tuple[int, int]
) -> np.ndarray:
    """``pixels`` [H, W, 3] of 0..255, with merged regions in their mean colour and bordered, and what is gone dark.

    Args:
        holder, fused, parked: [P], as in ``survivors.BlockMap``.
        patch: height and width of a patch, in pixels.
    """
    scale = max(1, math.ceil(SIDE / max(pixels.shape[:2])))
    high, wide = (side * scale for side in patch)
    rows, columns = pixels.shape[0] // patch[0], pixels.shape[1] // patch[1]

    def spread(of_patch: np.ndarray) -> np.ndarray:
        return of_patch.reshape(rows, columns).repeat(high, axis=0).repeat(wide, axis=1)

    image = pixels.repeat(scale, axis=0).repeat(scale, axis=1).astype(float)[: rows * high, : columns * wide]
    token, merged = spread(holder), spread(_merged(holder))
    places = np.where(merged, token + 1, 0)
    count = np.maximum(np.bincount(places.ravel()), 1)
    means = np.stack([np.bincount(places.ravel(), image[..., c].ravel()) / count for c in range(3)], axis=-1)
    image = np.where(merged[..., None], means[places], image)
    image = np.where((token < 0)[..., None], image * DARK, image)
    for which, tint in ((fused, FUSED), (parked, PARKED)):
        image = np.where(spread(which)[..., None], 0.7 * image + 0.3 * tint, image)
    return np.where(_borders(token, merged)[..., None], 0.15 * image + 0.85 * BORDER, image).astype(np.uint8)


def enlarged(pixels: np.ndarray) -> Image.Image:
    """``pixels`` [H, W, 3] as an image between ``SIDE`` and twice that in size."""
    image = Image.fromarray(pixels.astype(np.uint8))
    scale = math.ceil(SIDE / max(image.size))
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((2 * SIDE, 2 * SIDE))
    return image


def data_uri(pixels: np.ndarray) -> str:
    """``pixels`` [H, W, 3], enlarged, as a PNG of few colours."""
    file = io.BytesIO()
    # the octree keeps the few pixels of borders in their colour, where median cut would give it up
    enlarged(pixels).quantize(COLOURS, Image.Quantize.FASTOCTREE).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _pixels(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image [channels, H, W] as it was, uint8 [H, W, 3]."""
    shown = image * np.array(std)[:, None, None] + np.array(mean)[:, None, None]
    shown = (255 * shown).clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0)
    return shown.repeat(3, axis=2) if shown.shape[2] == 1 else shown


def _merged(holder: np.ndarray) -> np.ndarray:
    """bool [P]: patches that share their token with another."""
    counts = np.bincount(holder[holder >= 0], minlength=1)
    return (holder >= 0) & (counts[holder.clip(0)] > 1)


def _borders(token: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """Pixels at which a merged region meets another token, bool like ``token`` [H, W]."""
    found = np.zeros(token.shape, bool)
    across = (token[1:] != token[:-1]) & (merged[1:] | merged[:-1])
    along = (token[:, 1:] != token[:, :-1]) & (merged[:, 1:] | merged[:, :-1])
    found[1:] |= across
    found[:, 1:] |= along
    return found
