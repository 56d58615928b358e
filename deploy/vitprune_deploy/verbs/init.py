"""A commented profile for a model, its images and this machine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitprune.errors import InputError

from ..build.runtimes import on_host
from ..console import Console
from ..data.sources import open_source
from ..files import write_atomic
from ..processor import suits_openvino
from ..profile import commented_yaml, list_profiles, load_profile
from ..profile.checks import RTX_CAPABILITIES
from ..profile.loading import X86_BF16, X86_CPU
from ..remote.device import Device
from .answer import Answer

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.model.timm import Converted

CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")
TRAIN, TEST = ("train", "training"), ("test", "val", "valid", "validation")
TIMM_CLASSES = 1000
LARGEST_DROP = 1.0  # points of top-1
LEAST_AGREEMENT = 97.0  # percent, where images carry no classes
DEFAULT_NAME = "profile"  # of the file; any other names the profile, and so the output folder
SHAPES = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}  # width of timm's vit_NAME


def init(
    console: Console,
    model: str,
    *,
    data: Path | None,
    speedup: float,
    architecture: str | None,
    host: str | None,
    output: Path,
) -> Answer:
    """Write a profile to ``output``, which the rest of the command accepts.

    Raises:
        InputError: ``output`` exists, timm has no such model, the checkpoint does not fit, or there are no images.
        MissingError: timm is not installed.
    """
    if output.exists():
        raise InputError(f"{output} exists; choose another name with --output")
    given = _model(model, architecture, output)
    converted = _convert(given)
    images, labelled = _images(data, output)
    named = output.stem if output.stem != DEFAULT_NAME else Path(model).stem if "checkpoint" in given else given["name"]
    values = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", named)[:100],
        "model": given,
        "data": images,
        **_device(speedup, host),
        "accuracy": {"max_drop": LARGEST_DROP} if labelled else {"min_agreement": LEAST_AGREEMENT},
    }
    write_atomic(output, commented_yaml(values))
    load_profile(output)
    config = converted.model.config
    if data is None:
        console.say(f"say in {output} where the images are: data.source")
    console.say(f"next: vitprune-deploy check {output}")
    size = f"{config.image_size[0]} x {config.image_size[1]} pixels, {config.patches} patches, {config.classes} classes"
    text = f"{output}: {given['name']}, {size}; {speedup:g} times as fast on {_device_name(values)}"
    return Answer(text, {"profile": str(output), "values": values})


def _model(model: str, architecture: str | None, output: Path) -> dict[str, Any]:
    """The profile's section ``model``."""
    path = Path(model)
    if not (path.is_file() or path.suffix in CHECKPOINTS):
        if architecture is not None:
            raise InputError(f"--architecture belongs to a checkpoint, and {model!r} is no file")
        return {"name": model}
    from vitprune.model.checkpoint import read_checkpoint

    weights = read_checkpoint(path)
    name = architecture or named_in(path.stem) or like_shapes(weights, path)
    return {"name": name, "args": model_args(weights, name), "checkpoint": _from(output, path)}


def _convert(given: Mapping[str, Any]) -> Converted:
    """The model as the pipeline will see it, so that what it refuses is refused now; weights are not downloaded."""
    import torch

    from vitprune.model.timm import from_timm

    if "checkpoint" in given:
        return from_timm(given["name"], checkpoint=Path(given["checkpoint"]), **given["args"])
    with torch.device("meta"):
        return from_timm(given["name"])


def named_in(stem: str) -> str | None:
    """The longest of timm's names that a file name begins with, as in 'deit_tiny_patch16_224-a1311bcf'."""
    import timm

    known = [name for module in ("vision_transformer", "deit") for name in timm.list_models(module=module)]
    return max((name for name in known if stem.startswith(name)), key=len, default=None)


def like_shapes(weights: Mapping[str, Tensor], path: Path) -> str:
    """timm's name of a plain Vision Transformer with the width, depth and patch size of ``weights``.

    Raises:
        InputError: there is none; heads cannot be told from weights, so an unusual width is not guessed.
    """
    import timm

    patches = weights.get("patch_embed.proj.weight")
    if patches is not None:
        size = next((name for name, width in SHAPES.items() if width == patches.shape[0]), None)
        prefix = "deit" if "dist_token" in weights else "vit"
        distilled = "_distilled" if "dist_token" in weights else ""
        names = timm.list_models(f"{prefix}_{size}{distilled}_patch{patches.shape[-1]}_*")
        plain = [name for name in names if re.fullmatch(r".*_patch\d+_\d+", name)]
        if size and plain:
            return min(plain, key=lambda name: abs(int(name.rpartition("_")[2]) - 224))
    raise InputError(f"{path}: its architecture cannot be told from its weights; give timm's name with --architecture")


def model_args(weights: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Arguments of timm's ``create_model`` that the shapes of ``weights`` call for."""
    args: dict[str, Any] = {}
    head, stem = weights.get("head.weight"), weights.get("patch_embed.proj.weight")
    classes = 0 if head is None else head.shape[0]
    if classes != TIMM_CLASSES:
        args["num_classes"] = classes
    if stem is not None and stem.shape[1] != 3:
        args["in_chans"] = stem.shape[1]
    size, position = re.search(r"_(\d+)(\.|$)", name), weights.get("pos_embed")
    if size and stem is not None and position is not None:
        prefix = ("cls_token" in weights) + ("dist_token" in weights)
        side = round((position.shape[1] - prefix) ** 0.5) * stem.shape[-1]
        if side != int(size[1]):
            args["img_size"] = side
    return args


def _images(data: Path | None, output: Path) -> tuple[dict[str, Any], bool]:
    """The section ``data``, with splits where folders have the usual names; and whether the images carry classes."""
    if data is None:
        return {"source": "images"}, True
    source = _from(output, data)
    train, test = _split(data, TRAIN), _split(data, TEST)
    labelled = all(entry.folder for entry in open_source(data, test if train else None).entries)
    if not (train and test):
        return {"source": source}, labelled
    split = {"calibration": {"split": train}, "recovery": {"split": train}, "test": {"split": test}}
    return {"source": source, **split}, labelled


def _split(data: Path, names: Sequence[str]) -> str | None:
    """The first of the folders ``names`` that holds images."""
    for name in names:
        with contextlib.suppress(InputError):
            open_source(data, name)
            return name
    return None


def _device(speedup: float, host: str | None) -> dict[str, Any]:
    """The sections of the device, the runtime and the budget."""
    device = on_host(host)
    found = _facts(device, speedup)
    return {**found, "device": {"host": host, **found.get("device", {})}} if host else found


def _facts(device: Device, speedup: float) -> dict[str, Any]:
    """What the machine says of itself: a shipped device file where one fits, its facts otherwise."""
    here = device.fingerprint("none")
    threads = {"budget": {"speedup": speedup, "threads": here["cores"]}}
    budget = {"budget": {"speedup": speedup}}
    product = here["gpus"][0]["name"] if here["gpus"] else here["cpu"]  # a Jetson's board bears the name of its GPU
    for listed in list_profiles():
        if listed.is_device and re.search(rf"\b{re.escape(_model_number(listed.name))}\b", product, re.IGNORECASE):
            return {"extends": listed.name, **budget}
    if not here["gpus"]:
        if here["architecture"] in ("x86_64", "AMD64"):
            halves = suits_openvino(here["flags"], device.has("openvino"))
            return {"extends": X86_BF16 if halves else X86_CPU, **threads}
        return {"device": {"name": here["cpu"]}, **threads}
    gpu = here["gpus"][0]
    capability = gpu["compute_capability"]
    runtime = "tensorrt-rtx" if capability in RTX_CAPABILITIES and "RTX" in gpu["name"] else "tensorrt"
    facts = {"name": gpu["name"], "compute_capability": capability, "memory_mb": int(float(gpu["memory_mb"]))}
    return {"device": facts, "runtime": {"name": runtime, "precision": "fp16"}, **budget}


def _model_number(device: str) -> str:
    """'devices/rtx4090' as NVIDIA writes it, 'RTX 4090'."""
    return device.removeprefix("devices/").replace("rtx", "rtx ").replace("-", " ")


def _device_name(values: Mapping[str, Any]) -> str:
    return str(values["extends"] if "extends" in values else values["device"]["name"])


def _from(output: Path, path: Path) -> str:
    """``path`` as the profile in ``output`` should name it: relative below its folder, absolute elsewhere."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    absolute, folder = path.resolve(), output.resolve().parent
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)
