"""Checkpoint files of users: safetensors and ``.pth``, read without running anything that they hold."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DamagedFile, InputError

# where trainers keep the weights within a .pth file; averaged weights first, as timm does it
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state", "model")
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel, EMA and torch.compile put in front of each name


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by name, without a trainer's nesting and prefixes; averaged ones where there are two.

    Raises:
        InputError: no such file, no weights in it, or objects that cannot be read safely.
        DamagedFile: the file is cut off.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a checkpoint is a .safetensors or .pth file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for _ in range(2):  # a Lightning-like file nests twice at most
        inner = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), None)
        content = content if inner is None else inner
    weights = {_unwrapped(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    weights.pop("n_averaged", None)
    if not weights:
        raise InputError(f"{path}: no weights in it; expected tensors by name, at the top or under {', '.join(NESTED)}")
    return weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Fill all of ``module`` with ``weights`` read from ``path``.

    Raises:
        InputError: names or shapes are not those of the module; the message says which, and what is likely wrong.
    """
    wanted = module.state_dict()
    shapes = {n: (tuple(weights[n].shape), tuple(w.shape)) for n, w in wanted.items() if n in weights}
    wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    faults = [
        _fault("of another shape", [f"{n} is {_text(got)}, not {_text(want)}" for n, (got, want) in wrong.items()]),
        _fault("missing", missing),
        _fault("not part of the model", unknown),
    ]
    faults = [fault for fault in faults if fault]
    if faults:
        raise InputError(f"{path} does not fit the model: {'; '.join(faults)}. {_cause(wrong, missing, unknown)}")
    module.load_state_dict(dict(weights))


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise DamagedFile(f"{path}: cut off or not a safetensors file ({error}); copy or download it again") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        # trainers keep their command line in the file; a Namespace runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only" not in str(error) or "Unsupported operand" in str(error):
            raise _cut_off(path, error) from error
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = culprit.group(1) if culprit else "Python objects"
        raise InputError(
            f"{path}: holds {what} besides tensors, which is not read since it could run code; "
            "save the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # whatever an unpickler meets in the bytes of a damaged file
        raise _cut_off(path, error) from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a dictionary of weights by name")
    return dict(content)


def _cut_off(path: Path, error: Exception) -> DamagedFile:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return DamagedFile(f"{path}: cut off or not a PyTorch file ({reason}); copy or download it again")


def _unwrapped(name: str) -> str:
    while True:
        shorter = name
        for prefix in WRAPPERS:
            shorter = shorter.removeprefix(prefix)
        if shorter == name:
            return name
        name = shorter


def _fault(what: str, names: list[str]) -> str:
    """'3 weights missing (a, b, ...)', or nothing."""
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} {what} ({shown})"


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _cause(wrong: Mapping[str, Any], missing: list[str], unknown: list[str]) -> str:
    """The likeliest reason, as advice."""
    heads = [name for name in wrong if name.startswith(("head.", "head_dist."))]
    if wrong and len(heads) == len(wrong):
        return f"The checkpoint has {wrong[heads[0]][0][0]} classes: set num_classes to that"
    if missing and not wrong and all(name.startswith(("head.", "head_dist.")) for name in missing):
        return "The checkpoint has no classifier: set num_classes to 0"
    if unknown and not wrong and all(name.startswith(("head.", "head_dist.")) for name in unknown):
        return "The checkpoint has a classifier: set num_classes to its rows, or to None for timm's default"
    if "patch_embed.proj.weight" in wrong and len(wrong) == 1:
        return (
            f"The checkpoint is of images with {wrong['patch_embed.proj.weight'][0][1]} channels: set in_chans to that"
        )
    numbers = {name.split(".")[1] for name in missing + unknown if name.startswith("blocks.")}
    if numbers and not wrong:
        return f"The checkpoint has another depth, from block {min(numbers, key=int)} on: set depth, or name its model"
    return "It is of another architecture: name the one that it was trained as, with its model arguments"
