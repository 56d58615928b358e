"""Output folders as a build leaves them, as far as a service reads them, made in a second."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from vitprune.surgery import reduce_tokens
from vitprune_deploy.artifact import Manifest, hash_files
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.data import Preprocess
from vitprune_deploy.export.onnx import export_onnx

PREPROCESS = Preprocess((3, 28, 28), crop_pct=1.0)
CLASSES = [f"class {i}" for i in range(10)]
SOME = {"params": 1, "macs": 1, "top1": None, "latency_ms": {"p50": 1.0, "samples": 100}}


@cache
def exported(batch: int | tuple[int, int], image_size: tuple[tuple[int, int], tuple[int, int]] | None = None) -> bytes:
    """``tiny_vit()`` as ONNX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model = tiny.tiny_vit(dynamic_image_size=image_size is not None)
        export_onnx(model, path, batch=batch, image_size=image_size)
        return path.read_bytes()


def token_pruned(folder: Path, count: int) -> tuple[Path, np.ndarray, np.ndarray]:
    """A token-pruned model as ONNX in ``folder``, ``count`` images for it, and ONNX Runtime's answers."""
    path = folder / "model.onnx"
    export_onnx(reduce_tokens(tiny.tiny_vit(depth=3), "evit", {1: 30}), path)
    batch = tiny.images(count).numpy()
    with OnnxRuntime.load(path, threads=1) as model:
        return path, batch, model.run(batch)


def written(
    folder: Path, batch: int | tuple[int, int] = (1, 8), manifest: Mapping[str, Any] | None = None, **engine: Any
) -> Path:
    """An output folder with ``tiny_vit()`` as its one engine; ``manifest`` and ``engine`` replace what they name."""
    (folder / "model.onnx").write_bytes(exported(batch))
    return described(folder, ["model.onnx"], manifest, **engine)


def described(folder: Path, files: list[str], manifest: Mapping[str, Any] | None = None, **engine: Any) -> Path:
    """``folder`` with a manifest of its ``files``."""
    entry = {"runtime": "onnxruntime", "precision": "fp32", "status": "run", "file": files[0]} | engine
    plain = {
        "schema": 1, "verdict": "pass", "reasons": (), "device": {}, "versions": {}, "dense": SOME, "pruned": SOME,
        "budget": {"latency_ms": 1.0, "percentile": 50, "batch": 1, "image_size": (28, 28)},
        "parity": {"max_abs": 0.0, "top1_agreement": 100.0}, "engines": (entry,), "files": hash_files(folder, files),
        "preprocess": PREPROCESS.to_dict(), "classes": CLASSES,
    }  # fmt: skip
    Manifest.model_validate(plain | dict(manifest or {})).write(folder)
    return folder
