"""The stages that make the product: the slim model with its accuracy recovered, the ONNX files, the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import sha256_file
from ..profile import Profile
from . import learned, runtimes, training
from .bench import RANKINGS, Bench, load_vit, save_vit, write_json
from .sparse import SLIM, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.model.vit import Vit

    from ..backends.tensorrt import EngineOptions
    from ..export.islands import Island
    from ..remote.device import Device

PLAIN = "plain"  # the product's engine without compatibility, which shows what that costs
COMPILED = "model.compiled.onnx"
DENSE_PARITY_IMAGES = 8  # the dense files are not the product: they only must not be wrong


def recover_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``recover`` depends on besides earlier stages."""
    return {"recover": bench.profile.recover.model_dump(mode="json"), "seed": bench.profile.seed}


def recover_accuracy(bench: Bench, folder: Path) -> None:
    """Cut the model down to its plan, and train what is left to answer as the dense model does."""
    import torch

    if bench.json("weights", WEIGHTS):
        slim, changed = load_vit(bench.folders["weights"], SLIM), True
    else:
        slim, changed = slim_model(bench)
    if not (bench.profile.recover.enabled and changed):
        save_vit(slim, folder, "model")
        write_json(folder / "recovery.json", [])
    elif torch.cuda.device_count() > 1:
        training.train_on(torch.cuda.device_count(), bench, slim, folder)
    else:
        training.train(bench, slim, folder)


def slim_model(bench: Bench) -> tuple[Vit, bool]:
    """The pruned model, not trained yet; and whether its answers are other than the dense model's."""
    from vitprune.search.losses import Rankings
    from vitprune.surgery import dense_plan, prune

    from .embedding import of_base

    plan = bench.plan
    if bench.profile.prune.learned.method:
        return learned.slim_model(bench, plan), True
    whole = dense_plan(bench.dense).blocks
    if tuple(replace(block, weights=()) for block in plan.blocks) == whole and plan.embed is None:
        return load_vit(bench.folders["model"], "dense"), False
    rankings = Rankings.load(bench.folders["losses"] / RANKINGS)
    qk, v = (
        [len(dims[0]) if dims else 0 for dims in kept] for kept in zip(*((b.qk, b.v) for b in plan.blocks), strict=True)
    )
    weights = rankings.weights([len(b.heads) for b in plan.blocks], [len(b.mlp) for b in plan.blocks], qk, v)
    kept_all = all(replace(b, patches=None, weights=()) == w for b, w in zip(plan.blocks, whole, strict=True))
    slim = prune(bench.base, of_base(bench, plan), weights, bench.method_weights(plan.reducer))
    return slim, plan.embed is not None or not kept_all or any(b.patches for b in plan.blocks)


def export_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``export`` depends on besides earlier stages."""
    profile = bench.profile
    return {
        "export": profile.export.model_dump(mode="json"),
        "runtime": profile.runtime.name,
        "precisions": sorted({profile.graph_precision, *(e.precision for e in profile.runtime.also_build)}),
        "input": profile.input.model_dump(mode="json"),
        "parity_images": profile.validation.parity_images,
    }


def export(bench: Bench, folder: Path) -> None:
    """Write the dense and the pruned model as ONNX, and compare each file with torch at several shapes."""
    from ..export.parity import check_parity

    profile = bench.profile
    model = bench.pruned
    wanted = {"dense.onnx": (bench.dense, profile.graph_precision)}
    if profile.graph_precision != "fp32":
        wanted["reference.onnx"] = (bench.dense, "fp32")  # accuracy is judged against it
    precisions = export_settings(bench)["precisions"]
    wanted |= {onnx_name(profile, precision): (model, precision) for precision in precisions}
    islands = {name: bench.islands(which, precision) for name, (which, precision) in wanted.items()}
    info = {
        name: _export(bench, which, folder / name, precision, islands[name])
        for name, (which, precision) in wanted.items()
    }
    sparse = {name: check_2_4(bench, folder / name) for name, (which, _) in wanted.items() if which is model}
    images, parity = parity_images(bench), {}
    for name, (which, precision) in wanted.items():
        found = check_parity(
            which,
            folder / name,
            images if which is model else images[:DENSE_PARITY_IMAGES],
            batches=parity_batches(profile),
            image_sizes=parity_sizes(profile, model.config.image_size),
            precision=precision,
        )
        if which is model:
            parity[precision] = asdict(found)
    kept = {name: [island._asdict() for island in found] for name, found in islands.items()}
    write_json(folder / "export.json", {"files": info, "parity": parity, "islands": kept, "sparse": sparse})


def check_2_4(bench: Bench, path: Path) -> list[dict[str, Any]]:
    """The products of the pruned model in an exported file that were to be 2:4, and are.

    Raises:
        NotSupported: in one of them the pattern does not hold.
    """
    from ..export.sparsity import check_pattern

    if not bench.profile.asks_2_4:
        return []
    return [layer._asdict() for layer in check_pattern(path, bench.plan.patterns())]


def onnx_name(profile: Profile, precision: str) -> str:
    """The name of the pruned model's ONNX file: the product's own precision needs no mention."""
    return "model.onnx" if precision == profile.graph_precision else f"model.{precision}.onnx"


def parity_images(bench: Bench) -> Tensor:
    """Images on which the exported file and torch are compared: of the test part."""
    import torch

    from ..data import picked

    count = min(bench.profile.validation.parity_images, len(bench.images.test))
    return torch.from_numpy(picked(bench.images.test, bench.preprocess, range(count))[0])


def parity_batches(profile: Profile) -> list[int]:
    """The batch sizes to compare at: two at least, wherever more than one is served."""
    batch = profile.input.batch
    inner = {batch.min, batch.opt, 3} & set(range(batch.min, batch.max + 1))
    return sorted(inner if len(inner) > 1 else {*inner, batch.max})


def parity_sizes(profile: Profile, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """The image sizes to compare at: the model's own, and the ends of what is dynamic."""
    sides = [profile.input.dynamic_height, profile.input.dynamic_width]
    if not any(sides):
        return [image_size]
    least = tuple(side.min if side else size for side, size in zip(sides, image_size, strict=True))
    most = tuple(side.max if side else size for side, size in zip(sides, image_size, strict=True))
    return [image_size, least, most]  # type: ignore[list-item]


def engine_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``engines`` depends on besides the export: which are wanted, and what can be built here."""
    runtime = bench.profile.runtime
    return {
        "runtime": runtime.model_dump(mode="json"),
        "batch_ranges": bench.profile.input.model_dump(mode="json")["batch_ranges"],
        "compute_capability": bench.profile.device.compute_capability,
        "there": [engine.name for engine in runtime.also_build if _installed(bench, engine.name)],
        "device": runtimes.device(bench.profile) if runtimes.is_tensorrt(runtime.name) or runtime.compiled else None,
    }


def build_engines(bench: Bench, folder: Path) -> None:
    """Build the product's own engine where its runtime needs one, and the further ones whose package is here."""
    profile, found = bench.profile, []
    config = bench.pruned.config
    if runtimes.is_tensorrt(profile.runtime.name):
        wanted = [("dense", profile.runtime.name, profile.runtime.precision, "dense.onnx")]
        wanted += [("model", profile.runtime.name, profile.runtime.precision, "model.onnx")]
        if profile.runtime.precision != "fp32":
            wanted += [("reference", profile.runtime.name, "fp32", "reference.onnx")]
        if runtimes.asks_compatibility(profile):
            wanted += [(PLAIN, profile.runtime.name, profile.runtime.precision, "model.onnx")]
    else:
        wanted = []
    for engine in profile.runtime.also_build:
        if _installed(bench, engine.name):
            wanted.append(("model", engine.name, engine.precision, onnx_name(profile, engine.precision)))
        else:
            bench.shows.say(f"{engine.name} is not installed, so its engine is left out")
    for number, (name, runtime, precision, onnx) in enumerate(wanted):
        bench.shows.progress(number, len(wanted), f"{name} for {runtime} in {precision}")
        options = runtimes.engine_options(profile, config, runtime, precision)
        if name == PLAIN:
            options = replace(options, hardware_compatibility="none", version_compatible=False)
        plan = build_plan(runtimes.on(profile), bench.folders["export"] / onnx, folder, name, options)
        found.append({"model": name, "runtime": runtime, "precision": precision, "file": plan.name, "status": "built"})
    if profile.runtime.compiled:
        found.append(_compile(bench, folder))
    write_json(folder / "engines.json", found)


def build_plan(device: Device, onnx: Path, folder: Path, name: str, options: EngineOptions) -> Path:
    """Build a TensorRT plan on the device, with its sidecar in ``folder``; its file name says what it serves."""
    from ..backends.tensorrt import engine_name, sidecar_path

    built = folder / f"{name}.plan"
    sidecar = device.build(onnx, built, options)
    plan = folder / engine_name(name, sidecar)  # the sidecar knows the version and the GPU
    for one, other in ((built, plan), (sidecar_path(built), sidecar_path(plan))):
        one.rename(other)
    return plan


def _compile(bench: Bench, folder: Path) -> dict[str, Any]:
    """The product compiled ahead of time by its execution provider, as an entry of ``engines.json``."""
    from ..backends.onnxruntime import OnnxRuntime

    profile = bench.profile
    bench.shows.progress(0, 1, f"compile for {profile.runtime.provider}")
    source, options = bench.folders["export"] / "model.onnx", runtimes.load_options(profile)
    OnnxRuntime.compile(source, folder / COMPILED, threads=profile.budget.threads, options=options)
    runtime, precision = profile.runtime.name, profile.runtime.precision
    return {"model": "model", "runtime": runtime, "precision": precision, "file": COMPILED, "status": "built"}


def _export(bench: Bench, model: Vit, path: Path, precision: str, islands: Sequence[Island]) -> dict[str, Any]:
    from ..export.onnx import export_onnx, metadata_json

    profile, config = bench.profile, model.config
    info = export_onnx(
        model,
        path,
        **served_sizes(profile, config.image_size),
        precision=precision,
        **served_dialect(profile, precision),
        metadata=metadata_json(
            base_model=profile.model.name,
            preprocess=bench.preprocess.to_dict(),
            tokens=[block.patches for block in config.blocks],
            heads=[block.heads for block in config.blocks],
            mlp=[block.mlp for block in config.blocks],
            **({} if model is bench.dense else {"plan_sha256": sha256_file(bench.folders["search"] / "plan.yaml")}),
        ),
        names=("images", "logits" if config.classes else "features"),
        islands=islands,
    )
    return asdict(info)


def export_to_time(bench: Bench, model: Vit, path: Path, *, like: Vit) -> Path:
    """A model that is only timed, as it would be shipped; a file that is there already is taken for it.

    Args:
        like: the model whose islands of fp32 it has.
    """
    from ..latency.wholes import export_whole

    profile = bench.profile
    return export_whole(
        model,
        path,
        **served_sizes(profile, model.config.image_size),
        precision=profile.graph_precision,
        **served_dialect(profile, profile.graph_precision),
        islands=bench.islands(like, profile.graph_precision),
    )


def served_dialect(profile: Profile, precision: str) -> dict[str, Any]:
    """The operators of what is shipped in ``precision``, as arguments of ``export_onnx``."""
    from ..export.precision import opset_for, ort_attention

    asked, runtime = profile.export.opset, profile.runtime
    return {
        "opset": opset_for(precision, runtime.name) if asked == "auto" else asked,
        "ort_attention": asked == "auto" and ort_attention(precision, runtime.name, runtime.provider),
    }


def served_sizes(profile: Profile, image_size: tuple[int, int]) -> dict[str, Any]:
    """Batch and image size of what is shipped, as arguments of ``export_onnx``."""
    ranges = [profile.input.dynamic_height, profile.input.dynamic_width]
    sides: Any = image_size
    if any(ranges):
        sides = tuple((r.min, r.max) if r else (size, size) for r, size in zip(ranges, image_size, strict=True))
    return {"batch": (profile.input.batch.min, profile.input.batch.max), "image_size": sides}


def _installed(bench: Bench, runtime: str) -> bool:
    return runtimes.on(bench.profile).has(runtimes.module(runtime))
