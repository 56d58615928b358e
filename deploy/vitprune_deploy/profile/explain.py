"""From pydantic's errors and the rules' findings to lines with file, line, key, value and what would be right."""

from __future__ import annotations

import functools
import json
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from .checks import Problem, Unknown
from .kinds import ProfilePath
from .schema import Profile
from .tree import Tree, show

Path = tuple[str | int, ...]

_WISHES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large a number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "finite_number": "must be finite",
    "string_too_short": "may not be empty",
    "literal_error": "must be {expected}",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "too_long": "must have {max_length} values",
}


def type_errors(tree: Tree, error: ValidationError) -> list[str]:
    """One line for each key that is unknown, missing, of another type or out of range."""
    found = [(item, *_located(tree, item["loc"])) for item in error.errors(include_url=False)]
    wishes: dict[Path, list[str]] = {}
    for item, path, tags in found:
        missing_key = item["type"] == "missing" and isinstance(item["loc"][-1], str)
        if tags and not missing_key and any(path == other[: len(path)] != other for _, other, _ in found):
            continue  # another branch of the union got further and says what is wrong
        wishes.setdefault((*path, item["loc"][-1]) if missing_key else path, []).append(_wish(path, item))
    return [_line(tree, path, _joined(tree, path, said)) for path, said in wishes.items()]


def rule_errors(tree: Tree, problems: Sequence[Problem]) -> list[str]:
    """One line for each combination that cannot work."""
    return [_line(tree, tuple(key.split(".")), problem) for key, problem in problems]


def in_order(lines: Iterable[str]) -> list[str]:
    """``lines`` without repeats, sorted by file and line; of one line, what is there comes before what is missing."""

    def key(line: str) -> tuple[str, int, bool]:
        place = re.match(r"(.*?):(\d+): ", line)
        return (place[1] if place else line, int(place[2]) if place else 0, line.endswith(" is missing"))

    return sorted(dict.fromkeys(lines), key=key)


def filled(section: type[BaseModel], plain: Any) -> Any:
    """``plain`` with an empty mapping for each section that is given as nothing."""
    if not isinstance(plain, dict):
        return plain
    whole = dict(plain)
    for name, field in section.model_fields.items():
        if name in whole and _is_section(field.annotation):
            whole[name] = filled(field.annotation, {} if whole[name] is None else whole[name])
    return whole


def path_keys(section: type[BaseModel]) -> set[Path]:
    """The keys in ``section`` whose value may be a path."""
    found: set[Path] = set()
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            found |= {(name, *key) for key in path_keys(field.annotation)}
        elif ProfilePath in typing.get_args(field.annotation):
            found.add((name,))
    return found


class Readable:
    """A profile of which some keys are wrong: reading one of those raises ``Unknown``, the others are as ever."""

    def __init__(self, section: type[BaseModel], plain: dict[str, Any]) -> None:
        self._section, self._plain = section, plain

    def __getattr__(self, name: str) -> Any:
        field = self._section.model_fields[name]
        if name not in self._plain:
            if field.is_required():
                raise Unknown
            return field.default
        value = self._plain[name]
        try:
            return _adapter(self._section, name).validate_json(json.dumps(value))
        except ValidationError:
            if _is_section(field.annotation) and isinstance(value, dict):
                return Readable(field.annotation, value)
            raise Unknown from None


@functools.cache
def _adapter(section: type[BaseModel], name: str) -> TypeAdapter[Any]:
    field = section.model_fields[name]
    kind: Any = field.annotation
    for metadata in field.metadata:
        kind = Annotated[kind, metadata]
    return TypeAdapter(kind, config=None if _is_section(field.annotation) else section.model_config)


def _is_section(annotation: Any) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _located(tree: Tree, loc: Path) -> tuple[Path, Path]:
    """What of ``loc`` are keys and indices of the tree, and what is not: branches of unions, and a missing key."""
    path: list[str | int] = []
    tags: list[str | int] = []
    for name in loc:
        inner = tree.inside(name)
        (tags if inner is None else path).append(name)
        tree = inner or tree
    return tuple(path), tuple(tags)


def _locate(tree: Tree, path: Path) -> tuple[Tree, str, int]:
    """As far as ``path`` leads in ``tree``: what stands there, its place, and how many steps that is."""
    place = tree.place
    for depth, name in enumerate(path):
        inner = tree.inside(name)
        if inner is None:
            return tree, place, depth
        place, tree = tree.key_places.get(str(name), inner.place), inner
    return tree, place, len(path)


def _line(tree: Tree, path: Path, problem: str) -> str:
    """The line for ``problem``; its place is that of the key, or of the nearest mapping around it."""
    key = ".".join(map(str, path)) or "the profile"
    place = _locate(tree, path)[1]
    return f"--set {key}: {problem}" if place.startswith("--set ") else f"{place}: {key}: {problem}"


def _wish(path: Path, found: Any) -> str:
    kind = found["type"]
    if kind == "missing":
        return "is missing" if isinstance(found["loc"][-1], str) else "must have more values"
    if kind == "extra_forbidden":
        return f"is no key of a profile{_nearest(path)}"
    if kind == "value_error":
        return str(found["ctx"]["error"])
    if kind in _WISHES:
        return _WISHES[kind].format(**found.get("ctx", {}))
    return str(found["msg"])


def _joined(tree: Tree, path: Path, wishes: list[str]) -> str:
    """The wishes of one key's alternatives as one, with the value that is there."""
    first, *others = dict.fromkeys(wishes)
    problem = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    node, _, depth = _locate(tree, path)
    if depth < len(path) or ", got " in problem or "is no key" in problem:
        return problem
    return f"{problem}, got {show(node.plain())}"


def _nearest(path: Path) -> str:
    """A hint at the key that may have been meant: one of the same section, or one of that name elsewhere."""
    *above, name = map(str, path)
    siblings = [key for key in _all_keys(Profile) if key[:-1] == tuple(above)]
    close = get_close_matches(name, [key[-1] for key in siblings], n=1)
    if close:
        return f"; did you mean {'.'.join([*above, close[0]])}?"
    elsewhere = {key[-1]: key for key in reversed(list(_all_keys(Profile)))}
    close = get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    if close:
        return f"; did you mean {'.'.join(elsewhere[close[0]])}?"
    return f"; known here: {', '.join(key[-1] for key in siblings)}" if siblings else ""


def _all_keys(section: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (name,)
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if _is_section(kind):
                yield from ((name, *key) for key in _all_keys(kind))
