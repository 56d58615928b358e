"""Who may import whom: the floors of the design, held by walking the imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [p for top in ("vitprune", "deploy/vitprune_deploy") for p in (ROOT / top).rglob("*.py")]

# Lowest floor first; a module belongs to the longest prefix that fits it.
FLOORS = [
    ["vitprune.errors", "vitprune.parts", "vitprune.plan", "vitprune"],
    ["vitprune.model"],
    ["vitprune.statistics"],
    ["vitprune.tokens", "vitprune.criteria", "vitprune.structure", "vitprune.weights"],
    [
        "vitprune.gradual",
        "vitprune.macs",
        "vitprune.objectives",
        "vitprune.official",
        "vitprune.schedules",
        "vitprune.sparsify",
        "vitprune.surgery",
    ],
    ["vitprune.recover"],
    ["vitprune.search"],
    ["vitprune_deploy", "vitprune_deploy.profile", "vitprune_deploy.artifact", "vitprune_deploy.data"],
    ["vitprune_deploy.backends"],
    ["vitprune_deploy.export"],
    ["vitprune_deploy.latency"],
    ["vitprune_deploy.remote"],
    ["vitprune_deploy.runtime", "vitprune_deploy.validate"],
    ["vitprune_deploy.triton"],
    ["vitprune_deploy.report"],
    ["vitprune_deploy.build"],
    ["vitprune_deploy.verbs"],
    ["vitprune_deploy.cli"],
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

LIGHT = ["profile", "artifact", "data", "runtime", "triton", "cli", "backends.base", "backends.onnxruntime",
         "backends.tensorrt", "remote.connection", "remote.registry"]  # fmt: skip
HEAVY = ["torch", "timm", "onnx", "onnxscript", "safetensors", "jinja2", "accelerate", "scipy", "matplotlib",
         "asyncssh"]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "deploy" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(name: str) -> int:
    while name not in FLOOR_OF:
        name = name.rpartition(".")[0]
    return FLOOR_OF[name]


def package_of(path: Path) -> str:
    return module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]


def imported(path: Path) -> set[str]:
    """Our own modules that ``path`` imports anywhere, by full name."""
    known = {module_name(p) for p in SOURCES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path).split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            found |= {full if (full := f"{target}.{alias.name}") in known else target for alias in node.names}
    return found & known


def test_every_module_imports_only_from_lower_floors_or_its_own_folder():
    strays = [
        f"{module_name(path)} (floor {floor(module_name(path))}) imports {name} (floor {floor(name)})"
        for path in SOURCES
        for name in imported(path)
        if floor(name) > floor(module_name(path))
    ]
    assert not strays, "\n".join(strays)


def test_the_library_knows_nothing_of_deployment():
    library = [path for path in SOURCES if path.is_relative_to(ROOT / "vitprune")]
    strays = [f"{module_name(p)} imports {n}" for p in library for n in imported(p) if n.startswith("vitprune_deploy")]
    assert not strays, "\n".join(strays)


@pytest.mark.parametrize("module", LIGHT)
def test_what_a_device_runs_imports_nothing_heavy(module):
    code = f"import sys, vitprune_deploy.{module}; print(*(n for n in {HEAVY} if n in sys.modules))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "deploy")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
