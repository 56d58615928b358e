"""Where on this machine is kept what outlives a build."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path | None:
    """VITPRUNE_CACHE_DIR, else vitprune in XDG_CACHE_HOME, else ~/.cache/vitprune; None for a user without a home."""
    own = os.environ.get("VITPRUNE_CACHE_DIR")
    if own:
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # noqa: PTH117  its specification has relative ones ignored
        return Path(shared) / "vitprune"
    try:
        return Path.home() / ".cache" / "vitprune"
    except RuntimeError:
        return None
