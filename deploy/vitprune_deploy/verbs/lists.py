"""What is shipped and what a profile may say."""

from __future__ import annotations

import json

from ..profile import json_schema, list_profiles
from .answer import Answer, table


def schema() -> Answer:
    """The JSON schema of a profile, for editors."""
    found = json_schema()
    return Answer(json.dumps(found, indent=1), found)


def profiles() -> Answer:
    """The shipped profiles, and the device files that they build on."""
    found = list_profiles()
    data = [{**one._asdict(), "path": str(one.path)} for one in found]
    parts = []
    for title, is_device in (("profile", False), ("device, for 'extends'", True)):
        rows = [[one.name, one.description] for one in found if one.is_device == is_device]
        parts.append(table(rows, head=[title, "description"]))
    return Answer("\n\n".join(parts), data)
