"""Which tokens of images survive in a built model, block by block, as one PNG for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vitprune.errors import InputError

from ..artifact import Manifest
from ..files import atomic_path
from ..runtime import preprocess_of
from .answer import Answer

if TYPE_CHECKING:
    from ..report.pictures import Drawn

GAP, LINE = 12, 20  # pixels between two pictures, and for a caption
NEEDED = ("model.json", "model.safetensors")


def visualize(folder: Path, images: Sequence[Path], output: Path | None) -> Answer:
    """Draws ``images`` into ``output``, by default the folder ``tokens`` in ``folder``.

    Raises:
        InputError: there is no such folder or image, or the model reduces no tokens.
        DamagedFile: a file of the folder is not what the build wrote.
        ImportError: torch is not installed.
    """
    import torch

    from ..build.bench import load_vit
    from ..report.pictures import strips

    manifest = Manifest.load(folder)
    for name in NEEDED:
        manifest.file(folder, name)
    preprocess = preprocess_of(manifest, folder)
    pixels = np.stack([preprocess(_open(path)) for path in images])
    drawn = strips(load_vit(folder, "model"), torch.from_numpy(pixels), mean=preprocess.mean, std=preprocess.std)
    written: list[Path] = []
    place = output or folder / "tokens"
    for path, frames in zip(images, drawn, strict=False):
        file = _free(place, path.stem, written)
        with atomic_path(file) as temporary:
            _strip(frames).save(temporary, "PNG")
        written.append(file)
    if not written:
        raise InputError(f"{folder}: the model reduces no tokens, so all of them survive")
    return Answer("\n".join(map(str, written)), [str(file) for file in written])


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such image") from error
    except Exception as error:  # Pillow raises whatever the damaged bytes provoke
        raise InputError(f"{path} is no image that can be read ({error})") from error


def _free(folder: Path, stem: str, taken: Sequence[Path]) -> Path:
    """A file for an image; images of one name from several folders get a number."""
    file, number = folder / f"{stem}.png", 1
    while file in taken:
        number += 1
        file = folder / f"{stem}-{number}.png"
    return file


def _strip(frames: Sequence[Drawn]) -> Image.Image:
    """The pictures side by side, each above its caption."""
    from ..report.pictures import enlarged

    pictures = [enlarged(frame.pixels) for frame in frames]
    texts = [frame.caption for frame in frames]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [max(p.width, round(pen.textlength(t))) for p, t in zip(pictures, texts, strict=True)]
    height = max(picture.height for picture in pictures)
    strip = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), height + LINE + 2 * GAP), "white")
    pen, left = ImageDraw.Draw(strip), GAP
    for picture, text, width in zip(pictures, texts, widths, strict=True):
        strip.paste(picture, (left, GAP))
        pen.text((left, GAP + height + 4), text, fill="black")
        left += width + GAP
    return strip
