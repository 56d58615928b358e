"""One test image with what the engine says of it, so that whatever embeds the folder can be checked against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitprune.errors import DamagedFile

from ..artifact import Manifest
from ..data.preprocess import to_mode
from ..runtime import Model

IMAGE, ANSWER = "golden.png", "golden.json"
MOST_PIXELS = 512  # on the longer side: the file stays small, and is still resized on its way into the model
# Share of the largest logit by which another version or processor may be off: it adds in another order, and with few
# bits that may change which token is kept. Other pixels, another preprocessing or another engine are off by more.
TOLERANCE = {"fp32": 1e-3}
ROUGH = 5e-2  # in any other precision


class Difference(NamedTuple):
    """How far an engine's logits for the golden image are from those that it was shipped with."""

    max_abs: float | None  # None: they are of another number, or not finite
    tolerance: float

    @property
    def small(self) -> bool:
        """Whether it is rounding, and no other engine or preprocessing."""
        return self.max_abs is not None and self.max_abs <= self.tolerance


def write_golden(folder: Path, model: Model, image: Image.Image, precision: str) -> bool:
    """Write ``image`` and the logits of ``model`` for it to ``folder``; False, and nothing, where they are not finite.

    Args:
        folder: where ``golden.png`` and ``golden.json`` go.
        model: the engine that is shipped.
        image: any image, as large as it may be.
        precision: of the engine, ``fp32`` or another.
    """
    picture = Image.fromarray(np.asarray(to_mode(image, model.preprocess.channels)))  # its pixels and nothing else
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    logits = model.predict(picture).logits[0]
    if not np.isfinite(logits).all():
        return False
    picture.save(folder / IMAGE)
    answer = {
        "image": IMAGE,
        "runtime": model.backend.runtime,
        "provider": model.backend.provider,
        "precision": precision,
        "tolerance": TOLERANCE.get(precision, ROUGH) * max(1.0, float(np.abs(logits).max())),
        "logits": [float(value) for value in logits.ravel()],
    }
    (folder / ANSWER).write_text(json.dumps(answer, allow_nan=False) + "\n", encoding="utf-8")
    return True


def compare_golden(folder: Path, manifest: Manifest, model: Model) -> Difference | None:
    """How far ``model`` is from the golden logits of ``folder``; None where an older build wrote none.

    Raises:
        DamagedFile: a golden file is not what the manifest says.
    """
    if ANSWER not in manifest.files:
        return None
    try:
        answer = json.loads(manifest.file(folder, ANSWER).read_bytes())
        wanted, tolerance = np.array(answer["logits"], np.float32), float(answer["tolerance"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / ANSWER} is damaged ({error}); run the build again") from error
    with Image.open(manifest.file(folder, IMAGE)) as image:
        found = model.predict(image).logits[0].ravel()
    comparable = found.shape == wanted.shape and np.isfinite(found).all()
    return Difference(float(np.abs(found - wanted).max()) if comparable else None, tolerance)
