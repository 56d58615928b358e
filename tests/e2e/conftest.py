"""A small model, small images and a profile for both: a whole build in well under a minute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import PROFILE


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_our_own(tmp_path_factory):
    """What builds keep for later ones stays out of the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITPRUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Three folders of 60 small PNG files: stripes of three directions, with noise."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for name, wave in (("across", rows), ("down", columns), ("slanted", rows + columns)):
        (root / name).mkdir()
        for number in range(60):
            stripes = 127 + 100 * np.sin(wave / rng.uniform(1, 3) + rng.uniform(0, 6))
            pixels = np.clip(stripes[..., None] + rng.normal(0, 20, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture
def profile_path(tmp_path, images) -> Path:
    """The profile, in a folder of its own."""
    path = tmp_path / "small.yaml"
    path.write_text(PROFILE.format(images=images))
    return path
