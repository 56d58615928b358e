"""The checks of consistency for a built folder: of every engine in it that runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.errors import VitpruneError

from .. import validate as checks
from ..artifact import EngineEntry, Manifest
from ..build import runtimes
from ..build.bench import INT8_MODEL
from ..profile import Profile
from ..validate.consistency import check_row
from .answer import table

HEAD = ("check", "batches", "difference", "allowed", "result")


def consistency(
    folder: Path, manifest: Manifest, profile: Profile, images: np.ndarray, say: Callable[[str], None]
) -> dict[str, checks.Consistency]:
    """All checks of each engine by its name; one that was only built, and does not load here, is left out with a line.

    Args:
        images: a few, as the model wants them: float32 [M, C, H, W].
        say: shows a line to a person.

    Raises:
        MissingError: the engine that was run when the folder was built does not load; or see ``check_consistency``.
    """
    served, found = checks.Served.of(profile, (images.shape[2], images.shape[3])), {}
    for engine in manifest.engines:
        name, subject = f"{engine.runtime} {engine.precision}", _subject(folder, manifest, profile, engine)
        try:
            subject.open().close()
        except VitpruneError as error:
            if engine.status == "run":
                raise
            say(f"note: the engine for {name} is not checked: {error}")
            continue
        computes = checks.arithmetic(engine.precision, engine.runtime, _extra(engine).get("options") or {})
        found[name] = checks.check_consistency(subject, images, served, computes)
    return found


def consistency_text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of what ``Consistency.to_dict`` gives for each engine, by its name."""
    parts = []
    for name, one in found.items():
        rows = [check_row(check) for check in one["checks"]]
        parts.append(f"{name}\n{table(rows, head=HEAD, right=[2, 3])}")
    return "\n\n".join(parts)


def _subject(folder: Path, manifest: Manifest, profile: Profile, engine: EngineEntry) -> checks.Subject:
    """An engine of the folder, with the ONNX file of its precision."""
    extra = _extra(engine)
    names = {"int8": f"engine/{INT8_MODEL}", profile.runtime.precision: "model.onnx"}
    onnx = folder / names.get(engine.precision, f"model.{engine.precision}.onnx")
    return checks.subject(
        runtimes.on(profile),
        engine.runtime.removesuffix("-rtx"),
        folder / extra.get("file", "model.onnx"),
        onnx if onnx.is_file() else None,
        threads=profile.budget.threads,
        options=extra.get("options"),
    )


def _extra(engine: EngineEntry) -> Mapping[str, Any]:
    """What the manifest says of an engine beyond the usual."""
    return engine.model_extra or {}
