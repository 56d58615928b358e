"""From a file to a ``Profile``: what it extends, what ``--set`` overrides, and the shipped profiles."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from vitprune.errors import InputError

from ..processor import favours_openvino
from . import checks
from .explain import Readable, filled, in_order, path_keys, rule_errors, type_errors
from .schema import Profile
from .tree import Tree, parse, read, show

SHIPPED = (Path(__file__).parent.parent / "profiles").resolve()  # in a checkout a link to profiles/ at its root
X86 = "devices/x86"  # stands for one of the next two, by what the machine has that loads the profile
X86_BF16, X86_CPU = "devices/x86-bf16", "devices/x86-cpu"
_MAX_FILES = 50
_MAY_BE_FOLDERS = {"source", "root"}  # of images; all other paths are files


class Listed(NamedTuple):
    """A shipped profile.

    Attributes:
        name: what ``extends`` and the command take.
        path: its file.
        is_device: it states facts about a device, to be extended.
        description: a sentence about it.
    """

    name: str
    path: Path
    is_device: bool
    description: str


def load_profile(path: str | Path, overrides: Sequence[str] = (), *, files_exist: bool = False) -> Profile:
    """The profile in the file ``path``, or the shipped one of that name, with ``overrides`` such as 'seed=1'.

    Paths in it come out absolute. With ``files_exist`` each must lead to something.

    Raises:
        InputError: all that is wrong, one line for each problem: 'file:line: key: problem, got value'.
    """
    tree, devices = _read(path, overrides)
    if devices:
        named = tree.inside("device")
        host = named.inside("host") if named else None
        chosen = devices.get(host.value) if host and isinstance(host.value, str) else None
        if chosen is None:
            names = ", ".join(devices)
            raise InputError(f"{tree.place}: devices: it is for one of several; choose one with --host: {names}")
        tree = tree.under(chosen)
    return _validated(tree, files_exist)


def load_fleet(path: str | Path, overrides: Sequence[str] = (), *, files_exist: bool = False) -> dict[str, Profile]:
    """A profile for each of ``devices``, by name, in their order; where the file lists none, its own under its name.

    What a device is said to have comes over the rest of the file; where ``overrides`` name one as ``device.host``, it
    is the only one.

    Raises:
        InputError: as ``load_profile``.
    """
    tree, devices = _read(path, overrides)
    if not devices or any(override.startswith("device.host=") for override in overrides):
        one = load_profile(path, overrides, files_exist=files_exist)
        return {one.name: one}
    return {name: _validated(tree.under(entry), files_exist) for name, entry in devices.items()}


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[Tree, dict[str, Tree]]:
    """What the profile says, and what it says of each of several devices."""
    file = _find(str(path), Path()) or Path(path)
    tree = _extended(file, (), [])
    for override in overrides:
        tree = tree.under(_override(override))
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", file.stem).lstrip("._-")[:100]
    tree.value.setdefault("name", Tree(stem or "profile", str(file), file.parent))
    listed = tree.value.pop("devices", None)
    if listed is None or listed.blank:
        return tree, {}
    if not isinstance(listed.value, dict) or not listed.value:
        raise InputError(f"{listed.place}: devices: must be a mapping of names, got {show(listed.plain())}")
    return tree, {name: _device(name, entry, file) for name, entry in listed.value.items()}


def _device(name: str, entry: Tree, file: Path) -> Tree:
    """What stands under ``name`` among the devices of ``file``, a partial profile; ``host`` is for device.host."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"{entry.place}: devices: a name is letters, digits, '.', '_' and '-', got {show(name)}")
    if not isinstance(entry.value, dict):
        raise InputError(f"{entry.place}: devices.{name}: must be keys such as host, got {show(entry.plain())}")
    host = entry.value.pop("host", None)
    if host is not None:
        entry = entry.under(Tree({"device": Tree({"host": host}, host.place, host.folder)}, entry.place, entry.folder))
    return _with_bases(entry, file, (), [file])


def _validated(tree: Tree, files_exist: bool) -> Profile:
    """The profile that a tree says.

    Raises:
        InputError: all that is wrong, one line for each problem.
    """
    missing = rule_errors(tree, list(_make_paths_absolute(tree)))
    plain = filled(Profile, tree.plain())
    try:
        profile = Profile.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        lines = [*type_errors(tree, error), *rule_errors(tree, checks.problems(Readable(Profile, plain)))]
        raise InputError("\n".join(in_order(lines + (missing if files_exist else [])))) from error
    lines = rule_errors(tree, checks.problems(profile)) + (missing if files_exist else [])
    if lines:
        raise InputError("\n".join(in_order(lines)))
    return profile


def list_profiles() -> list[Listed]:
    """The shipped profiles, then the device files."""
    listed = []
    for path in [*sorted(SHIPPED.glob("*.yaml")), *sorted(SHIPPED.glob("devices/*.yaml"))]:
        plain = read(path).plain()
        name = path.relative_to(SHIPPED).with_suffix("").as_posix()
        is_device = name.startswith("devices/")
        described = plain.get("device", {}) if is_device else plain
        listed.append(Listed(name, path, is_device, described.get("description", "")))
    return listed


def _find(name: str, folder: Path) -> Path | None:
    """The file that ``name`` means in ``folder``: itself, with .yaml, or a shipped one."""
    if name == X86:
        name = X86_BF16 if favours_openvino() else X86_CPU
    for place in (folder, SHIPPED):
        for candidate in (name, f"{name}.yaml"):
            # Path.is_file raises on a name that is too long
            if os.path.isfile(place / candidate):  # noqa: PTH113
                return place / candidate
    return None


def _extended(path: Path, chain: tuple[Path, ...], opened: list[Path]) -> Tree:
    """The tree of ``path`` over those that it extends; ``chain`` is what led here."""
    opened.append(path)
    return _with_bases(read(path), path, chain, opened)


def _with_bases(tree: Tree, path: Path, chain: tuple[Path, ...], opened: list[Path]) -> Tree:
    """``tree``, which stands in ``path``, over what it extends."""
    extends = tree.value.pop("extends", None)
    if extends is None or extends.blank:
        return tree
    base = Tree({}, tree.place, tree.folder)
    for item in extends.value if isinstance(extends.value, list) else [extends]:
        where = f"{item.place}: extends:"
        if not isinstance(item.value, str):
            raise InputError(f"{where} must be a file or a list of files, got {show(item.plain())}")
        found = _find(item.value, path.parent)
        if found is None:
            close = get_close_matches(item.value, [shipped.name for shipped in list_profiles()], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{where} there is no such file, got {show(item.value)}{hint}")
        if found.resolve() in {path.resolve(), *chain}:
            raise InputError(f"{where} {show(item.value)} leads back to itself")
        if len(opened) >= _MAX_FILES:
            raise InputError(f"{where} a profile may extend at most {_MAX_FILES} files")
        base = base.under(_extended(found, (*chain, path.resolve()), opened))
    return base.under(tree)


def _override(text: str) -> Tree:
    """The tree of one 'a.b=value'; the value is YAML, paths in it are relative to the working folder."""
    key, equals, value = text.partition("=")
    place = f"--set {key.strip()}"
    names = key.strip().split(".")
    if not equals or not all(names) or not key.isprintable():
        raise InputError(f"--set {show(text)}: must be key=value, such as budget.latency_ms=5")
    tree = parse(value, place, Path.cwd(), lines=False)
    for name in reversed(names):
        tree = Tree({name: tree}, place, Path.cwd(), {name: place})
    return tree


def _make_paths_absolute(tree: Tree) -> Iterator[checks.Problem]:
    """Replaces each path in ``tree``, and yields each that leads to nothing, or to a folder in place of a file."""
    keys = path_keys(Profile)
    for path, node in tree.walk():
        if path not in keys or not isinstance(node.value, str) or not node.value or node.value.startswith("timm:"):
            continue
        given = node.value
        # pathlib's own raise on loops, unknown users and names that are too long
        node.value = os.path.abspath(node.folder / os.path.expanduser(given))  # noqa: PTH100, PTH111
        if not os.path.exists(node.value):  # noqa: PTH110
            yield ".".join(map(str, path)), f"there is no such file or folder, got {show(given)}"
        elif path[-1] not in _MAY_BE_FOLDERS and os.path.isdir(node.value):  # noqa: PTH112
            yield ".".join(map(str, path)), f"must be a file, got the folder {show(given)}"
