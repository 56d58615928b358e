"""Where on this machine is kept what outlives a build: what can be made again, and what the user has set."""

from __future__ import annotations

import os
from pathlib import Path

from vitprune.errors import InputError


def cache_dir() -> Path | None:
    """VITPRUNE_CACHE_DIR, else vitprune in XDG_CACHE_HOME, else ~/.cache/vitprune; None for a user without a home."""
    return _folder("VITPRUNE_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def config_dir() -> Path:
    """VITPRUNE_CONFIG_DIR, else vitprune in XDG_CONFIG_HOME, else ~/.config/vitprune.

    Raises:
        InputError: the user has no home, and none of these is set.
    """
    found = _folder("VITPRUNE_CONFIG_DIR", "XDG_CONFIG_HOME", ".config")
    if found is None:
        raise InputError("this user has no home for settings; set VITPRUNE_CONFIG_DIR to a folder for them")
    return found


def _folder(own: str, shared: str, in_home: str) -> Path | None:
    if os.environ.get(own):
        return Path(os.environ[own]).absolute()
    if os.path.isabs(os.environ.get(shared, "")):  # noqa: PTH117  its specification has relative ones ignored
        return Path(os.environ[shared]) / "vitprune"
    try:
        return Path.home() / in_home / "vitprune"
    except RuntimeError:
        return None
