"""What a file or folder is: an output folder, an ONNX file, or an engine with its sidecar."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from vitprune.errors import DamagedFile, InputError

from ..artifact import MANIFEST, Manifest
from ..backends.tensorrt import read_sidecar
from . import fusion, soundness
from .answer import Answer, table
from .figures import account, block_counts, block_rows

MOST_TEXT = 60  # characters of a metadata value that are shown to a person


def inspect(path: Path) -> Answer:
    """What ``path`` holds; code 2 for a folder with damaged files.

    Raises:
        InputError: there is nothing there, or nothing that is known here.
        DamagedFile: it is cut off.
        ImportError: onnx is not installed, and the file is an ONNX file.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file or folder")
    if path.name == MANIFEST:
        return _folder(path.parent)
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix in (".plan", ".engine"):
        return _engine(path)
    raise InputError(f"{path}: inspect knows output folders, .onnx files and .plan files")


def _folder(folder: Path) -> Answer:
    manifest = Manifest.load(folder)
    damaged = _damaged(manifest, folder)
    parts, data = [account(manifest, folder)], manifest.model_dump(mode="json", by_alias=True)
    data["damaged"], config = damaged, None
    if "model.json" in manifest.files and not any("model.json" in line for line in damaged):
        config = json.loads((folder / "model.json").read_bytes())
        data["blocks"] = block_counts(config)
        parts.append(block_rows(data["blocks"], "kept"))
    whole = "profile.yaml" in manifest.files and not any("profile.yaml" in line for line in damaged)
    profile = yaml.safe_load((folder / "profile.yaml").read_bytes()) if whole else {}
    told, data["warnings"] = fusion.of_folder(data, config, profile)
    parts += told
    if "consistency" in data:
        parts.append(soundness.consistency_text({"consistency, when built": data["consistency"]}))
    engines = [[e.runtime, e.precision, e.status, (e.model_extra or {}).get("file", "")] for e in manifest.engines]
    parts.append(table(engines, head=["engine", "precision", "status", "file"]))
    parts.append("\n".join(damaged) or f"all {len(manifest.files)} files are what the manifest says")
    return Answer("\n\n".join(parts), data, 2 if damaged else 0)


def _damaged(manifest: Manifest, folder: Path) -> list[str]:
    """A sentence for each file that is not what the manifest says."""
    found = []
    for name in manifest.files:
        try:
            manifest.file(folder, name)
        except DamagedFile as error:
            found.append(str(error))
    return found


def _onnx(path: Path) -> Answer:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise DamagedFile(f"{path} is cut off or no ONNX file") from error
    if not model.opset_import:  # an empty file parses too
        raise DamagedFile(f"{path} is cut off or no ONNX file")
    graph = model.graph
    census = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node)
    beside = [file for file in path.parent.glob(f"{path.name}.data*") if file.is_file()]
    data = {
        "opsets": {item.domain or "ai.onnx": item.version for item in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [_tensor(value) for value in graph.input],
        "outputs": [_tensor(value) for value in graph.output],
        "nodes": dict(census.most_common()),
        "size_bytes": sum(file.stat().st_size for file in [path, *beside]),
        "metadata": {item.key: item.value for item in model.metadata_props},
        "fusion": fusion.of_file(path, model),
    }
    return Answer(_onnx_text(data), data)


def _tensor(value: Any) -> dict[str, Any]:
    from onnx import TensorProto

    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim]
    return {"name": value.name, "type": TensorProto.DataType.Name(kind.elem_type).lower(), "shape": shape}


def _onnx_text(data: dict[str, Any]) -> str:
    ends = [
        [way, one["name"], f"{one['type']} [{', '.join(map(str, one['shape']))}]"]
        for way, found in (("input", data["inputs"]), ("output", data["outputs"]))
        for one in found
    ]
    opsets = ", ".join(f"{name} {version}" for name, version in data["opsets"].items())
    facts = [["opset", opsets], ["size", f"{data['size_bytes'] / 1e6:.3f} MB"], ["written by", data["producer"]]]
    facts += [[key, _short(value)] for key, value in data["metadata"].items()]
    nodes = [[count, name] for name, count in data["nodes"].items()]
    counted = table([*nodes, [sum(data["nodes"].values()), "nodes"]], right=[0])
    return "\n\n".join([table(ends), table(facts), counted, *fusion.file_text(data["fusion"])])


def _engine(path: Path) -> Answer:
    sidecar = read_sidecar(path)
    facts = [[key, _short(value if isinstance(value, str) else json.dumps(value))] for key, value in sidecar.items()]
    return Answer(table(facts), sidecar)


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= MOST_TEXT else one_line[: MOST_TEXT - 3] + "..."
