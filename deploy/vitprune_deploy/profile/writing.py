"""Profiles as text: the commented one of ``init`` and the JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from .schema import Profile


def json_schema() -> dict[str, Any]:
    """The JSON schema of a profile file, for editors."""
    schema = Profile.model_json_schema()
    texts = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    extends = texts | {"description": "files whose keys this one builds on, such as devices/orin-nx"}
    devices = {
        "type": "object",
        "additionalProperties": {"type": "object"},
        "description": "several devices to build for, by name: of each its host, what it extends, and keys of its own",
    }
    schema["properties"] = {"extends": extends, "devices": devices} | schema["properties"]
    del schema["required"]  # what a file lacks may come from one that it extends
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def commented_yaml(values: Mapping[str, Any]) -> str:
    """A profile that sets ``values`` (nested) and shows all other keys, commented out, with their defaults.

    A text ``extends`` in ``values`` comes first.
    """
    lines = []
    if "extends" in values:
        lines += ["# files whose keys this one builds on", _entry("extends", values["extends"]), ""]
    lines += _section(Profile, values, 0)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: type[BaseModel], values: Mapping[str, Any], level: int) -> Iterator[str]:
    indent = "  " * level
    for name, field in section.model_fields.items():
        kind = field.annotation
        given = values.get(name)
        yield f"{indent}# {field.description}"
        if isinstance(kind, type) and issubclass(kind, BaseModel) and (given is None or isinstance(given, Mapping)):
            yield f"{indent}{name}:"
            yield from _section(kind, given or {}, level + 1)
        elif name in values:
            yield indent + _entry(name, given)
        else:
            yield f"{indent}# {_entry(name, None if field.is_required() else field.default)}"
        if level == 0:
            yield ""


def _entry(name: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=True)
    return f"{name}: {text.strip().removesuffix('...').strip()}"
