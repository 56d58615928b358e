"""What fp32, fp16 and bf16 mean for an exported graph: types in the graph itself, never a flag of the runtime."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitprune.errors import InputError

from ..profile.checks import BF16_OPSET
from .islands import Island, narrow_around

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION_OPSET = 23  # its first


class Inside(nn.Module):
    """A model whose weights and arithmetic are of ``dtype`` and whose inputs and outputs are fp32: a Cast at each end.

    ONNX's LayerNormalization keeps its statistics in fp32 (``stash_type=1``); token methods compare scores in fp32;
    ``islands`` are in fp32 altogether.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, islands: Sequence[Island] = ()) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        if islands:
            narrow_around(self.model, islands, dtype)
        else:
            self.model.to(dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The model's output, in fp32."""
        dtype = next(self.model.parameters()).dtype  # what reads the inputs is an island as a whole, or no part of one
        return self.model(*(x.to(dtype) for x in inputs)).float()


def in_precision(model: nn.Module, precision: str, islands: Sequence[Island] = ()) -> nn.Module:
    """``model`` computing in ``precision``, ``islands`` of it in fp32; fp32 is the model itself, anything else a copy.

    Raises:
        InputError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    return model if precision == "fp32" else Inside(model, DTYPES[precision], islands)


def opset_for(precision: str, runtime: str = "onnxruntime", runtime_version: str | None = None) -> int:
    """The ONNX opset whose graph the runtime takes in this precision.

    Opset 23 has an Attention node, which TensorRT-RTX and TensorRT from 10.14 on fuse in fp16 and bf16 and refuse in
    fp32; everywhere else attention is two matrix products and a softmax, in opset 20, or 22 for bf16.
    ``runtime_version`` is that of the device that builds the engine; unknown counts as older.
    """
    if precision == "fp32":
        return 20
    if runtime.replace("-", "_") == "tensorrt_rtx":  # a profile writes it with a hyphen, Python cannot
        return ATTENTION_OPSET
    if runtime == "tensorrt" and runtime_version is not None and _version(runtime_version) >= (10, 14):
        return ATTENTION_OPSET
    return BF16_OPSET if precision == "bf16" else 20


def ort_attention(precision: str, runtime: str, provider: str) -> bool:
    """Whether attention is written as ONNX Runtime's own operator: on its CUDA provider in fp16, where it was measured
    to be faster; it was slower in fp32, and the same on processors."""
    return runtime == "onnxruntime" and precision == "fp16" and provider.lower() in ("cuda", "cudaexecutionprovider")


def _version(text: str) -> tuple[int, ...]:
    """'10.13.3.9' as (10, 13, 3, 9); what is no number ends it."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
