"""What a report is made of, as plain data: whoever builds collects it, and nothing here is computed or measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vitprune.search.counts import Counts
from vitprune.search.frontier import Point
from vitprune.search.latency import LatencyTable

from ..validate import Limits, Verdict


class Frame(NamedTuple):
    """One image as it stands after a block: a line about it, and a PNG as a data URI."""

    caption: str
    uri: str


class Picture(NamedTuple):
    """A sample image, by name, and what is left of it block by block; the first frame is the image itself."""

    name: str
    frames: tuple[Frame, ...]


class Whole(NamedTuple):
    """A whole model that was measured, and what the table says of it.

    Attributes:
        predicted_ms: as predicted before it was measured; for a fitted one, by the table after the fit.
        measured_ms, low_ms, high_ms: median latency and its 95% interval.
        fitted: the table's correction was fitted on it, so that its error flatters the table.
    """

    predicted_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    fitted: bool


@dataclass(frozen=True)
class ModelFacts:
    """The dense or the pruned model, in the runtime and precision of the product.

    Attributes:
        params: number of weights.
        macs: multiply-accumulates for one image.
        latency: as ``validate.latency_dict`` gives it; empty where nothing was measured.
        counts: what each block has; None: not known.
        size_bytes: the model file and the weights beside it; None: not known.
        predicted_ms: median latency by the table; None: not predicted.
        memory_mb: what loading and running it adds to a process, in 10^6 bytes; None: not measured.
        runs_ms: single runs, normalised like the percentiles; empty where they were not kept.
    """

    params: int
    macs: int
    latency: Mapping[str, Any]
    counts: Counts | None = None
    size_bytes: int | None = None
    predicted_ms: float | None = None
    memory_mb: float | None = None
    runs_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows. What is None or empty is left out, and the page says so where it is missed.

    Attributes:
        title: the model and where it runs.
        description: the profile's own words.
        created: date and time, as the reader should see it.
        command: makes the same build again.
        verdict: pass, fail or unstable, with reasons.
        limits: what the profile asks for, the budget in milliseconds.
        asked: the budget in the profile's words, such as 'twice as fast as the dense model'.
        runtime, precision: of the product.
        batch: images of one call, for every latency on the page.
        image_size: height and width in pixels.
        threads: of the runtime; None: it decides.
        dense, pruned: the two models.
        accuracy: as ``validate.Accuracy.to_dict`` gives it; None: no test images.
        reference_top1: percent, of the dense model in fp32, against which a drop is judged; None: not known.
        parity: as ``validate.Parity.to_dict`` gives it.
        consistency: as ``validate.Consistency.to_dict`` gives it.
        fusion: what became of attention: runtime, dense and pruned (each as ``validate.fusion.Attention.to_dict`` gives
            them), warnings, and unread: why it is not known.
        token_method: what reduces tokens; None: nothing does.
        frontier: the best plan for every budget, by prediction.
        search: the account of the search as ``search.json`` holds it: methods (name -> held-out loss), status, reason,
            chosen and measured (rows of ``landing.Row.to_dict``), evaluations ([sum of losses, true loss]),
            rank_correlation, held_out_loss. Further keys are ignored.
        table: the latency table that the search ended with.
        wholes: whole models, predicted and measured.
        pictures: see ``report.pictures``.
        engines: each with runtime, precision and status ('built' or 'run'); file, model and note may be given.
        device: the fingerprint of the device.
        machine: its state when the models were measured; see ``latency.fingerprint.machine_state``.
        versions: of the packages that the result depends on.
        notes: further sentences for the reader, such as what recovery did.
        profile_yaml: the profile as resolved.
    """

    title: str
    created: str
    command: str
    verdict: Verdict
    limits: Limits
    runtime: str
    precision: str
    batch: int
    image_size: tuple[int, int]
    dense: ModelFacts
    pruned: ModelFacts
    threads: int | None = None
    asked: str = ""
    description: str = ""
    accuracy: Mapping[str, Any] | None = None
    reference_top1: float | None = None
    parity: Mapping[str, Any] | None = None
    consistency: Mapping[str, Any] | None = None
    fusion: Mapping[str, Any] | None = None
    token_method: str | None = None
    frontier: tuple[Point, ...] = ()
    search: Mapping[str, Any] | None = None
    table: LatencyTable | None = None
    wholes: tuple[Whole, ...] = ()
    pictures: tuple[Picture, ...] = ()
    engines: tuple[Mapping[str, Any], ...] = ()
    device: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] | None = None
    versions: Mapping[str, str | None] | None = None
    notes: tuple[str, ...] = ()
    profile_yaml: str = ""
