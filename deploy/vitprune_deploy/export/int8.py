"""An exported model with matrices of eight bits, by the recipe that its runtime has quick kernels for.

dynamic: activations are scaled batch by batch as they come. ONNX Runtime's CPU provider; needs no images. What the
    scale of a batch is depends on all of its images, so an image's answer depends a little on its neighbours.
symmetric: fixed scales, signed, as QuantizeLinear and DequantizeLinear around each product. TensorRT.
nncf: fixed scales where NNCF finds that OpenVINO gains by them.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitprune.errors import MissingError

from ..backends._onnx_file import axes
from ..files import atomic_path

Recipe = Literal["dynamic", "symmetric", "nncf"]
PRODUCTS = ["MatMul", "Gemm"]
VNNI = {"avx512_vnni", "avx_vnni"}  # x86 without them adds two products of u8 and s8 in 16 bits, which overflow


def recipe_for(runtime: str, provider: str) -> Recipe:
    """The recipe of a profile's runtime and, within ONNX Runtime, of its provider."""
    if runtime.startswith("tensorrt") or "tensorrt" in provider.lower():
        return "symmetric"
    return "nncf" if "openvino" in provider.lower() else "dynamic"


def quantize(path: Path, target: Path, recipe: Recipe, images: np.ndarray, flags: frozenset[str] = frozenset()) -> None:
    """Write the fp32 model ``path`` as ``target`` in int8.

    Args:
        images: calibration images as the model takes them, float32 [M, C, H, W].
        flags: instruction sets of the processor that will run it.

    Raises:
        MissingError: a package that the recipe needs is not installed.
    """
    if recipe == "dynamic":
        quantize_dynamic(path, target, flags)
    elif recipe == "symmetric":
        _quantize_symmetric(path, target, images)
    else:
        _quantize_nncf(path, target, images)


def quantize_dynamic(path: Path, target: Path, flags: frozenset[str] = frozenset(VNNI)) -> None:
    """``quantize`` by the recipe ``dynamic``."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as make

    with atomic_path(target) as temporary, _quiet():
        make(
            str(path),
            str(temporary),
            op_types_to_quantize=PRODUCTS,
            per_channel=True,
            reduce_range="avx2" in flags and not flags & VNNI,
            weight_type=QuantType.QInt8,
        )


def _quantize_symmetric(path: Path, target: Path, images: np.ndarray) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with atomic_path(target) as temporary, _quiet():
        quantize_static(
            str(path),
            str(temporary),
            _reader(_input_name(path), images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=PRODUCTS,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,  # TensorRT takes no int32 bias behind DequantizeLinear
                "AddQDQPairToWeight": True,
                "DedicatedQDQPair": True,
            },
        )


def _quantize_nncf(path: Path, target: Path, images: np.ndarray) -> None:
    try:
        import nncf
    except ImportError as error:
        raise MissingError(f"int8 for OpenVINO needs nncf ({error}); run `pip install 'vitprune[openvino]'`") from error
    import onnx

    name = _input_name(path)
    with atomic_path(target) as temporary, _quiet():
        made = nncf.quantize(
            onnx.load(str(path)),
            nncf.Dataset([{name: image[None]} for image in images]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
        )
        onnx.save(made, str(temporary))


def _reader(name: str, images: np.ndarray) -> Any:
    """What ONNX Runtime asks for calibration images, one after another."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._left, None)
            return None if image is None else {name: image[None]}

    return Reader()


def _input_name(path: Path) -> str:
    return next(iter(axes(path)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars that quantisers draw, and the advice that they log for models of other kinds."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
