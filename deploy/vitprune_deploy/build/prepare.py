"""The first stages: the model to prune in our own form, and its images in three disjoint parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitprune.errors import InputError

from ..data import ImageSet, Preprocess
from ..files import canonical_sha256, sha256_file
from ..profile import Profile
from .bench import METHOD_WEIGHTS, Bench, save_vit, save_weights, write_json


def model_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``model`` depends on."""
    profile = bench.profile
    checkpoint = profile.model.checkpoint
    return {
        "model": profile.model.model_dump(mode="json"),
        "seed": profile.seed if checkpoint is None and not profile.model.pretrained else None,
        "checkpoint": sha256_file(Path(checkpoint)) if checkpoint else None,
        "classes": sha256_file(Path(profile.model.classes)) if isinstance(profile.model.classes, str) else None,
        "image_size": profile.image_size,
        "dynamic": is_dynamic(profile),
        "preprocess": profile.data.preprocess.model_dump(mode="json"),
    }


def prepare_model(bench: Bench, folder: Path) -> None:
    """Convert the model, with its image size set to the budget's, and write down how its images are preprocessed."""
    import torch

    from vitprune.model.timm import from_timm
    from vitprune.official import from_official

    profile = bench.profile
    torch.manual_seed(profile.seed)  # where there are no weights, random ones must be the same in every run
    arguments: dict[str, Any] = dict(profile.model.args)
    if profile.image_size is not None:
        arguments["img_size"] = profile.image_size
    checkpoint = Path(profile.model.checkpoint) if profile.model.checkpoint else None
    name, method = profile.model.name, profile.model.checkpoint_format
    if method and checkpoint:
        found, own = from_official(method, name, checkpoint, **arguments)
        save_weights(own, folder / f"{method}{METHOD_WEIGHTS}")
    else:
        found = from_timm(name, checkpoint=checkpoint, pretrained=profile.model.pretrained, **arguments)
    model = found.model
    if is_dynamic(profile):
        model.config = replace(model.config, dynamic_image_size=True)
    save_vit(model, folder, "dense")
    write_json(folder / "preprocess.json", _preprocess(found.data, model.config.image_size, profile).to_dict())
    write_json(folder / "classes.json", _class_names(profile, model.config.classes) or found.classes)


def is_dynamic(profile: Profile) -> bool:
    """Whether the engine must take images of several sizes."""
    return profile.input.dynamic_height is not None or profile.input.dynamic_width is not None


def _preprocess(data: Mapping[str, Any], image_size: tuple[int, int], profile: Profile) -> Preprocess:
    """timm's data config, with what the profile says in place of it."""
    given = profile.data.preprocess.model_dump(exclude_none=True)
    return Preprocess.from_dict({**data, **given}).at(*image_size)


def _class_names(profile: Profile, outputs: int) -> list[str] | None:
    """The names that the profile gives the model's outputs."""
    given = profile.model.classes
    if given is None:
        return None
    if isinstance(given, tuple):
        names, where = list(given), "model.classes"
    else:
        where = str(given)
        try:
            names = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"model.classes: {given} cannot be read ({error})") from None
    if len(names) != outputs:
        raise InputError(f"{where} names {len(names)} classes, the model has {outputs} outputs")
    return names


def images_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``images`` depends on: the very images, so they are listed (not decoded) in every build."""
    return {"parts": {name: _summary(part) for name, part in bench.images._asdict().items()}}


def prepare_images(bench: Bench, folder: Path) -> None:
    """Write down which images each part holds."""
    write_json(folder / "images.json", images_settings(bench)["parts"])


def _summary(part: ImageSet) -> dict[str, Any]:
    """How many images, where from, and a hash over their names, sizes and classes, and over an archive's bytes."""
    listed = [[part.name(i), _size_bytes(part, i), part.label(i)] for i in range(len(part))]
    where = Path(part.where)
    archive = next((path for path in (where, *where.parents) if path.is_file()), None)
    return {
        "where": part.where,
        "images": len(part),
        "labelled": part.labels is not None,
        "listed_sha256": canonical_sha256(listed),
        "archive_sha256": sha256_file(archive) if archive else None,
    }


def _size_bytes(part: ImageSet, i: int) -> int | None:
    """None for a link to nothing or a file that cannot be read, which is counted when it is decoded."""
    try:
        return part.size_bytes(i)
    except Exception:  # as in Store.image: readers raise nearly anything
        return None
