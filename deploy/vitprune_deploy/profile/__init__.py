"""The YAML profile of a build: its schema, and how it is read, checked and written."""

from __future__ import annotations

from .checks import patch_size
from .loading import Listed, list_profiles, load_fleet, load_profile
from .schema import Profile
from .writing import commented_yaml, json_schema

__all__ = [
    "Listed",
    "Profile",
    "commented_yaml",
    "json_schema",
    "list_profiles",
    "load_fleet",
    "load_profile",
    "patch_size",
]
