"""Which output of the model a folder's name stands for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

import yaml

from vitprune.errors import InputError, MissingError

ClassMap = Mapping[str, "int | str"] | Sequence[str] | str | Path
WNID = re.compile(r"n\d{8}")
IMAGENETS = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k-goog"}


def class_indices(
    folders: Sequence[str],
    where: str,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    class_map: ClassMap | None = None,
) -> dict[str, int]:
    """The model's output for each of ``folders``.

    An explicit map decides; without one the names of the model's classes do; then ImageNet's numbers (n01440764) for
    a model with as many classes as one of the ImageNets; at last the sorted order, if there are as many folders as
    classes, as torchvision's ImageFolder counts them.

    Args:
        folders: names of class folders.
        where: what holds them, for messages.
        class_names: the model's classes, in the order of its outputs.
        num_classes: how many outputs it has; None for a model without a classifier.
        class_map: folder to index or class name; or all folders in class order; or a file of either (YAML, JSON, or
            one name a line).

    Raises:
        InputError: a folder that stands for no class.
        MissingError: ImageNet's numbers are to be looked up, and timm, which brings them, is not installed.
    """
    folders = sorted(folders)
    num_classes = num_classes if class_names is None else len(class_names)
    if class_map is not None:
        return _by_map(folders, where, _read_map(class_map), class_names, num_classes)
    if class_names is not None:
        found = _by_names(folders, class_names)
        if len(found) == len(folders):
            return found
    numbers = all(WNID.fullmatch(folder) for folder in folders)
    if numbers and num_classes in IMAGENETS and len(folders) != num_classes:
        return _strict(folders, where, _synsets(num_classes))
    if class_names is not None and not (numbers and len(folders) == num_classes):
        return _strict(folders, where, class_names)
    return _by_order(folders, where, num_classes)


def _by_names(folders: Sequence[str], class_names: Sequence[str]) -> dict[str, int]:
    """As many folders as have a class of their name, whatever the case and the hyphens."""
    counts = Counter(class_names)
    exact = {name: index for index, name in enumerate(class_names) if counts[name] == 1}
    loose: dict[str, int] = {}
    for index, name in enumerate(class_names):
        loose[_plain(name)] = -1 if _plain(name) in loose else index  # two classes of one name: neither
    found = {folder: exact.get(folder, loose.get(_plain(folder), -1)) for folder in folders}
    return {folder: index for folder, index in found.items() if index >= 0}


def _strict(folders: Sequence[str], where: str, class_names: Sequence[str]) -> dict[str, int]:
    found = _by_names(folders, class_names)
    strange = [folder for folder in folders if folder not in found]
    if strange:
        close = get_close_matches(strange[0], class_names, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ";"
        raise InputError(
            f"{where}: {len(strange)} of {len(folders)} folders are no class of the model, the first is "
            f"{strange[0]!r}{hint} it has {_some(class_names)}; rename them, give data.class_map, or set "
            "data.labelled to false"
        )
    return found


def _by_order(folders: Sequence[str], where: str, num_classes: int | None) -> dict[str, int]:
    digits = all(folder.isdecimal() for folder in folders)
    if digits and num_classes is not None and len(folders) < num_classes > max(int(folder) for folder in folders):
        return {folder: int(folder) for folder in folders}
    if num_classes is not None and len(folders) != num_classes:
        raise InputError(
            f"{where} has {len(folders)} class folders ({_some(folders)}) and the model {num_classes} classes; "
            "name its classes in model.classes, or give data.class_map"
        )
    odd = [(a, b) for a, b in pairwise(folders) if digits and int(a) > int(b)]
    if odd:
        raise InputError(
            f"{where}: sorted as text, folder {odd[0][0]!r} comes before {odd[0][1]!r}, and nothing says whether the "
            "model counts so; give data.class_map"
        )
    return {folder: index for index, folder in enumerate(folders)}


def _by_map(
    folders: Sequence[str],
    where: str,
    class_map: Mapping[str, int | str] | Sequence[str],
    class_names: Sequence[str] | None,
    num_classes: int | None,
) -> dict[str, int]:
    if not isinstance(class_map, Mapping):
        twice = [folder for folder, count in Counter(class_map).items() if count > 1]
        if twice:
            raise InputError(f"data.class_map lists folder {twice[0]!r} twice; it must have each once, in class order")
        class_map = {folder: index for index, folder in enumerate(class_map)}
    known = {name: index for index, name in enumerate(class_names or ())}
    found = {}
    for folder in folders:
        if folder not in class_map:
            raise InputError(f"{where}: data.class_map says nothing of folder {folder!r}; it has {_some([*class_map])}")
        target = class_map[folder]
        index = known.get(target, -1) if isinstance(target, str) else target
        if index < 0 or (num_classes is not None and index >= num_classes):
            wanted = "one of its class names or an index" if known else "an index"
            most = "" if num_classes is None else f" below {num_classes}"
            raise InputError(f"data.class_map: {folder!r} is mapped to {target!r}, wanted {wanted}{most}")
        found[folder] = index
    return found


def _read_map(class_map: ClassMap) -> Mapping[str, int | str] | Sequence[str]:
    if not isinstance(class_map, str | Path):
        return class_map
    path = Path(class_map)
    try:
        text = path.read_text(encoding="utf-8")
        read = text.splitlines() if path.suffix == ".txt" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.class_map: {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"data.class_map: {path} is not YAML or JSON ({' '.join(str(error).split())})") from None
    if isinstance(read, list) and read:
        return [str(name).strip() for name in read if str(name).strip()]
    if isinstance(read, dict) and all(isinstance(v, int | str) and not isinstance(v, bool) for v in read.values()):
        return {str(folder): target for folder, target in read.items()}
    raise InputError(f"data.class_map: {path} must hold folder: class pairs, or a list of folders in class order")


def _synsets(num_classes: int) -> Sequence[str]:
    try:
        from timm.data import ImageNetInfo  # base installs have no timm
    except ImportError:
        raise MissingError(
            'looking up ImageNet\'s class numbers needs timm; run pip install "vitprune[prune]" or give data.class_map'
        ) from None
    return ImageNetInfo(IMAGENETS[num_classes]).label_names()


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-/]+", " ", name).strip().casefold()


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
