"""What no single key shows: combinations that cannot work, each rule a function that says what is wrong and where.

A rule reads what it needs from the profile and yields (key, problem). Where a key that it reads is wrong by itself,
the rule is silent: the reader hears of that key first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from .tree import show

Problem = tuple[str, str]
Rule = Callable[[Any], Iterator[Problem]]

RULES: list[Rule] = []
BF16_CAPABILITY = 8.0  # Ampere, the first with bf16 in its Tensor Cores
BLOCK_CRITERIA = ("bi",)  # vitprune.criteria.base.Criterion.whole_blocks, without torch
NO_DIMS = ("attn_taylor", "bi", "minitron")  # not Criterion.ranks_dims
COMPILERS = ("openvino", "tensorrt-rtx")  # providers that write EPContext files
BF16_OPSET = 22  # the first in which a convolution may be in bf16
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # tensorrt_rtx.ComputeCapability, 1.7
NOT_RTX = {  # what TensorRT-RTX has in place of what it has not
    "hardware_compatibility": "; TensorRT-RTX serves the GPUs of runtime.compute_capabilities",
    "version_compatible": "; TensorRT-RTX has no version compatibility: build the engine again for each version",
}
DIM_METHODS = ("cait_cdcp", "vitslim")  # learned methods that prune dims of heads, and no heads
# short for an ...ExecutionProvider
PROVIDERS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino", "coreml", "directml")


class Unknown(Exception):
    """A rule asked for a value that is wrong by itself."""


def problems(profile: Any) -> list[Problem]:
    """What all rules have to say about ``profile``, or about the part of one that could be read."""
    found: list[Problem] = []
    for rule in RULES:
        try:
            found.extend(rule(profile))
        except Unknown:
            continue
    return found


def patch_size(model: Any) -> tuple[int, int] | None:
    """Height and width of a patch as far as the arguments or the name of ``model`` tell, in pixels."""
    given = model.args.get("patch_size")
    if given is None:
        named = re.search(r"_patch(\d{1,4})(?!\d)", model.name)
        given = int(named[1]) if named else None
    sides = given if isinstance(given, list) else [given, given]
    if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
        return sides[0], sides[1]
    return None


def _rule(check: Rule) -> Rule:
    RULES.append(check)
    return check


def _engines(p: Any) -> list[str]:
    """The runtimes that ``p`` asks for."""
    return [p.runtime.name, *(engine.name for engine in p.runtime.also_build)]


@_rule
def _one_latency_budget(p: Any) -> Iterator[Problem]:
    if p.budget.latency_ms is not None and p.budget.speedup is not None:
        yield "budget.speedup", "excludes budget.latency_ms: give one of them, and null for an inherited one"
    if p.budget.latency_ms is None and p.budget.speedup is None:
        yield "budget", "needs latency_ms or speedup"


@_rule
def _some_floor(p: Any) -> Iterator[Problem]:
    if p.accuracy.max_drop is None and p.accuracy.min_top1 is None and p.accuracy.min_agreement is None:
        yield "accuracy", "needs max_drop, min_top1 or min_agreement"


@_rule
def _floors_have_labels(p: Any) -> Iterator[Problem]:
    for key in ("max_drop", "min_top1"):
        if getattr(p.accuracy, key) is not None and p.data.labelled is False:
            yield f"accuracy.{key}", "needs labels, and data.labelled is false; use accuracy.min_agreement"


@_rule
def _batches_ascend(p: Any) -> Iterator[Problem]:
    batch = p.input.batch
    if not batch.min <= batch.opt <= batch.max:
        yield "input.batch", f"must ascend, got min {batch.min}, opt {batch.opt}, max {batch.max}"


@_rule
def _batch_ranges_are_the_batch(p: Any) -> Iterator[Problem]:
    batch, ranges = p.input.batch, p.input.batch_ranges
    if not ranges:
        return
    if not any(name.startswith("tensorrt") for name in _engines(p)):
        yield "input.batch_ranges", "belongs to TensorRT; other runtimes take all batches alike"
    for number, one in enumerate(ranges):
        if not one.min <= one.opt <= one.max:
            yield f"input.batch_ranges.{number}", f"must ascend, got min {one.min}, opt {one.opt}, max {one.max}"
    reached = batch.min - 1  # by the ranges so far, from the smallest batch on
    for one in sorted(ranges, key=lambda one: (one.min, one.max)):
        if one.min > reached + 1:
            break
        reached = max(reached, one.max)
    if reached != batch.max or min(one.min for one in ranges) != batch.min:
        yield "input.batch_ranges", f"must make up input.batch, {batch.min}..{batch.max}, without a gap"


@_rule
def _budget_batch_is_served(p: Any) -> Iterator[Problem]:
    batch = p.input.batch
    if p.budget.batch is not None and not batch.min <= p.budget.batch <= batch.max:
        yield "budget.batch", f"must lie in input.batch, {batch.min}..{batch.max}, got {p.budget.batch}"


@_rule
def _sizes_are_served(p: Any) -> Iterator[Problem]:
    for key, size in (("input.image_size", p.input.image_size), ("budget.image_size", p.budget.image_size)):
        if size is None:
            continue
        for side, pixels, fixed in zip(("height", "width"), size, p.input.image_size or (None, None), strict=True):
            sizes = getattr(p.input, f"dynamic_{side}")
            if sizes is None and fixed is not None and pixels != fixed:
                yield (
                    key,
                    f"has {side} {pixels}, but input.image_size has {fixed}; allow both with input.dynamic_{side}",
                )
            if sizes is not None and not (sizes.min <= pixels <= sizes.max and pixels % sizes.step == 0):
                wish = f"a multiple of {sizes.step} in {sizes.min}..{sizes.max} (input.dynamic_{side})"
                yield key, f"{side} must be {wish}, got {pixels}"


@_rule
def _ranges_ascend(p: Any) -> Iterator[Problem]:
    for side in ("height", "width"):
        sizes = getattr(p.input, f"dynamic_{side}")
        if sizes is not None and sizes.min > sizes.max:
            yield f"input.dynamic_{side}", f"must ascend, got min {sizes.min}, max {sizes.max}"
        for end in ("min", "max") if sizes is not None else ():
            if getattr(sizes, end) % sizes.step:
                yield f"input.dynamic_{side}.{end}", f"must be a multiple of {sizes.step}, got {getattr(sizes, end)}"


@_rule
def _patches_fill_the_image(p: Any) -> Iterator[Problem]:
    patch = patch_size(p.model)
    if patch is None:
        return
    given = p.model.args.get("img_size")
    sizes = {"input.image_size": p.input.image_size, "budget.image_size": p.budget.image_size}
    if isinstance(given, int) and not isinstance(given, bool):
        sizes["model.args"] = (given, given)
    for key, size in sizes.items():
        if size is not None and (size[0] % patch[0] or size[1] % patch[1]):
            yield key, f"must be whole patches of {patch[0]} x {patch[1]} pixels, got {size[0]} x {size[1]}"
    for side, length in zip(("height", "width"), patch, strict=True):
        sizes_of_side = getattr(p.input, f"dynamic_{side}")
        if sizes_of_side is not None and sizes_of_side.step % length:
            yield (
                f"input.dynamic_{side}.step",
                f"must be a multiple of the patch size {length}, got {sizes_of_side.step}",
            )


@_rule
def _provider_is_known(p: Any) -> Iterator[Problem]:
    name = p.runtime.provider
    if p.runtime.name == "onnxruntime" and name not in PROVIDERS and not name.endswith("ExecutionProvider"):
        known = ", ".join(PROVIDERS)
        yield "runtime.provider", f"must be one of {known}, or end in ExecutionProvider, got {show(name)}"
    if p.runtime.name != "onnxruntime" and name != "cpu":
        yield "runtime.provider", f"belongs to onnxruntime, and runtime.name is {p.runtime.name}"


@_rule
def _half_precision_pays(p: Any) -> Iterator[Problem]:
    cpu = p.runtime.name == "onnxruntime" and p.runtime.provider in {"cpu", "CPUExecutionProvider"}
    if cpu and p.runtime.precision == "fp16":
        yield (
            "runtime.precision",
            "fp16 is slower than fp32 on onnxruntime's CPU provider (it computes in fp32); use fp32",
        )
    if cpu and p.runtime.precision == "bf16":
        yield "runtime.precision", "bf16 does not run on onnxruntime's CPU provider, it has no kernels for it; use fp32"


@_rule
def _bf16_is_there(p: Any) -> Iterator[Problem]:
    wanted = [("runtime.precision", p.runtime.precision)]
    wanted += [(f"runtime.also_build.{i}.precision", engine.precision) for i, engine in enumerate(p.runtime.also_build)]
    gpus = [*p.runtime.compute_capabilities, *([p.device.compute_capability] if p.device.compute_capability else [])]
    older = [gpu for gpu in gpus if float(gpu) < BF16_CAPABILITY]
    if "openvino" in (p.runtime.name, p.runtime.provider):  # is told the precision beside a graph in fp32
        wanted = wanted[1:]
    for key, precision in wanted:
        if precision == "bf16" and older:
            yield key, f"bf16 needs compute capability {BF16_CAPABILITY} or later, the profile has {older[0]}; use fp16"
        if precision == "bf16" and p.export.opset != "auto" and p.export.opset < BF16_OPSET:
            yield "export.opset", f"must be at least {BF16_OPSET} for bf16, got {p.export.opset}"


@_rule
def _rtx_serves_the_gpu(p: Any) -> Iterator[Problem]:
    served = f"TensorRT-RTX serves compute capabilities {', '.join(RTX_CAPABILITIES)}"
    if p.runtime.name == "tensorrt-rtx" and p.device.compute_capability not in {None, *RTX_CAPABILITIES}:
        yield "runtime.name", f"{served}, and the device has {p.device.compute_capability}; use tensorrt"
    for capability in p.runtime.compute_capabilities:
        if capability not in RTX_CAPABILITIES:
            yield "runtime.compute_capabilities", f"{served}, got {capability}"
    if p.runtime.compute_capabilities and "tensorrt-rtx" not in _engines(p):
        yield "runtime.compute_capabilities", "only TensorRT-RTX builds for other GPUs than the one at hand"


@_rule
def _tensorrt_has_what_is_asked(p: Any) -> Iterator[Problem]:
    engines, runtime = _engines(p), p.runtime
    asked = {
        "hardware_compatibility": runtime.hardware_compatibility != "none",
        "version_compatible": runtime.version_compatible,
    }
    for key in (key for key, wanted in asked.items() if wanted and "tensorrt" not in engines):
        yield f"runtime.{key}", f"belongs to tensorrt{NOT_RTX[key] if 'tensorrt-rtx' in engines else ''}"
    if runtime.refit and not any(name.startswith("tensorrt") for name in engines):
        yield "runtime.refit", "belongs to TensorRT; other runtimes read new weights from a new model.onnx"


@_rule
def _int8_has_kernels(p: Any) -> Iterator[Problem]:
    if p.runtime.try_int8 and p.runtime.provider not in ("cpu", "CPUExecutionProvider", "openvino"):
        yield "runtime.try_int8", f"belongs to processors and to TensorRT, and runtime.provider is {p.runtime.provider}"


@_rule
def _compiled_has_a_compiler(p: Any) -> Iterator[Problem]:
    able = p.runtime.name == "onnxruntime" and p.runtime.provider in COMPILERS
    if p.runtime.compiled and not able:
        yield "runtime.compiled", f"belongs to onnxruntime's providers {' and '.join(COMPILERS)}"
    if p.runtime.compiled and p.runtime.try_int8:
        yield "runtime.compiled", "is not for int8; leave it or runtime.try_int8 out"


@_rule
def _further_engines_are_built(p: Any) -> Iterator[Problem]:
    for number, engine in enumerate(p.runtime.also_build):
        if not engine.name.startswith("tensorrt"):
            yield f"runtime.also_build.{number}.name", f"{engine.name} runs model.onnx as it is; leave it out"


@_rule
def _cuda_library_is_used(p: Any) -> Iterator[Problem]:
    if p.runtime.cuda != "auto" and p.runtime.name == "onnxruntime":
        yield "runtime.cuda", "belongs to TensorRT; onnxruntime holds its buffers itself"


@_rule
def _device_has_the_runtime(p: Any) -> Iterator[Problem]:
    if p.device.runtimes and p.runtime.name not in p.device.runtimes:
        device = show(p.device.name) if p.device.name else "the device"
        yield "runtime.name", f"{device} has {', '.join(p.device.runtimes)}, got {p.runtime.name}"


@_rule
def _host_holds_no_password(p: Any) -> Iterator[Problem]:
    user, at, _ = (p.device.host or "").partition("@")
    if at and ":" in user.removeprefix("ssh://"):
        yield "device.host", "must hold no password; ssh's agent and keys are used"


@_rule
def _memory_is_there(p: Any) -> Iterator[Problem]:
    if None not in (p.budget.memory_mb, p.device.memory_mb) and p.budget.memory_mb > p.device.memory_mb:
        yield "budget.memory_mb", f"exceeds device.memory_mb, {p.device.memory_mb}, got {p.budget.memory_mb}"


@_rule
def _percentile_has_samples(p: Any) -> Iterator[Problem]:
    beyond = p.validation.runs * (100 - p.budget.percentile) / 100
    if beyond < 10:  # fewer samples beyond a quantile leave it undetermined
        needed = math.ceil(1000 / (100 - p.budget.percentile))
        yield "validation.runs", f"must be at least {needed} for the {p.budget.percentile}th percentile"


@_rule
def _calibration_suffices(p: Any) -> Iterator[Problem]:
    images, needed = p.data.calibration.images, p.search.probe_images + p.search.holdout_images
    if images is not None and images < needed:
        yield (
            "data.calibration.images",
            (f"must be at least search.probe_images + search.holdout_images, {needed}, got {images}"),
        )


@_rule
def _every_part_has_a_source(p: Any) -> Iterator[Problem]:
    if p.data.source is None:
        for part in ("calibration", "recovery", "test"):
            if getattr(p.data, part).source is None:
                yield f"data.{part}", "has no source: give data.source, or one of its own"


@_rule
def _readers_have_a_name(p: Any) -> Iterator[Problem]:
    sources = [p.data.source, p.data.calibration.source, p.data.recovery.source, p.data.test.source]
    if "timm:" in sources:
        yield "data.source", "names no reader behind timm:, such as timm:torch/cifar10"
    if p.data.root is not None and not any(source and source.startswith("timm:") for source in sources):
        yield "data.root", "belongs to a timm: reader, and no source is one"


@_rule
def _means_match_deviations(p: Any) -> Iterator[Problem]:
    mean, std = p.data.preprocess.mean, p.data.preprocess.std
    if mean is not None and std is not None and len(mean) != len(std):
        yield "data.preprocess.std", f"must have as many values as mean, {len(mean)}, got {len(std)}"


@_rule
def _checkpoint_formats_fit(p: Any) -> Iterator[Problem]:
    if p.model.checkpoint_format is None:
        return
    if p.model.checkpoint is None:
        yield "model.checkpoint_format", "describes model.checkpoint, which is not given"
    if p.prune.tokens.method not in (p.model.checkpoint_format, (p.model.checkpoint_format,)):
        yield (
            "prune.tokens.method",
            f"must be {p.model.checkpoint_format}, of which model.checkpoint holds the weights (checkpoint_format)",
        )


@_rule
def _schedule_has_one_method(p: Any) -> Iterator[Problem]:
    tokens = p.prune.tokens
    if tokens.schedule is not None and tokens.method in ("auto", "none"):
        yield "prune.tokens.schedule", f"belongs to one token method, and prune.tokens.method is {tokens.method}"
    if tokens.schedule is not None and isinstance(tokens.method, tuple) and len(tokens.method) != 1:
        yield "prune.tokens.schedule", "belongs to one token method, and prune.tokens.method lists several"
    if tokens.schedule is not None and tokens.blocks is not None:
        yield "prune.tokens.blocks", "has no say beside prune.tokens.schedule, which names the blocks itself"


@_rule
def _channels_stay_as_weights_want_them(p: Any) -> Iterator[Problem]:
    if p.prune.embedding is None:
        return
    if p.model.checkpoint_format is not None:
        yield "prune.embedding", "cannot go with the weights of a token method (model.checkpoint_format)"
    if p.recover.recipe == "published":
        yield "prune.embedding", "cannot go with recover.recipe published, which compares all channels; use distil"


@_rule
def _allocations_have_what_they_need(p: Any) -> Iterator[Problem]:
    prune = p.prune
    if prune.allocation != "exact" and prune.tokens.method != "none":
        yield "prune.allocation", f"{prune.allocation} knows of no tokens; use exact, or prune.tokens.method none"
    if prune.allocation == "savit" and prune.criterion != "savit":
        yield "prune.allocation", f"savit needs prune.criterion savit, and that is {prune.criterion}"
    if prune.head_dims.enabled and prune.allocation != "exact":
        yield "prune.head_dims.enabled", f"must be false with prune.allocation {prune.allocation}; use exact"
    if prune.head_dims.enabled and prune.criterion in NO_DIMS:
        yield "prune.head_dims.enabled", f"must be false with prune.criterion {prune.criterion}, which ranks no dims"


@_rule
def _block_criteria_remove_blocks(p: Any) -> Iterator[Problem]:
    prune = p.prune
    if prune.criterion not in BLOCK_CRITERIA:
        return
    if prune.heads.enabled or prune.mlp.enabled or not prune.depth.enabled:
        wish = "heads.enabled and mlp.enabled false, depth.enabled true"
        yield "prune.criterion", f"{prune.criterion} ranks whole blocks; use it with {wish}"
    elif prune.allocation != "global":
        yield "prune.allocation", f"must be global for {prune.criterion}, got {prune.allocation}"


@_rule
def _learned_widths_stand_alone(p: Any) -> Iterator[Problem]:
    prune, method = p.prune, p.prune.learned.method
    if method is None:
        return
    if prune.tokens.method != "none":
        yield "prune.tokens.method", f"must be none beside prune.learned: {method} prunes a model that keeps all tokens"
    if prune.embedding is not None:
        yield "prune.embedding", "cannot go with prune.learned, which takes all channels"
    if p.search.one_plan:
        yield "search.one_plan", "cannot go with prune.learned, which aims at one device"
    for key in ("heads", "mlp"):
        if not getattr(prune, key).enabled and (key != "heads" or method not in DIM_METHODS):
            yield f"prune.{key}.enabled", f"must be true, since {method} prunes them"
    if not prune.head_dims.enabled and method in DIM_METHODS:
        yield "prune.head_dims.enabled", f"must be true, since {method} prunes them"
    if not prune.depth.enabled and method == "uvc":
        yield "prune.depth.enabled", f"must be true, since {method} skips blocks"


@_rule
def _weights_have_a_share(p: Any) -> Iterator[Problem]:
    weights = p.prune.weights
    if weights.method == "none":
        for key in ("sparsity", "schedule"):
            if getattr(weights, key) not in (None, "one-shot"):
                yield f"prune.weights.{key}", "belongs to a method, and prune.weights.method is none"
    elif weights.pattern == "2:4":
        if weights.sparsity not in (None, 0.5):
            yield "prune.weights.sparsity", f"must be 0.5 for the pattern 2:4, got {weights.sparsity}; leave it out"
    elif weights.sparsity is None:
        yield "prune.weights.sparsity", f"is needed for the pattern {weights.pattern}, such as 0.75"


@_rule
def _pattern_divides_the_channels(p: Any) -> Iterator[Problem]:
    weights, channels = p.prune.weights, p.prune.embedding
    if channels is not None and channels % weights.span:
        yield "prune.embedding", f"must be a multiple of {weights.span} for {weights.pattern} weights, got {channels}"


@_rule
def _gradual_zeros_come_in_training(p: Any) -> Iterator[Problem]:
    weights = p.prune.weights
    if weights.method == "none" or weights.schedule != "gradual":
        return
    if not p.recover.enabled:
        yield "prune.weights.schedule", "gradual happens in recovery, and recover.enabled is false; use one-shot"
    if weights.pattern == "2:4":
        yield "prune.weights.schedule", "gradual has no steps on the way to the pattern 2:4; use one-shot"


@_rule
def _something_may_be_pruned(p: Any) -> Iterator[Problem]:
    prune = p.prune
    widths = (prune.heads, prune.head_dims, prune.mlp, prune.depth)
    if prune.tokens.method == "none" and prune.embedding is None and not any(one.enabled for one in widths):
        yield "prune", "allows nothing: enable tokens, heads, head_dims, mlp or depth"
