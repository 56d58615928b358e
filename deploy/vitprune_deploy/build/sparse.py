"""Single weights: the stage that makes them zeros, and what zeros are worth, which is told apart from what they cost.

Zeros shorten no product of a dense kernel. Kernels that skip them exist for 2:4 in TensorRT, which takes them where it
timed them to be faster; whether it did is read from the engine or the builder's log, and a search counts on it only
then. All other zeros make the file smaller once it is compressed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profile import Profile
from . import runtimes
from .bench import Bench, save_vit, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.model.vit import Vit
    from vitprune.plan import Plan
    from vitprune.recover import Thinning

WEIGHTS = "weights.json"  # in the folder of the stage ``weights``
SLIM = "slim"  # the model that it leaves there
PROBE = "sparse-probe"  # the engine that tells whether kernels skip zeros here


def weight_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``weights`` depends on besides earlier stages."""
    return {"weights": bench.profile.prune.weights.model_dump(mode="json"), "seed": bench.profile.seed}


def prune_weights(bench: Bench, folder: Path) -> None:
    """Make weights of the slim model zeros, unless recovery is to do so, and say what that is good for."""
    from vitprune.sparsify import sparsify

    from .make import slim_model

    wanted = bench.profile.prune.weights
    if not bench.plan.patterns():  # not asked for, or no such layer is left
        write_json(folder / WEIGHTS, None)
        return
    model, _ = slim_model(bench)
    bench.shows.say(str(worth(bench.profile)))
    if wanted.schedule == "one-shot":
        model = sparsify(model, **_asked(bench), progress=bench.shows.progress).model
    save_vit(model, folder, SLIM)
    write_json(folder / WEIGHTS, {"method": wanted.method, "pattern": wanted.pattern, "schedule": wanted.schedule})


def layer_names(profile: Profile) -> str:
    """The layers that get zeros, as a regular expression for their names."""
    from vitprune.sparsify import BLOCKS, MLP

    return MLP if profile.prune.weights.where == "mlp" else BLOCKS


def with_zeros(plan: Plan, profile: Profile) -> Plan:
    """``plan`` with the pattern that the profile asks for in its layers."""
    wanted = profile.prune.weights
    if not wanted.enabled:
        return plan
    chosen = re.compile(layer_names(profile))
    return plan.with_zeros(wanted.pattern, lambda name: chosen.fullmatch(name) is not None)


def thinning(bench: Bench, model: Vit) -> Thinning | None:
    """What keeps the zeros of ``model`` in a training, and adds to them where they come gradually; None: no zeros."""
    from vitprune.gradual import Gradual, KeptZeros

    if not _layer_list(model, bench.profile):
        return None
    if bench.profile.prune.weights.schedule == "one-shot":
        return KeptZeros(model, layer_names(bench.profile))
    return Gradual(model, **_asked(bench))


def _asked(bench: Bench) -> dict[str, Any]:
    """Arguments of ``sparsify`` and ``Gradual`` behind the model, as the profile has them."""
    wanted = bench.profile.prune.weights
    return {
        "images": bench.search_images,
        "method": wanted.method,
        "pattern": wanted.pattern,
        "sparsity": wanted.sparsity,
        "layers": layer_names(bench.profile),
        "seed": bench.profile.seed,
    }


def _layer_list(model: Vit, profile: Profile) -> list[str]:
    """The layers of ``model`` that get zeros; none where it has lost all of that kind, or none are asked for."""
    if not profile.prune.weights.enabled:
        return []
    chosen = re.compile(layer_names(profile))
    return [name for name, _ in model.named_modules() if chosen.fullmatch(name)]


# ---- what they are worth ------------------------------------------------------------------------------------------


def worth(profile: Profile) -> str | None:
    """What can be said of the zeros before anything is built; None: there are to be none."""
    if not profile.prune.weights.enabled:
        return None
    if not profile.asks_2_4:
        return (
            f"Zeros of the pattern {profile.prune.weights.pattern} bring no speed by themselves, in ONNX Runtime or "
            "TensorRT: the file that they leave is smaller when it is compressed."
        )
    if "tensorrt" in profile.runtime.provider.lower():
        return (
            "ONNX Runtime's TensorRT provider may use kernels for 2:4 with runtime.options "
            "{trt_sparsity_enable: true}, and does not say whether it does."
        )
    if not runtimes.is_tensorrt(profile.runtime.name):
        return (
            f"{profile.runtime.name} has no kernels for the pattern 2:4, so it brings no speed there; TensorRT may "
            "have some, on Ampere and later."
        )
    return "2:4 is faster only where TensorRT chooses kernels that skip zeros, which is looked up in its engine."


def search_kernels(bench: Bench, folder: Path) -> dict[str, Any] | None:
    """Whether the search may count on kernels that skip zeros: ``used`` and ``why``; None where 2:4 is not asked for.

    An engine of the dense shapes with 2:4 weights is built for it.
    """
    if bench.profile.asks_2_4 and bench.sparse_kernels is None:
        bench.sparse_kernels = _looked_up(bench, folder)
    return bench.sparse_kernels


def _looked_up(bench: Bench, folder: Path) -> dict[str, Any]:
    if not runtimes.is_tensorrt(bench.profile.runtime.name):
        return {"used": False, "why": worth(bench.profile)}
    if not bench.profile.search.landings:
        return {"used": False, "why": "search.landings is 0, so that nothing is built and no gain by 2:4 is counted on"}
    bench.shows.progress(0, 1, "look for kernels that skip zeros")
    found = _probe(bench, folder)
    why = f"no gain by 2:4 is counted on: {_unused(found)}"
    if found["used"]:
        why = f"kernels that skip zeros were taken for {found['used']} layers, so candidates are measured with them"
    bench.shows.say(f"search: {why}")
    return {"used": bool(found["used"]), "why": why}


def _probe(bench: Bench, folder: Path) -> Mapping[str, Any]:
    """What the builder says of kernels that skip zeros, for the dense shapes at the budget's batch."""
    from .make import export_to_time

    profile = bench.profile
    onnx, plan = folder / f"{PROBE}.onnx", folder / f"{PROBE}.plan"
    export_to_time(bench, stand_in(bench.base, profile), onnx, like=bench.base)
    height, width = bench.dense.config.image_size
    sizes = {"batch": profile.batch, "height": height, "width": width}
    sidecar = runtimes.on(profile).build(onnx, plan, runtimes.fixed_options(onnx, sizes, profile))
    for path in folder.glob(f"{PROBE}.*"):
        path.unlink()
    found: Mapping[str, Any] = sidecar["sparse"]
    return found


def stand_in(model: Vit, profile: Profile) -> Vit:
    """``model`` with zeros of the profile's pattern: kernels skip the same whichever weights they are."""
    from vitprune.sparsify import sparsify

    if not _layer_list(model, profile):
        return model
    return sparsify(model, None, "magnitude", "2:4", layers=layer_names(profile)).model


def _unused(found: Mapping[str, Any]) -> str:
    if found["used"] is None:
        return "neither TensorRT's log nor an engine's inspector says which kernels it took"
    eligible = f" of {found['eligible']} eligible layers" if found["eligible"] is not None else ""
    return f"TensorRT took kernels that skip zeros for none{eligible}, since dense ones were faster"


def account(bench: Bench) -> dict[str, Any] | None:
    """What became of the weights, for manifest and report; None where none were to be zeros.

    Keys: ``method``, ``pattern``, ``schedule``; ``zeros`` of ``weights`` in the layers that were pruned; ``layers``
    (name -> share of zeros); ``size_bytes`` of model.onnx, and ``compressed_bytes``; ``kernels``, an engine's sidecar's
    word on kernels that skip zeros, None where there is no such engine; ``notes``, sentences for people.
    """
    from ..export.sparsity import compressed_bytes

    made: dict[str, Any] | None = bench.json("weights", WEIGHTS)
    if made is None:
        return None
    layers = _layers(bench)
    total = sum(weight.numel() for weight in layers.values())
    zeros = sum(int((weight == 0).sum()) for weight in layers.values())
    files = sorted(bench.folders["export"].glob("model.onnx*"))
    found = {
        **made,
        "zeros": zeros,
        "weights": total,
        "layers": {name: round(float((weight == 0).float().mean()), 4) for name, weight in layers.items()},
        "size_bytes": sum(path.stat().st_size for path in files),
        "compressed_bytes": compressed_bytes(files),
        "kernels": _kernels(bench),
        "search": bench.json("search", "search.json").get("sparse"),
    }
    return found | {"notes": _sentences(bench, found)}


def _layers(bench: Bench) -> dict[str, Tensor]:
    """The weights of the shipped model that were to be zeros in part, by the layer's name."""
    modules: dict[str, Any] = dict(bench.pruned.named_modules())
    return {name: modules[name].weight.detach() for name in bench.plan.patterns()}


def _kernels(bench: Bench) -> dict[str, Any] | None:
    """What the product's engine says of kernels that skip zeros."""
    from ..backends.tensorrt import sidecar_path
    from .judge import engine_files

    if not (bench.profile.asks_2_4 and runtimes.is_tensorrt(bench.profile.runtime.name)):
        return None
    sidecar: dict[str, Any] = json.loads(sidecar_path(engine_files(bench)["pruned"]).read_bytes())
    return sidecar["sparse"]


def _sentences(bench: Bench, found: Mapping[str, Any]) -> list[str]:
    share = 100 * found["zeros"] / found["weights"]
    said = [
        f"Weights: {share:.1f}% of {found['weights']} in {len(found['layers'])} layers are zero "
        f"({found['pattern']}, by {found['method']}); model.onnx has {found['size_bytes'] / 1e6:.2f} MB, and "
        f"{found['compressed_bytes'] / 1e6:.2f} MB compressed by zlib."
    ]
    kernels = found["kernels"]
    if kernels is None:
        return [*said, str(worth(bench.profile))]
    if found["search"]:
        said.append(f"In the search, {found['search']['why']}.")
    if kernels["used"]:
        names = f": {', '.join(kernels['names'])}" if kernels["names"] else ""
        return [*said, f"TensorRT skips zeros in {kernels['used']} layers (seen in its {kernels['proof']}){names}."]
    return [*said, f"2:4 is credited with no speed here: {_unused(kernels)}."]
