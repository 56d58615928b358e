from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from vitprune.errors import InputError
from vitprune_deploy.data.preprocess import Preprocess, to_mode


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth gradient with noise, so that resampling and cropping both matter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    layers = [np.clip(y * 3 + x * 2 * (c + 1) + rng.integers(0, 60, (height, width)), 0, 255) for c in range(3)]
    return Image.fromarray(np.stack(layers, -1).astype(np.uint8)).convert(mode)


def by_timm(image: Image.Image, config: dict) -> np.ndarray:
    image = image.convert("RGB" if config["input_size"][0] == 3 else "L")
    return create_transform(**config, is_training=False)(image).numpy()


def config(size=(3, 32, 32), **other) -> dict:
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if size[0] == 3 else ((0.286,), (0.353,))
    return {"input_size": size, "interpolation": "bicubic", "mean": mean, "std": std, "crop_pct": 0.875,
            "crop_mode": "center"} | other  # fmt: skip


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("size", [(3, 32, 32), (1, 32, 32), (3, 24, 40), (1, 40, 24)])
def test_pixels_are_those_of_timm_in_every_crop_mode_and_interpolation(crop_mode, interpolation, size):
    asked = config(size, crop_mode=crop_mode, interpolation=interpolation)
    for width, height in [(61, 45), (20, 17), (36, 36), (200, 30)]:
        image = picture(width, height)
        np.testing.assert_array_equal(Preprocess.from_dict(asked)(image), by_timm(image, asked))


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(12, 90),
    height=st.integers(12, 90),
    target=st.tuples(st.integers(4, 48), st.integers(4, 48)),
    crop_pct=st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.7]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
)
def test_pixels_are_those_of_timm_for_any_sizes(width, height, target, crop_pct, crop_mode):
    asked = config((3, *target), crop_pct=crop_pct, crop_mode=crop_mode)
    image = picture(width, height)
    np.testing.assert_array_equal(Preprocess.from_dict(asked)(image), by_timm(image, asked))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_pillow_is_read_as_timm_reads_it(mode, channels):
    image = picture(40, 50).convert("L").convert(mode) if mode in ("F", "LA") else picture(40, 50, mode)
    asked = config((channels, 32, 32))
    np.testing.assert_array_equal(Preprocess.from_dict(asked)(image), by_timm(image, asked))


def test_a_palette_image_with_transparency_is_read_by_its_colours():
    rgba = picture(40, 50, "RGBA")
    rgba.putalpha(100)
    palette = rgba.quantize(16)
    np.testing.assert_array_equal(Preprocess.from_dict(config())(palette), by_timm(palette, config()))


def test_sixteen_bits_are_scaled_to_eight_and_not_cut_off():
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert np.asarray(to_mode(image, 1)).tolist() == [[0, 0, 1], [128, 255, 255]]
        assert np.asarray(to_mode(image, 3))[:, :, 2].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_exif_orientation_is_left_alone_as_timm_leaves_it():
    upright, file = picture(40, 60), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    upright.save(file, "PNG", exif=exif)
    turned = Image.open(file)
    assert turned.getexif()[0x0112] == 6
    np.testing.assert_array_equal(Preprocess.from_dict(config())(turned), Preprocess.from_dict(config())(upright))


def test_normalising_a_batch_is_the_same_as_each_image_by_itself():
    preprocess = Preprocess.from_dict(config())
    images = [picture(50, 40, seed=i) for i in range(3)]
    together = preprocess.normalise(np.stack([preprocess.pixels(i) for i in images]))
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.stack([preprocess(i) for i in images]))


def test_plain_data_and_back_gives_the_same_transform():
    preprocess = Preprocess((1, 30, 30), "bilinear", (0.5,), (0.25,), 1.0, "squash")
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert preprocess.to_dict()["input_size"] == [1, 30, 30]
    assert preprocess.at(60, 45).input_size == (1, 60, 45)


def test_a_data_config_of_timm_is_understood_as_it_comes():
    resolved = resolve_data_config({}, pretrained_cfg={"input_size": (3, 224, 224), "crop_pct": 0.9})
    assert Preprocess.from_dict(resolved).crop_pct == 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": (4, 32, 32)}, "1 or 3 channels"),
        ({"interpolation": "random"}, "interpolation must be one of"),
        ({"crop_mode": "centre"}, "crop_mode must be one of center, squash, border, got 'centre'"),
        ({"crop_pct": 1.5}, r"crop_pct must lie in \(0, 1\], got 1.5"),
        ({"mean": (0.5,)}, "mean has 1 values for 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be > 0"),
        ({"std": None}, "wrong type"),
        ({"input_size": 224}, "wrong type"),
        ({"mean": "abc"}, "wrong type"),
        ({"size": 3}, "wanted input_size and any of"),
    ],
)
def test_a_config_out_of_range_is_refused_with_its_value(change, words):
    with pytest.raises(InputError, match=words):
        Preprocess.from_dict(config() | change)


def test_an_image_too_thin_to_resize_is_refused_instead_of_filling_memory():
    with pytest.raises(InputError, match="20000 x 1 pixels would become"):
        Preprocess.from_dict(config((3, 224, 224)))(Image.new("RGB", (20000, 1)))


def test_torch_takes_the_result_without_a_copy():
    assert torch.from_numpy(Preprocess.from_dict(config())(picture(40, 40))).is_contiguous()
