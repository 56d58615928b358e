"""From a request to the model's input, within limits.

An image comes as FP32 [B, channels, height, width], preprocessed by the client, or as BYTES [B], files as they are.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

import protocol
from protocol import Refused
from vitprune.errors import InputError
from vitprune_deploy.data.preprocess import MAX_PIXELS
from vitprune_deploy.runtime import Model

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow reads many more, and some of them by starting other programs


@dataclass(frozen=True)
class Limits:
    """What clients may ask for.

    Attributes:
        images: in a request.
        body_bytes: of a request.
        places: requests that may be in the service at once.
        read_s: seconds in which a request must arrive.
    """

    images: int = 64
    body_bytes: int = 16 << 20
    places: int = 256
    read_s: float = 30.0


def understand(model: Model, limits: Limits, body: bytes, header: str | None) -> tuple[protocol.Request, np.ndarray]:
    """The request, and its images as the model's input, float32 [B, C, H, W].

    Args:
        header: value of the HTTP header ``protocol.HEADER``, if there is one.

    Raises:
        Refused: the request is wrong, or asks for something else than the model's input and output.
    """
    request, binary = protocol.read(body, header)
    given, takes, gives = request.inputs[0], model.backend.inputs[0].name, model.backend.outputs[0].name
    if given.name != takes:
        raise Refused(400, f"the model's input is {takes}, got {given.name!r}")
    if request.outputs and request.outputs[0].name != gives:
        raise Refused(400, f"the model's output is {gives}, got {request.outputs[0].name!r}")
    count = given.shape[0] if given.shape else 0
    if not 1 <= count <= limits.images:
        raise Refused(400, f"a request takes 1 to {limits.images} images, this one has {count}")
    if given.datatype == "FP32":
        return request, protocol.tensor(given, binary, model.preprocess.input_size)
    if given.datatype == "BYTES":
        files = protocol.blobs(given, binary)
        return request, np.stack([_image(model, number, file) for number, file in enumerate(files)])
    raise Refused(400, f"input {takes} is FP32 or, for image files, BYTES; got {given.datatype!r}")


def _image(model: Model, number: int, file: bytes) -> np.ndarray:
    """An image file as the model's input, float32 [C, H, W]."""
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                return model.preprocess(image)
            raise InputError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    except InputError as error:
        raise Refused(400, f"image {number}: {error}") from None
    except Exception as error:  # Pillow raises whatever the damaged bytes provoke
        raise Refused(400, f"image {number} is no {', '.join(FORMATS)} file that can be read ({error})") from None
