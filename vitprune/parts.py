"""The folder is the registry: ``vitprune/tokens/evit.py`` holds the token method named ``evit``.

A part is a file that defines exactly one class derived from the folder's base. Names are known without importing
the file, so a missing optional package hurts only those who ask for that part.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from typing import TypeVar

from .errors import InputError

T = TypeVar("T")


def names(package: str) -> list[str]:
    """Sorted names of the parts in ``package`` (dotted); ``base`` and files that start with ``_`` are no parts.

    Imports the package itself, none of its files.
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in found if module.name != "base" and not module.name.startswith("_"))


def load(package: str, name: str, base: type[T]) -> type[T]:
    """The class derived from ``base`` that the file ``name`` of ``package`` defines.

    Raises:
        InputError: no such file; the message lists those there are.
    """
    known = names(package)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{package} has no {name!r}, it has {', '.join(known)}{hint}")
    module = importlib.import_module(f"{package}.{name}")
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, base) and not inspect.isabstract(c)]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {base.__name__}, found {len(found)}")
    return found[0]
