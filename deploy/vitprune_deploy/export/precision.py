"""What fp32 and fp16 mean for an exported graph: types in the graph itself, never a flag of the runtime."""

from __future__ import annotations

import copy
from typing import Literal, get_args

from torch import Tensor, nn

from vitprune.errors import InputError

Precision = Literal["fp32", "fp16"]


class HalfInside(nn.Module):
    """A model whose weights and arithmetic are fp16 and whose inputs and outputs are fp32: one Cast at each end.

    ONNX's LayerNormalization keeps its statistics in fp32 (``stash_type=1``); token methods compare scores in fp32.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, *inputs: Tensor) -> Tensor:
        """The model's output, in fp32."""
        return self.model(*(x.half() for x in inputs)).float()


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """``model`` computing in ``precision``; fp32 is the model itself, anything else a copy.

    Raises:
        InputError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    return HalfInside(model) if precision == "fp16" else model


def opset_for(precision: str, runtime: str = "onnxruntime", runtime_version: str | None = None) -> int:
    """The ONNX opset whose graph the runtime takes in this precision.

    Opset 23 has an Attention node, which TensorRT-RTX and TensorRT from 10.14 on fuse in fp16 and refuse in fp32;
    everywhere else attention is two matrix products and a softmax, in opset 20. ``runtime_version`` is that of the
    device that builds the engine; unknown counts as older.
    """
    if precision != "fp16":
        return 20
    if runtime.replace("-", "_") == "tensorrt_rtx":  # a profile writes it with a hyphen, Python cannot
        return 23
    if runtime == "tensorrt" and runtime_version is not None and _version(runtime_version) >= (10, 14):
        return 23
    return 20


def _version(text: str) -> tuple[int, ...]:
    """'10.13.3.9' as (10, 13, 3, 9); what is no number ends it."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
