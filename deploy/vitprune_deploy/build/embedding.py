"""Fewer channels of the residual stream: what the profile says, since the loss is no matter of a search.

The dense model stays what accuracy and speed-ups are judged against; all that is searched is searched on the model with
fewer channels, whose parts are measured, and whose answers single changes are compared with.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.errors import VitpruneError

from . import runtimes
from .bench import CHANNELS, Bench, write_json
from .make import export_to_time

if TYPE_CHECKING:
    from vitprune.plan import Plan

WHOLE = "embedding.json"  # in the folder of the stage that measures: times of the dense model and the searched one


def choose_channels(bench: Bench, folder: Path) -> None:
    """Write down the channels that stay, where the profile asks for fewer.

    Raises:
        InputError: the model has no more than are asked for.
        NotSupported: none can leave this model.
    """
    from vitprune.search.channels import kept_channels
    from vitprune.surgery import dense_plan, prune

    count = bench.profile.prune.embedding
    if count is None:
        return
    try:
        channels = kept_channels(bench.dense, bench.search_images, count)
        bench.base = prune(bench.dense, replace(dense_plan(bench.dense), embed=channels))
    except VitpruneError as error:
        raise type(error)(f"prune.embedding: {error}") from error
    write_json(folder / CHANNELS, list(channels))


def of_dense(bench: Bench, plan: Plan) -> Plan:
    """A plan of the searched model as one of the dense model."""
    from vitprune.surgery import dense_plan

    if bench.base is bench.dense:
        return plan
    return replace(dense_plan(bench.dense), embed=bench.channels).then(plan)


def of_base(bench: Bench, plan: Plan) -> Plan:
    """A plan of the dense model that leaves the profile's channels, as one of the searched model; others unchanged."""
    from vitprune.model.vit import fingerprint

    if bench.base is bench.dense or (plan.model_sha256, plan.embed) != (fingerprint(bench.dense), bench.channels):
        return plan
    return replace(plan, model_sha256=fingerprint(bench.base), embed=None)


def measure_whole(bench: Bench, folder: Path) -> None:
    """Time the dense model and the searched one beside each other, where they differ."""
    from ..latency.wholes import measure_models

    profile = bench.profile
    if bench.base is bench.dense:
        return
    files = folder / "wholes"
    files.mkdir()
    paths = {
        name: export_to_time(bench, model, files / f"{name}.onnx", like=model)
        for name, model in (("dense", bench.dense), ("base", bench.base))
    }
    times = measure_models(
        paths,
        runtimes.loader(profile),
        batch=profile.batch,
        image_size=bench.dense.config.image_size,
        relative_half_width=profile.measure.relative_half_width,
        max_seconds=profile.measure.max_seconds or float("inf"),
        seed=profile.seed,
    )
    write_json(folder / WHOLE, {name: one.value_ms for name, one in zip(paths, times, strict=True)})
    shutil.rmtree(files)


def searched_share(bench: Bench) -> float:
    """The time of the searched model as a share of the dense one's; 1 where they are the same."""
    if bench.base is bench.dense:
        return 1.0
    times = bench.json("measure", WHOLE)
    return float(times["base"] / times["dense"])
