"""How far ties between scores can move the answers of a model that selects tokens.

Two scores that are nearly equal may change places between two runs that differ in the last bits, and then other tokens
stay. ``export.parity`` has torch follow an order to tell a tie from a fault; of an engine no order is known. So here
the ONNX file runs on the CPU with noise on everything that it ranks, as large as what the engine's arithmetic cannot
tell apart, several times with other noise: where that changes no place, the answer stays as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 8  # a tie between two falls either way in all but 1 of 128 cases
RANKING = ("TopK", "ArgMax", "ArgMin")


def moves(path: Path, images: np.ndarray, share: float) -> np.ndarray:
    """Largest change of the answer to each of ``images`` [M, C, H, W], [M]; 0 for a model that ranks nothing.

    Args:
        path: the ONNX file.
        images: as the model wants them.
        share: largest noise on a score, as a share of the range of the scores that it is ranked among.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
    """
    model = _shaken(path, share)
    if model is None:
        return np.zeros(len(images), np.float32)
    calm, shaky = _session(path.read_bytes(), path.parent), _session(model, path.parent)
    still = _each(calm, images)
    return np.max([np.abs(_each(shaky, images) - still).max(axis=1) for _ in range(DRAWS)], axis=0)


def _shaken(path: Path, share: float) -> bytes | None:
    """The ONNX file with noise on all scores; None if it ranks none."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph, nodes = model.graph, list(model.graph.node)
    floats = _floats(onnx.shape_inference.infer_shapes(model).graph)
    del graph.node[:]
    rankings = 0
    for node in nodes:
        if node.op_type in RANKING and node.input[0] in floats:
            graph.node.extend(_noise(node.input[0], f"shaken_{rankings}", share, seed=rankings))
            node.input[0] = f"shaken_{rankings}"
            rankings += 1
        graph.node.append(node)
    return model.SerializeToString() if rankings else None


def _floats(graph: Any) -> set[str]:
    """Names of the values that are numbers with a point."""
    from onnx import TensorProto

    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    values = [*graph.value_info, *graph.input, *graph.output]
    found = {value.name for value in values if value.type.tensor_type.elem_type in kinds}
    return found | {tensor.name for tensor in graph.initializer if tensor.data_type in kinds}


def _noise(scores: str, name: str, share: float, seed: int) -> list[Any]:
    """Nodes that make ``name`` of ``scores``: each plus its own noise, even from -share to share of their range."""
    from onnx import TensorProto, helper

    def made(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, [output], name=output, **attributes)

    least, most, spread, drawn, wide = (f"{name}_{part}" for part in ("least", "most", "range", "drawn", "noise"))
    even = {"low": -share, "high": share, "seed": float(seed), "dtype": TensorProto.FLOAT}
    return [
        made("ReduceMin", [scores], least),  # of all there are: an image comes alone
        made("ReduceMax", [scores], most),
        made("Sub", [most, least], spread),
        made("RandomUniformLike", [scores], f"{drawn}_32", **even),
        made("CastLike", [f"{drawn}_32", scores], drawn),
        made("Mul", [drawn, spread], wide),
        made("Add", [scores, wide], name),
    ]


def _session(model: bytes, folder: Path) -> Any:
    """The model on the CPU; its weights may lie in ``folder``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _each(session: Any, images: np.ndarray) -> np.ndarray:
    """The answer to each image by itself, [M, outputs]; a file with a fixed batch gets it as often as it wants."""
    wanted = session.get_inputs()[0]
    copies = wanted.shape[0] if isinstance(wanted.shape[0], int) else 1
    found = []
    for image in images.astype(np.float16 if wanted.type == "tensor(float16)" else np.float32):
        answer = session.run([session.get_outputs()[0].name], {wanted.name: np.repeat(image[None], copies, axis=0)})[0]
        found.append(answer[0].astype(np.float32).ravel())
    return np.stack(found)
