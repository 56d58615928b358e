"""Whole models: made small without regard to what they compute, exported, and measured beside the dense one.

Latency does not depend on the values of weights, so a model of the right shapes stands in for one that was searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.model.vit import Vit, fingerprint
from vitprune.plan import BlockPlan, Plan
from vitprune.search.counts import Counts, TokenMethod
from vitprune.search.latency import Levels
from vitprune.surgery import prune

from ..backends.base import Backend, number_format
from ..export.islands import Island
from ..export.onnx import export_onnx
from .pieces import KEEP, TOKENS
from .protocol import ANCHOR_HALF_WIDTH, Measurement, Progress, measure
from .visits import Subject, quickest

PART_AXES = (TOKENS.name, KEEP.name)  # symbolic in the files of parts, constant in whole models
Loader = Callable[[Path, Mapping[str, int]], Backend]  # an .onnx file and the sizes of its symbolic axes, by name


def onnxruntime_loader(
    threads: int | None, options: Mapping[str, Any] | None = None, load: Callable[..., Backend] | None = None
) -> Loader:
    """Loads files into ONNX Runtime.

    Symbolic axes of a whole model stay so, as they do where it is shipped: with them fixed, a dense ViT took 2% longer.

    Args:
        threads, options: as its backend knows them.
        load: loads a file on another machine, as ``Backend.load``; None: on this one.
    """
    from ..backends.onnxruntime import OnnxRuntime

    def load_file(path: Path, sizes: Mapping[str, int]) -> Backend:
        more = {"sizes": _of_parts(sizes), "copies": not is_part(sizes)}
        return (load or OnnxRuntime.load)(path, threads=threads, options={**(options or {}), **more})

    return load_file


def openvino_loader(
    threads: int | None, options: Mapping[str, Any] | None = None, load: Callable[..., Backend] | None = None
) -> Loader:
    """Loads files into OpenVINO, with sizes fixed and arguments as ``onnxruntime_loader`` has them."""
    from ..backends.openvino import OpenVino

    def load_file(path: Path, sizes: Mapping[str, int]) -> Backend:
        more = {"sizes": _of_parts(sizes)}
        return (load or OpenVino.load)(path, threads=threads, options={**(options or {}), **more})

    return load_file


def _of_parts(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of axes that parts of models alone have."""
    return {name: size for name, size in sizes.items() if name in PART_AXES}


def is_part(sizes: Mapping[str, int]) -> bool:
    """Whether these are the sizes of a part of a model: its tokens are on the GPU before it runs, and stay there."""
    return any(name in sizes for name in PART_AXES)


def subject(name: str, path: Path, load: Loader, sizes: Mapping[str, int]) -> Subject:
    """The model in ``path`` on inputs made up for it: ones where they are sizes or counts, noise otherwise."""
    model = load(path, sizes)
    rng = np.random.default_rng(0)
    feed = {}
    for spec in model.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        noise = np.ones(shape) if spec.name in ("size", "keep") else rng.standard_normal(shape)
        feed[spec.name] = noise.astype(number_format(spec.dtype))
    return Subject.of(name, model, feed)


def slim(model: Vit, counts: Counts, method: TokenMethod | None) -> Vit:
    """``model`` with as many heads, dims, units and tokens as ``counts`` say: the first ones of each."""
    out = counts.patches_out(model.config.patches)
    kept = []
    for block, (heads, units, patches) in enumerate(zip(counts.heads, counts.mlp, out, strict=True)):
        qk, v = ((tuple(range(size)),) * heads if size else None for size in counts.dims(block) or (0, 0))
        kept.append(BlockPlan(tuple(range(heads)), tuple(range(units)), patches, qk, v))
    return prune(model, Plan(fingerprint(model), model.config.patches, method.name if method else None, tuple(kept)))


def export_whole(
    model: Vit,
    path: Path,
    *,
    batch: int | tuple[int, int],
    image_size: Any = None,
    precision: str = "fp32",
    opset: int | None = None,
    islands: Sequence[Island] = (),
) -> Path:
    """The model as ``path``, as ``export_onnx`` takes all this; a file that is there already is taken for it."""
    if not path.is_file():
        export_onnx(model, path, batch=batch, image_size=image_size, precision=precision, opset=opset, islands=islands)
    return path


def random_counts(levels: Levels, depth: int, method: TokenMethod | None, rng: np.random.Generator) -> Counts:
    """A plan drawn at random: widths block by block, and up to three blocks that reduce tokens."""
    heads = tuple(int(rng.choice(levels.heads)) for _ in range(depth))
    mlp = tuple(int(rng.choice(levels.mlp)) for _ in range(depth))
    cuts = set(rng.choice(depth, size=min(3, depth), replace=False).tolist()) if method else set()
    if method and method.watches:
        cuts -= {0}
    patches, left = [], levels.tokens[0]
    for block in range(depth):
        within = reachable(method, left, levels)
        if block in cuts and within:
            # the upper half of what can be reached, or three cuts would leave nothing of the rest
            left = int(rng.choice(within[: math.ceil(len(within) / 2)]))
        patches.append(left)
    dims = [tuple(int(rng.choice(sizes)) for _ in range(depth)) for sizes in (levels.qk, levels.v) if sizes]
    return Counts(heads, mlp, tuple(patches), *dims)


def reachable(method: TokenMethod | None, patches: int, levels: Levels) -> list[int]:
    """The levels that one application leads to from ``patches``, descending; none without a method."""
    return [] if method is None else [n for n in levels.tokens if method.reaches(patches, n, levels.prefix)]


def measure_models(
    paths: Mapping[str, Path],
    load: Loader,
    *,
    batch: int,
    image_size: tuple[int, int] | None = None,
    relative_half_width: float = ANCHOR_HALF_WIDTH,
    max_seconds: float = math.inf,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Measurement]:
    """One measurement for each exported model, in their order; the quickest of them is the reference of all.

    Figures are milliseconds at the speed that the machine had in this session: the ratio of two models is what compares
    with other sessions.

    Args:
        batch, image_size: what symbolic axes are; an image size of files that have it fixed is not needed.
    """
    sizes = {"batch": batch} | (dict(zip(("height", "width"), image_size, strict=True)) if image_size else {})
    subjects = [subject(name, path, load, sizes) for name, path in paths.items()]
    return measure(
        subjects,
        quickest(subjects),
        relative_half_width=relative_half_width,
        max_seconds=max_seconds,
        seed=seed,
        progress=progress,
    )
