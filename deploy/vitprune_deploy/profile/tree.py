"""YAML as a tree whose every value knows the file and line it came from, so that errors can name them.

Nothing but text, numbers, booleans, null, lists and mappings comes out. Files that are huge, deeply nested or that
multiply through aliases are refused before they cost anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vitprune.errors import InputError

MAX_BYTES = 262_144  # a profile has a hundred lines; PyYAML takes seconds per megabyte
MAX_DEPTH = 30
MAX_VALUES = 20_000

_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.2 numbers such as 1e-3, text to PyYAML


@dataclass
class Tree:
    """A value of a profile and where it stands.

    Attributes:
        value: text, number, boolean or None; for a list or mapping the trees inside it.
        place: 'file:line', or '--set key'.
        folder: what paths in it are relative to.
        key_places: places of the keys of a mapping.
        blank: the value is nothing at all, as behind 'budget:' with an empty line; an explicit null is not.
    """

    value: Any
    place: str
    folder: Path
    key_places: dict[str, str] = field(default_factory=dict)
    blank: bool = False

    def plain(self) -> Any:
        """The value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: tree.plain() for key, tree in self.value.items()}
        if isinstance(self.value, list):
            return [tree.plain() for tree in self.value]
        return self.value

    def inside(self, name: str | int) -> Tree | None:
        """What this mapping or list holds under ``name``; None where it holds nothing of the kind."""
        if isinstance(self.value, dict):
            return self.value.get(name)
        if isinstance(self.value, list) and isinstance(name, int) and 0 <= name < len(self.value):
            inner: Tree = self.value[name]
            return inner
        return None

    def walk(self, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Tree]]:
        """This tree and all inside it, each with its path of keys and indices."""
        yield path, self
        if isinstance(self.value, dict):
            for key, tree in self.value.items():
                yield from tree.walk((*path, key))
        elif isinstance(self.value, list):
            for index, tree in enumerate(self.value):
                yield from tree.walk((*path, index))

    def under(self, other: Tree) -> Tree:
        """``other`` with what this tree lacks filled in from this one: mappings key by key, all else whole."""
        if other.blank and isinstance(self.value, dict):
            return self
        if not (isinstance(self.value, dict) and isinstance(other.value, dict)):
            return other
        both = dict(self.value)
        for key, tree in other.value.items():
            both[key] = both[key].under(tree) if key in both else tree
        return Tree(both, other.place, other.folder, self.key_places | other.key_places)


def read(path: Path) -> Tree:
    """The mapping in the YAML file ``path``.

    Raises:
        InputError: the file cannot be read, is no YAML, no mapping, or too large; one line for each problem.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: a profile has at most {MAX_BYTES // 1024} KiB, got {size // 1024} KiB")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a profile is UTF-8 text, byte {error.start} is not") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: a profile is a file, this is a folder") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; 'vitprune-deploy profiles' lists what is shipped") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    tree = parse(text, str(path), path.parent)
    if not isinstance(tree.value, dict):
        raise InputError(f"{tree.place}: a profile is a mapping of keys to values, got {show(tree.plain())}")
    return tree


def parse(text: str, name: str, folder: Path, lines: bool = True) -> Tree:
    """The YAML ``text``; places are ``name:line``, or only ``name`` where the text has no lines of its own.

    Raises:
        InputError: the text is no YAML, has repeated keys, or is too large.
    """
    try:
        _check_depth(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(_syntax_error(error, name, lines)) from error
    except (ValueError, OverflowError) as error:  # PyYAML on an escape such as "\UFFFFFFFF"
        raise InputError(f"{name}: is no YAML: {error}") from error
    if node is None:
        return Tree(None, f"{name}:1" if lines else name, folder, blank=True)
    return _Builder(name, folder, lines).build(node)


def show(value: object) -> str:
    """``value`` as it may stand at the end of an error, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    try:
        text = str(value) if isinstance(value, str) else repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    text = "".join(c if c.isprintable() else " " for c in text)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"'{text}'" if isinstance(value, str) else text


def _check_depth(text: str, name: str) -> None:
    """Event by event, since composing recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1
            raise InputError(f"{name}:{line}: a profile nests at most {MAX_DEPTH} levels deep")


def _syntax_error(error: yaml.YAMLError, name: str, lines: bool) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    place = f"{name}:{mark.line + 1}" if mark and lines else name
    return f"{place}: is no YAML: {' '.join(str(problem).split())}"


class _Builder:
    """Turns YAML nodes into trees, and collects what is wrong with them."""

    def __init__(self, name: str, folder: Path, lines: bool) -> None:
        self.name, self.folder, self.lines = name, folder, lines
        self.count = 0
        self.errors: list[str] = []

    def build(self, node: yaml.Node) -> Tree:
        tree = self._tree(node, 0)
        if self.errors:
            raise InputError("\n".join(self.errors))
        return tree

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines else self.name

    def _tree(self, node: yaml.Node, depth: int) -> Tree:
        self.count += 1
        place = self._place(node)
        if self.count > MAX_VALUES or depth > MAX_DEPTH:  # aliases make a small file a large tree, or an endless one
            raise InputError(f"{place}: a profile holds at most {MAX_VALUES} values, {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.SequenceNode):
            return Tree([self._tree(item, depth + 1) for item in node.value], place, self.folder)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        return Tree(self._scalar(node), place, self.folder, blank=node.value == "" and node.style is None)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> Tree:
        tree = Tree({}, self._place(node), self.folder)
        for key, value in node.value:
            place = self._place(key)
            if not isinstance(key, yaml.ScalarNode):
                self.errors.append(f"{place}: a key is text, got a {key.id}")
            elif not key.value.isprintable():
                self.errors.append(f"{place}: a key is printable text, got {show(key.value)}")
            elif key.value in tree.value:
                self.errors.append(f"{place}: {show(key.value)} is given twice, first at {tree.key_places[key.value]}")
            else:
                tree.value[key.value] = self._tree(value, depth + 1)
                tree.key_places[key.value] = place
        return tree

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        """Text stays text unless it looks like a number, a boolean or null; dates stay text."""
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in {"int", "float"} and node.style is None and ":" in node.value:  # 2:4 is text since YAML 1.2
            return node.value
        try:
            if kind in {"int", "float", "bool", "null"}:
                return _finite(yaml.SafeLoader("").construct_object(node))
        except (ValueError, OverflowError, KeyError, IndexError, yaml.YAMLError):
            self.errors.append(f"{self._place(node)}: {show(node.value)} is no {kind} that can be read")
            return None
        if kind not in {"str", "timestamp", "value", "merge"}:
            self.errors.append(f"{self._place(node)}: the tag {show(node.tag)} has no place in a profile")
        if not _is_text(node.value):
            self.errors.append(f"{self._place(node)}: text may not hold control or surrogate characters")
            return None
        if node.style is None and _FLOAT.fullmatch(node.value):
            return _finite(float(node.value))
        return node.value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not finite")
    if isinstance(value, int) and abs(value) > 2**63:
        raise ValueError("beyond 64 bits")
    return value


def _is_text(text: str) -> bool:
    return not any(c in "\x00\x7f" or ord(c) < 9 or 0xD800 <= ord(c) < 0xE000 for c in text)
