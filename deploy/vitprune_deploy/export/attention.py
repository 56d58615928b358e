"""How attention is written in ONNX: as few nodes as the runtime at hand computes fastest.

Five nodes instead of the library's fifteen (it transposes the keys by way of three dimensions and scales both q and k);
one node where the opset has it and there is no mask; or ONNX Runtime's own operator. On an H200 in fp16, that one took
2.49 ms (2.42 to 2.53) of a dense DeiT-S at batch 32 where five nodes took 3.37 (3.35 to 3.40) and the opset's Attention
3.02 (3.00 to 3.06); in fp32 it was the slower one, 5.56 (5.55 to 5.62) to 5.07 ms (5.03 to 5.08).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .precision import ATTENTION_OPSET

ORT_DOMAIN = "com.microsoft"
Translations = dict[Callable[..., Any], Callable[..., Any]]


def translations(opset: int, ort_attention: bool) -> Translations:
    """The exporter's table of its own translations for attention.

    As one node, a mask of one row would have to be repeated for each query in ONNX Runtime, though not in TensorRT;
    and TensorRT-RTX refuses an fp32 mask beside fp16 queries, which the library's own translation leaves. So attention
    with a mask is five nodes in any case.

    Args:
        ort_attention: write it without a mask as ``com.microsoft.MultiHeadAttention``.
    """
    from onnxscript import opset20, opset23

    op: Any = opset20 if opset < ATTENTION_OPSET else opset23

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        factor: Any = query.shape[-1] ** -0.5 if scale is None else scale
        if attn_mask is None and ort_attention:
            return _by_onnxruntime(op, query, key, value, factor)
        if attn_mask is None and opset >= ATTENTION_OPSET:
            return op.Attention(query, key, value, scale=factor)[0]
        logits = op.MatMul(op.Mul(query, op.CastLike(factor, query)), op.Transpose(key, perm=[0, 1, 3, 2]))
        if attn_mask is not None:
            logits = op.Add(logits, op.CastLike(attn_mask, query))
        return op.MatMul(op.Softmax(logits, axis=-1), value)

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}


def _by_onnxruntime(op: Any, query: Any, key: Any, value: Any, scale: float) -> Any:
    """``MultiHeadAttention`` on [B, N, H D], as ours are before they are split into heads: the transposes cancel."""
    heads = query.shape[1]

    def joined(x: Any) -> Any:
        width = op.Constant(value_ints=[0, 0, heads * x.shape[3]])
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), width)

    out = _multi_head_attention()(joined(query), joined(key), joined(value), num_heads=heads, scale=scale)
    split = op.Constant(value_ints=[0, 0, heads, value.shape[3]])
    return op.Transpose(op.Reshape(out, split), perm=[0, 2, 1, 3])


def _multi_head_attention() -> Any:
    """The operator as the exporter takes one: with a schema, of which only what we give is here."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    inputs = [OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")]
    schema = OpSchema(
        "MultiHeadAttention",
        ORT_DOMAIN,
        1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            OpSchema.Attribute("num_heads", OpSchema.AttrType.INT, required=True),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, required=True),
        ],
    )
    return Op(Opset(ORT_DOMAIN, 1), "MultiHeadAttention", schema)
