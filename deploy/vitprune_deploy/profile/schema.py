"""What a profile may say: every key, its type, its range, its default and one sentence about it, each stated once.

Help texts, the JSON schema and the commented profile of ``init`` are derived from this file. Rules between keys stand
in ``checks.py``.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from vitprune.search.allocation import Rule

from .kinds import (
    ComputeCapability,
    Count,
    Criterion,
    ImageSize,
    OneTokenMethod,
    Percent,
    Pixels,
    Precision,
    ProfilePath,
    RuntimeName,
    Seconds,
    StructureMethod,
    TokenMethod,
    VersionRange,
    WeightMethod,
    one_shape,
)

PATTERN_SPAN = 4  # weights that the patterns 2:4 and block-4 speak of
SPARSE_MULTIPLE = 16  # inputs of a layer, below which NVIDIA's apex (contrib/sparsity) leaves 2:4 alone


class Section(BaseModel):
    """A mapping in a profile: unknown keys and other types are refused, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The model to prune."""

    name: str = Field(min_length=1, description="timm architecture, with its pretrained tag where one is wanted")
    args: dict[str, JsonValue] = Field(
        default={}, description="further arguments of timm.create_model, such as img_size"
    )
    checkpoint: ProfilePath | None = Field(default=None, description="weights to start from: .safetensors, .pth or .pt")
    checkpoint_format: OneTokenMethod | None = Field(
        default=None,
        description="the token method whose authors wrote the checkpoint, in their layout; null: timm's or DeiT's",
    )
    pretrained: bool = Field(
        default=True,
        description="load timm's published weights where no checkpoint is given; false: random, to time a shape",
    )
    classes: ProfilePath | tuple[str, ...] | None = Field(
        default=None,
        description="names of the classes in the order of the model's outputs: a list, or a file of one a line",
    )


class Part(Section):
    """One of the three parts of the images; parts of the same source and split are kept disjoint."""

    source: ProfilePath | None = Field(default=None, description="where these images are, if not in data.source")
    split: str | None = Field(default=None, description="folder or reader split inside the source, such as train")
    images: Count | None = Field(default=None, description="how many; null: all there are")


class CalibrationPart(Part):
    """Images on which losses are measured and the search decides."""

    images: Count | None = Field(default=256, description="how many; null: all there are")


class Preprocess(Section):
    """What differs from the model's own timm data config."""

    mean: tuple[float, ...] | None = Field(default=None, description="subtracted per channel, of pixels in 0..1")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, description="divided by, per channel")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = Field(
        default=None, description="how images are resized"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the side kept by the crop"
    )
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        default=None, description="how images become square"
    )


class Data(Section):
    """The images: calibration, recovery and test, three disjoint parts."""

    source: ProfilePath | None = Field(
        default=None,
        description="class folders, a .zip or .tar of them, or timm:READER for one of timm's dataset readers",
    )
    root: ProfilePath | None = Field(default=None, description="folder of a timm: reader")
    calibration: CalibrationPart = Field(
        default=CalibrationPart(), description="images that the search measures losses on"
    )
    recovery: Part = Field(default=Part(), description="images for recovery training")
    test: Part = Field(default=Part(), description="images that accuracy is judged on")
    labelled: Literal["auto"] | bool = Field(
        default="auto", description="whether folders name classes; auto: looked at"
    )
    class_map: ProfilePath | tuple[str, ...] | dict[str, str | int] | None = Field(
        default=None, description="folder to class name or index, or the folders in class order, or a file of either"
    )
    max_unreadable: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.01, description="share of images that may be unreadable before it is an error"
    )
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        default=2, description="threads that decode images besides the main one"
    )
    preprocess: Preprocess = Field(default=Preprocess(), description="what differs from the model's own preprocessing")


class Alignment(Section):
    """Multiples that the device's kernels favour."""

    heads: Count = Field(default=1, description="heads of a block")
    mlp: Count = Field(default=8, description="MLP hidden units of a block")
    head_dim: Count = Field(default=8, description="channels of a head")


class Device(Section):
    """Facts about the device; files in profiles/devices state them."""

    name: str | None = Field(default=None, description="what people call it")
    description: str | None = Field(default=None, description="a sentence about it")
    host: str | None = Field(
        default=None,
        description="a board to measure, build and validate on: ssh://user@board, or a name given by 'devices add'; "
        "null: this machine",
    )
    compute_capability: ComputeCapability | None = Field(default=None, description="of its NVIDIA GPU, such as 8.7")
    memory_mb: Count | None = Field(default=None, description="memory that a model may use, in MB")
    runtimes: dict[str, VersionRange] = Field(
        default={}, description="runtimes that it has, with version constraints such as '>=10.3,<10.4'"
    )
    alignment: Alignment = Field(default=Alignment(), description="multiples that its kernels favour")


class Engine(Section):
    """A further engine to build from the same model."""

    name: RuntimeName = Field(description="runtime that it is for")
    precision: Precision = Field(default="fp32", description="number format of weights and activations")


class Runtime(Section):
    """What runs the pruned model on the device."""

    name: RuntimeName = Field(default="onnxruntime", description="onnxruntime, tensorrt or tensorrt-rtx")
    provider: str = Field(
        default="cpu", description="onnxruntime's execution provider: cpu, cuda, tensorrt, ... or its name"
    )
    precision: Precision = Field(default="fp32", description="number format of weights and activations")
    options: dict[str, str | bool | int | float] = Field(
        default={},
        description="for the provider, as CUDA's use_tf32: 0; cpu_nodes: true lets a GPU leave nodes to the CPU; "
        "TensorRT takes workspace_mb",
    )
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        default=(),
        description="GPUs that a TensorRT-RTX engine is built for; empty: the device's, or all that RTX serves",
    )
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        default="none",
        description="other GPUs that a TensorRT engine serves, at a price in speed: Ampere and later, or those of the "
        "device's compute capability; none: the very GPU",
    )
    version_compatible: bool = Field(
        default=False, description="whether later versions of TensorRT load the engine too, at a price in speed"
    )
    refit: bool = Field(
        default=False,
        description="whether a TensorRT engine takes new weights of the same plan later ('vitprune-deploy refit')",
    )
    cuda: Literal["auto", "pycuda", "cuda-bindings"] = Field(
        default="auto", description="what holds TensorRT's buffers"
    )
    build_timeout_s: Seconds = Field(default=1800.0, description="seconds after which an engine build is stopped")
    try_int8: bool = Field(
        default=False,
        description="try the pruned model in int8 too: it is shipped where it is measured to be faster and holds the "
        "accuracy floors, and left out with the reason otherwise; TensorRT, and processors",
    )
    compiled: bool = Field(
        default=False,
        description="compile the product ahead of time for this very device and provider, on which it then loads "
        "faster: onnxruntime's providers openvino and tensorrt-rtx",
    )
    also_build: tuple[Engine, ...] = Field(
        default=(),
        description="engines built as well where their package is installed; not run, and the manifest says so",
    )


class Batch(Section):
    """Batch sizes that the engine must take."""

    min: Annotated[int, Field(ge=1, le=65_536)] = Field(default=1, description="smallest")
    opt: Annotated[int, Field(ge=1, le=65_536)] = Field(default=1, description="the one to be fastest at")
    max: Annotated[int, Field(ge=1, le=65_536)] = Field(default=1, description="largest")


class Range(Section):
    """Sizes that one side of the image may have."""

    min: Pixels = Field(description="smallest, in pixels")
    max: Pixels = Field(description="largest, in pixels")
    step: Pixels = Field(description="sizes are multiples of it; a multiple of the patch size")


def _batch(value: object) -> object:
    return {"min": value, "opt": value, "max": value} if isinstance(value, int) else value


BatchRange = Annotated[
    Batch, BeforeValidator(_batch, json_schema_input_type=int | dict[Literal["min", "opt", "max"], int])
]


class Input(Section):
    """Shapes that the engine must take."""

    batch: BatchRange = Field(default=Batch(), description="batch sizes: one number, or min, opt and max")
    batch_ranges: tuple[BatchRange, ...] = Field(
        default=(),
        description="ranges that TensorRT tunes one by one, as optimisation profiles, such as [1, {min: 2, opt: 8, "
        "max: 32}]; together they are input.batch; empty: one range",
    )
    image_size: ImageSize | None = Field(
        default=None, description="pixels: one number, or [height, width]; null: the model's"
    )
    dynamic_height: Range | None = Field(default=None, description="heights that may come; null: the image size's only")
    dynamic_width: Range | None = Field(default=None, description="widths that may come; null: the image size's only")


class Budget(Section):
    """What one batch may cost on the device: latency_ms or speedup, one of them."""

    latency_ms: Annotated[float, Field(gt=0, le=1e7)] | None = Field(
        default=None, description="milliseconds for one batch"
    )
    speedup: Annotated[float, Field(ge=1, le=1000)] | None = Field(
        default=None, description="times as fast as the unpruned model in the same runtime, measured in the same run"
    )
    percentile: Annotated[int, Field(ge=50, le=99)] = Field(
        default=50, description="percentile of the runs that must meet it"
    )
    batch: Count | None = Field(default=None, description="images in the batch; null: input.batch.opt")
    image_size: ImageSize | None = Field(default=None, description="pixels; null: input.image_size")
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="CPU threads; null: all cores"
    )
    memory_mb: Annotated[float, Field(gt=0, le=1e8)] | None = Field(
        default=None, description="most memory that the loaded model may take, in MB"
    )


class Accuracy(Section):
    """The floor, judged on the engine with the test images; at least one key."""

    max_drop: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="points of top-1 that may be lost against the unpruned fp32 model"
    )
    min_top1: Percent | None = Field(default=None, description="percent of test images that must be right")
    min_agreement: Percent | None = Field(
        default=None, description="percent of images on which pruned and unpruned model must agree; needs no labels"
    )


class Tokens(Section):
    """Patch tokens."""

    method: TokenMethod | tuple[OneTokenMethod, ...] = Field(
        default="auto",
        description="one, or a list; auto: all that need no training; of many, the two that lose least are searched; "
        "none keeps all tokens",
    )
    schedule: str | dict[Annotated[int, Field(ge=0, le=1000)], Count] | None = Field(
        default=None,
        description="a published one such as published-0.7; own-NUMBER, the search of the method's authors (diffrate: "
        "share of operations left, psvit: error of a block); or {block: patch tokens that leave it}; null: searched",
    )
    levels: Annotated[int, Field(ge=2, le=256)] | tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=16, description="token counts to choose from: how many, or the shares kept such as [1.0, 0.7, 0.5]"
    )
    blocks: tuple[Annotated[int, Field(ge=0, le=1000)], ...] | None = Field(
        default=None, description="blocks that may reduce tokens, counted from 0; null: all"
    )


class Heads(Section):
    """Attention heads."""

    enabled: bool = Field(default=True, description="whether heads may be removed")
    multiple: Count | None = Field(
        default=None, description="kept heads are multiples of it; null: device.alignment.heads"
    )


class HeadDims(Section):
    """Dims of each head: of its queries and keys, and of its values, which may differ."""

    enabled: bool = Field(
        default=False, description="whether dims may be removed, in every head of a block equally many"
    )
    multiple: Count | None = Field(
        default=None, description="kept dims are multiples of it; null: device.alignment.head_dim"
    )
    minimum: Count = Field(
        default=16, description="dims that each head keeps at least; fused attention wants 16 or more"
    )


class Mlp(Section):
    """MLP hidden units."""

    enabled: bool = Field(default=True, description="whether hidden units may be removed")
    multiple: Count | None = Field(
        default=None, description="kept units are multiples of it; null: device.alignment.mlp"
    )


class Depth(Section):
    """Whole attention or MLP halves, and blocks."""

    enabled: bool = Field(default=True, description="whether whole halves of a block, and so blocks, may be removed")


class LearnedWidths(Section):
    """Widths that a method learns while the model trains, in place of their search; tokens all stay."""

    method: StructureMethod | None = Field(
        default=None, description="which learns them; null: widths are searched, which needs no training"
    )
    max_steps: Count = Field(default=1000, description="optimiser steps after which it stops; recovery follows")
    max_seconds: Seconds | None = Field(default=None, description="seconds after which it stops; null: no limit")
    recipe: Literal["distil", "published"] = Field(
        default="distil",
        description="distil: learn the unpruned model's answers; published: what the method's authors train with",
    )
    lr: Annotated[float, Field(gt=0, le=10)] | None = Field(
        default=None,
        description="peak learning rate of the model's weights; null: 1e-4, or what the method's authors took",
    )


class Weights(Section):
    """Single weights, which become zeros in layers of the same shape."""

    method: WeightMethod = Field(default="none", description="how weights are chosen and made up for; none keeps all")
    pattern: Literal["2:4", "block-4", "unstructured"] = Field(
        default="2:4",
        description="2:4, the one with kernels, in TensorRT on Ampere and later: two of every four are zero; block-4: "
        "four neighbours go together; unstructured: any. Only 2:4 may change the latency",
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="share of zeros, of block-4 and unstructured; null: 2:4's own half"
    )
    where: Literal["mlp", "all"] = Field(
        default="mlp", description="the layers that get zeros: those of the MLPs, or of attention too"
    )
    schedule: Literal["one-shot", "gradual"] = Field(
        default="one-shot", description="all zeros before recovery, which trains the rest, or more and more during it"
    )

    @property
    def enabled(self) -> bool:
        """Whether weights are removed."""
        return self.method != "none"

    @property
    def span(self) -> int:
        """What the widths that layers with zeros read must be multiples of."""
        return PATTERN_SPAN if self.enabled and self.pattern != "unstructured" else 1


class Prune(Section):
    """What may be pruned, and by which method."""

    tokens: Tokens = Field(default=Tokens(), description="patch tokens")
    heads: Heads = Field(default=Heads(), description="attention heads")
    head_dims: HeadDims = Field(default=HeadDims(), description="dims of queries, keys and values")
    mlp: Mlp = Field(default=Mlp(), description="MLP hidden units")
    depth: Depth = Field(default=Depth(), description="whole halves and blocks")
    learned: LearnedWidths = Field(default=LearnedWidths(), description="widths learned in place of searched ones")
    embedding: Count | None = Field(
        default=None,
        description="channels of the residual stream that stay, before anything is searched; lossy, since every norm "
        "then sees others, and for recovery to repair; null: all",
    )
    weights: Weights = Field(default=Weights(), description="single weights")
    last_block: Literal["prefix", "full"] = Field(
        default="prefix",
        description="prefix: where the head reads class or distillation tokens alone, the last block is computed for "
        "these only, which changes no answer",
    )
    criterion: Criterion = Field(default="obs", description="how heads, their dims and hidden units are ranked")
    allocation: Literal["exact", Rule] = Field(
        default="exact",
        description="how the budget is shared: exact, by measured losses and times; or a published rule, by the "
        "criterion's scores",
    )


class Search(Section):
    """How hard the search tries."""

    probe_images: Count = Field(default=64, description="calibration images for each measured change of the output")
    holdout_images: Count = Field(
        default=64, description="calibration images that only choose between the last candidates"
    )
    evaluations: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=96, description="candidate plans whose true loss is measured to correct the sum of parts"
    )
    max_seconds: Seconds | None = Field(default=None, description="seconds for those evaluations; null: no limit")
    one_plan: bool = Field(
        default=False,
        description="one plan for all of several devices, of which the slowest, against its own unpruned model, "
        "decides; false: a plan for each",
    )
    landings: Annotated[int, Field(ge=0, le=100)] = Field(
        default=4, description="rounds in which candidates are built and measured; 0: the latency table is trusted"
    )


class Measure(Section):
    """How latency is measured, and when it is known well enough."""

    table: ProfilePath | None = Field(
        default=None, description="latency_table.json of an earlier build for this device, instead of measuring one"
    )
    relative_half_width: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.01, description="half width of the median's 95% interval at which measuring stops, as a share of it"
    )
    max_rounds: Annotated[int, Field(ge=3, le=100_000)] = Field(
        default=25, description="rounds after which it stops anyway"
    )
    max_seconds: Seconds | None = Field(default=None, description="seconds after which it stops anyway; null: no limit")


class Recover(Section):
    """Training of the pruned model against the unpruned one."""

    enabled: bool = Field(default=True, description="whether the pruned model is trained")
    max_steps: Count = Field(default=300, description="optimiser steps after which it stops")
    max_seconds: Seconds | None = Field(default=None, description="seconds after which it stops; null: no limit")
    recipe: Literal["distil", "published"] = Field(
        default="distil",
        description="distil: learn the unpruned model's answers; published: what the token method's authors train with",
    )
    lr: Annotated[float, Field(gt=0, le=10)] | None = Field(
        default=None, description="peak learning rate of AdamW; null: 1e-4 for distil, the recipe's for published"
    )
    batch: Annotated[int, Field(ge=1, le=65_536)] = Field(default=32, description="images in a step")
    augment: bool = Field(default=True, description="mirror and shift the images")


class Export(Section):
    """The ONNX file."""

    opset: Literal["auto"] | Annotated[int, Field(ge=17, le=25)] = Field(
        default="auto", description="ONNX opset; auto: what the runtime and precision run best"
    )


class Validation(Section):
    """The last measurement, of the engine as it is shipped."""

    runs: Annotated[int, Field(ge=20, le=10_000_000)] = Field(default=1000, description="timed runs of each model")
    max_seconds: Seconds | None = Field(default=None, description="seconds after which timing stops; null: no limit")
    parity_images: Count = Field(default=1000, description="images on which engine and torch are compared")


class Profile(Section):
    """A model, a device and a budget: all that a build needs to know."""

    name: Annotated[str, one_shape(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, '.', '_' and '-'")] = Field(
        default="profile", description="what the build is called; as a rule the name of the profile's file"
    )
    description: str | None = Field(default=None, description="a sentence for the list of profiles")
    model: Model = Field(description="the model to prune")
    data: Data = Field(description="images for calibration, recovery and test")
    device: Device = Field(default=Device(), description="facts about the device; extend a file of devices/ for them")
    runtime: Runtime = Field(default=Runtime(), description="what runs the model")
    input: Input = Field(default=Input(), description="shapes that the engine must take")
    budget: Budget = Field(description="what one batch may cost")
    accuracy: Accuracy = Field(description="what accuracy must remain")
    prune: Prune = Field(default=Prune(), description="what may be pruned, and how")
    search: Search = Field(default=Search(), description="how hard the search tries")
    measure: Measure = Field(default=Measure(), description="when a latency is known well enough")
    recover: Recover = Field(default=Recover(), description="training of the pruned model")
    export: Export = Field(default=Export(), description="the ONNX file")
    validation: Validation = Field(default=Validation(), description="the last measurement")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(default=0, description="of everything random")

    def to_yaml(self) -> str:
        """The profile with every default spelled out; loading it gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    @property
    def batch(self) -> int:
        """Images in the batch that the budget is about."""
        return self.budget.batch or self.input.batch.opt

    @property
    def tells_precision(self) -> bool:
        """Whether the runtime is told what to compute in beside a graph in fp32, as OpenVINO is."""
        return "openvino" in (self.runtime.name, self.runtime.provider.lower().removesuffix("executionprovider"))

    @property
    def graph_precision(self) -> str:
        """The number format of the exported graph."""
        return "fp32" if self.tells_precision else self.runtime.precision

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that the budget is about, in pixels; None: the model's own."""
        return self.budget.image_size or self.input.image_size

    @property
    def head_multiple(self) -> int:
        """Kept heads of a block are multiples of it."""
        return self.prune.heads.multiple or self.device.alignment.heads

    @property
    def head_dim_multiple(self) -> int:
        """Kept dims of a head are multiples of it; of the pattern's span as well, where attention gets zeros."""
        asked, weights = self.prune.head_dims.multiple or self.device.alignment.head_dim, self.prune.weights
        return math.lcm(asked, weights.span) if weights.where == "all" else asked

    @property
    def mlp_multiple(self) -> int:
        """Kept hidden units of a block are multiples of it; of the pattern's span as well.

        And of 16, where kernels are to skip zeros.
        """
        asked = self.prune.mlp.multiple or self.device.alignment.mlp
        return math.lcm(asked, SPARSE_MULTIPLE if self.asks_2_4 else self.prune.weights.span)

    @property
    def asks_2_4(self) -> bool:
        """Whether weights are to have the pattern 2:4."""
        return self.prune.weights.enabled and self.prune.weights.pattern == "2:4"
