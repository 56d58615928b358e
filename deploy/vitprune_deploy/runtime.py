"""What a service imports: a built model that takes images and gives predictions. Needs numpy, Pillow and a runtime.

model = vitprune_deploy.runtime.load("build/flowers")
model.predict(PIL.Image.open("rose.jpg")).top(3).labels
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, final

import numpy as np
from PIL import Image

from vitprune.errors import DamagedFile, InputError

from .artifact import MANIFEST, EngineEntry, Manifest
from .backends.base import Backend
from .data.preprocess import Preprocess
from .remote.device import Device, Here

Images = Image.Image | np.ndarray | Sequence["Image.Image | np.ndarray"]
CHUNK = 64  # images in one run where the engine names no largest batch


class Top(NamedTuple):
    """The most probable classes of each image, most probable first."""

    indices: np.ndarray  # int64 [B, k]
    probabilities: np.ndarray  # float32 [B, k]
    labels: list[list[str]]  # class names; the index as text where the model has none


@final
@dataclass(frozen=True)
class Prediction:
    """What the model says of B images.

    Attributes:
        logits: float32 [B, classes]; features for a model without a classifier.
        classes: names of the classes, if they are known.
    """

    logits: np.ndarray
    classes: tuple[str, ...] | None = None

    def top(self, k: int = 1) -> Top:
        """The ``k`` most probable classes of each image, or all if there are fewer.

        Raises:
            InputError: ``k`` is below 1.
        """
        if k < 1:
            raise InputError(f"top: k must be at least 1, got {k}")
        indices = np.argsort(-self.logits, axis=1, kind="stable")[:, :k]
        weights = np.exp(self.logits - self.logits.max(axis=1, keepdims=True), dtype=np.float64)
        shares = weights / weights.sum(axis=1, keepdims=True)
        probabilities = np.take_along_axis(shares, indices, axis=1).astype(np.float32)
        names = self.classes
        labels = [[str(i) if names is None else names[i] for i in row] for row in indices]
        return Top(indices, probabilities, labels)


@final
class Model:
    """A loaded engine with what its images must go through. Threads may share it: they take turns in the engine.

    Attributes:
        backend: the engine.
        preprocess: from an image to its input.
        classes: names of the classes, if they are known.
        max_batch: images in one run of the engine; more are split.
    """

    def __init__(
        self,
        backend: Backend,
        preprocess: Preprocess,
        classes: Sequence[str] | None = None,
        max_batch: int | None = None,
        min_batch: int = 1,
    ) -> None:
        self.backend, self.preprocess = backend, preprocess
        self.classes = None if classes is None else tuple(classes)
        first = backend.inputs[0].shape[0]
        self._fixed_batch = first if isinstance(first, int) else None
        self.max_batch = self._fixed_batch or max_batch or CHUNK
        self._least = self._fixed_batch or min_batch
        self._dtype = np.dtype(backend.inputs[0].dtype)
        self._turn = threading.Lock()

    def predict(self, images: Images) -> Prediction:
        """Predictions for one image or several.

        Args:
            images: an image of Pillow; pixels, uint8 [H, W, C] or [B, H, W, C]; a list of either, sizes mixed as they
                come; or what ``preprocess`` gave, float32 [C, H, W] or [B, C, H, W].

        Raises:
            InputError: it is none of these.
        """
        inputs = self.as_input(self._inputs(images))
        chunks = [inputs[i : i + self.max_batch] for i in range(0, len(inputs), self.max_batch)]
        return Prediction(np.concatenate([self._run(chunk) for chunk in chunks]).astype(np.float32), self.classes)

    def as_input(self, inputs: np.ndarray) -> np.ndarray:
        """Preprocessed images [B, C, H, W] in the number format of the engine."""
        return inputs.astype(self._dtype, copy=False)

    def close(self) -> None:
        """Free the engine."""
        self.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, chunk: np.ndarray) -> np.ndarray:
        """Outputs for at most one batch; an engine that takes no fewer images gets the last one again to fill it."""
        count = len(chunk)
        if count < self._least:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], self._least - count, axis=0)])
        with self._turn:
            return self.backend.run(np.ascontiguousarray(chunk))[:count]

    def _inputs(self, images: Images) -> np.ndarray:
        """Float32 [B, C, H, W], B at least 1."""
        if isinstance(images, np.ndarray) and images.dtype == np.float32:
            return self._ready(images)
        if isinstance(images, np.ndarray) and images.ndim == 4:
            images = list(images)
        if isinstance(images, Image.Image | np.ndarray):
            images = [images]
        if not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise InputError(f"predict: wanted images, got {type(images).__name__}; open files with PIL.Image.open")
        if not images:
            raise InputError("predict: wanted at least one image, got none")
        pixels = [self.preprocess.pixels(_as_image(image)) for image in images]
        return self.preprocess.normalise(np.stack(pixels))

    def _ready(self, inputs: np.ndarray) -> np.ndarray:
        inputs = inputs[None] if inputs.ndim == 3 else inputs
        if inputs.ndim != 4 or inputs.shape[1] != self.preprocess.channels or not len(inputs):
            raise InputError(
                f"predict: float32 is taken as preprocessed, [B, {self.preprocess.channels}, height, width], "
                f"got {list(inputs.shape)}; give pixels as uint8"
            )
        return inputs


def load(
    path: Path | str,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    device: Device | None = None,
) -> Model:
    """The model that a build left in the folder ``path``.

    Args:
        path: the output folder.
        runtime: which of its engines, such as ``onnxruntime``; None: the one that was validated.
        threads: processor threads that work on one batch; None leaves it to the runtime.
        verify: compare the engine with its sum in the manifest, which shows damage, not who made it.
        device: where it runs: a ``remote.board.Board``; None: in this process.

    Raises:
        InputError: no such folder, or no engine for ``runtime``.
        DamagedFile: the manifest or the engine is not what the build wrote.
        MissingError: the runtime is not installed.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    engine = _engine(manifest, folder, runtime)
    extra: dict[str, Any] = engine.model_extra or {}
    name = extra.get("file", "model.onnx")
    beside = f"{name.removesuffix('.plan')}.json"  # what a plan says of itself; as with a model's weights, it counts
    for needed in [n for n in manifest.files if n.startswith(name) or n == beside] or [name]:
        if verify:
            manifest.file(folder, needed)
    preprocess = preprocess_of(manifest, folder)
    # TensorRT-RTX is TensorRT under another package name, and one file serves both
    kind, options = engine.runtime.removesuffix("-rtx"), extra.get("options")
    backend = (device or Here()).load(kind, folder / name, threads=threads, options=options)
    classes = (manifest.model_extra or {}).get("classes")
    return Model(backend, preprocess, classes, extra.get("max_batch"), extra.get("min_batch", 1))


def preprocess_of(manifest: Manifest, folder: Path) -> Preprocess:
    """How the model in ``folder`` wants its images.

    Raises:
        DamagedFile: the manifest does not say.
    """
    found = (manifest.model_extra or {}).get("preprocess")
    if not isinstance(found, dict):
        raise DamagedFile(f"{folder / MANIFEST} does not say how images are preprocessed; run the build again")
    return Preprocess.from_dict(found)


def _engine(manifest: Manifest, folder: Path, runtime: str | None) -> EngineEntry:
    """The engine of ``runtime``; without a name, the one that was run when the folder was validated."""
    fitting = [e for e in manifest.engines if (e.status == "run" if runtime is None else e.runtime == runtime)]
    if fitting:
        return fitting[0]
    there = ", ".join(f"{e.runtime} ({e.precision}, {e.status})" for e in manifest.engines) or "none"
    wanted = "no engine that was run when it was built" if runtime is None else f"no engine for {runtime!r}"
    raise InputError(f"{folder} has {wanted}; it has {there}: name one of these runtimes")


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise InputError(f"predict: wanted images, got {type(image).__name__} in the list")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"predict: pixels must be uint8 [height, width, channels], got {image.dtype} {list(image.shape)}; "
            "preprocessed images come as one float32 array [B, C, H, W]"
        )
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
