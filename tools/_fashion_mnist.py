"""Fashion-MNIST as arrays, from the four gzipped IDX files that its authors publish (Debian: dataset-fashion-mnist).

Xiao, Rasul, Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017,
https://arxiv.org/abs/1708.07747. MIT licence.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels in [0, 1]
DEFAULT_SOURCE = Path("/usr/share/datasets/fashion-mnist")


def load(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28] and labels [N], both uint8, of ``part``: 'train' (60,000) or 't10k' (10,000)."""
    return _idx(source / f"{part}-images-idx3-ubyte.gz"), _idx(source / f"{part}-labels-idx1-ubyte.gz")


def _idx(path: Path) -> np.ndarray:
    if not path.is_file():
        raise SystemExit(f"{path} is missing; on Debian: apt-get install dataset-fashion-mnist, or pass --source")
    data = gzip.decompress(path.read_bytes())
    axes = data[3]  # IDX: two zero bytes, the type, the number of axes, then their sizes as big-endian int32
    shape = np.frombuffer(data, ">i4", count=axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
