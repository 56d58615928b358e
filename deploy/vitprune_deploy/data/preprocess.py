"""From an image to the model's input, with numpy and Pillow only; the numbers are those of timm's evaluation transform.

Follows ``timm.data.create_transform(**data_config, is_training=False)`` (Ross Wightman, PyTorch Image Models,
https://github.com/huggingface/pytorch-image-models, Apache-2.0), bit for bit. Differs from it for grey images of 16
bits, which are scaled to 8; Pillow's own conversion, and so timm, turns all but their darkest pixels white.
Like timm it does not turn images as their EXIF orientation says, since the model was not trained that way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, final

import numpy as np
from PIL import Image

from vitprune.errors import InputError

INTERPOLATIONS = {name.lower(): mode for name, mode in Image.Resampling.__members__.items()}
CROP_MODES = ("center", "squash", "border")
MAX_PIXELS = 89_478_485  # the size at which Pillow begins to warn of a decompression bomb


@final
@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images: a timm data config that can be called.

    Attributes:
        input_size: channels (1 or 3), height and width.
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming.
        mean, std: per channel, of pixels in 0..1.
        crop_pct: share of the resized image's side that the crop keeps.
        crop_mode: center (shortest side resized, the middle kept), squash (aspect ratio given up) or border (longest
            side resized, the rest filled with the mean).
    """

    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3) or min(self.input_size) < 1:
            raise InputError(f"preprocess: input_size must be (1 or 3 channels, height, width), got {self.input_size}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise InputError(f"preprocess: interpolation must be one of {known}, got {self.interpolation!r}")
        if self.crop_mode not in CROP_MODES:
            raise InputError(f"preprocess: crop_mode must be one of {', '.join(CROP_MODES)}, got {self.crop_mode!r}")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"preprocess: crop_pct must lie in (0, 1], got {self.crop_pct}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise InputError(f"preprocess: {name} has {len(values)} values for {self.channels} channels")
        if min(self.std) <= 0:
            raise InputError(f"preprocess: std must be > 0 in each channel, got {self.std}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocess:
        """The transform that ``config`` describes: what ``to_dict`` gave, or timm's resolved data config.

        Raises:
            InputError: an unknown key, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        strange = sorted(set(config) - set(known))
        if strange or "input_size" not in config:
            raise InputError(f"preprocess: wanted input_size and any of {', '.join(known)}, got {', '.join(config)}")
        words, numbers = ("interpolation", "crop_mode"), ("input_size", "mean", "std")
        try:
            values: dict[str, Any] = {n: tuple(float(x) for x in v) if n in numbers else v for n, v in config.items()}
            values |= {"input_size": tuple(int(x) for x in values["input_size"])}
            values |= {"crop_pct": float(values.get("crop_pct", cls.crop_pct))}
        except (TypeError, ValueError) as error:
            raise InputError(f"preprocess: a value of {dict(config)} has the wrong type ({error})") from None
        return cls(**values | {n: str(values[n]) for n in words if n in values})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON or YAML."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def at(self, height: int, width: int) -> Preprocess:
        """The same for another image size."""
        return replace(self, input_size=(self.channels, height, width))

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (red, green, blue)."""
        return self.input_size[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return self.input_size[1], self.input_size[2]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The model's input for ``image``: float32 [C, H, W].

        Raises:
            InputError: the image is so long and thin that resizing it would take more than ``MAX_PIXELS``.
        """
        return self.normalise(self.pixels(image)[None])[0]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """What the model sees of ``image``, before normalisation: uint8 [H, W, C]."""
        image = to_mode(image, self.channels)
        image = self._crop(self._resize(image))
        return np.asarray(image).reshape(*self.size, self.channels)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Float32 [B, C, H, W] of uint8 ``pixels`` [B, H, W, C]: to 0..1, minus the mean, by the deviation."""
        x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
        x /= np.float32(255)
        x -= np.array(self.mean, np.float32)[:, None, None]
        x /= np.array(self.std, np.float32)[:, None, None]
        return x

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self._resized(image.height, image.width)
        if height * width > MAX_PIXELS or min(height, width) < 1:
            raise InputError(
                f"an image of {image.width} x {image.height} pixels would become {width} x {height} "
                f"for an input of {self.input_size[2]} x {self.input_size[1]}; crop it first"
            )
        if (height, width) == (image.height, image.width):
            return image
        return image.resize((width, height), INTERPOLATIONS[self.interpolation])

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image is resized before the crop."""
        target = [math.floor(side / self.crop_pct) for side in self.size]
        if self.crop_mode == "squash":
            return target[0], target[1]
        if self.crop_mode == "center" and target[0] == target[1]:
            # torchvision rounds the longer side down, timm's own resize (below) rounds both to the nearest
            short, long = target[0], int(target[0] * max(height, width) / min(height, width))
            return (short, long) if height <= width else (long, short)
        ratios = height / target[0], width / target[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _crop(self, image: Image.Image) -> Image.Image:
        """The middle of ``image``, filled up where it is too small."""
        height, width = self.size
        missing_y, missing_x = max(height - image.height, 0), max(width - image.width, 0)
        if missing_x or missing_y:
            fill = tuple(round(255 * v) for v in self.mean) if self.crop_mode == "border" else (0,) * self.channels
            full = Image.new(image.mode, (image.width + missing_x, image.height + missing_y), fill)
            full.paste(image, (missing_x // 2, missing_y // 2))
            image = full
        # Python's round, which takes the even neighbour of a half, as torchvision does
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """``image`` with 8 bits in each of 1 or 3 channels; transparency is dropped, as timm does it."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)
