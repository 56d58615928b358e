"""The manifest of an output folder: what it holds, how it was judged, and the SHA-256 of every file.

The sums show damage; they say nothing about who made a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitprune.errors import DamagedFile, InputError

from .files import sha256_file, write_atomic

SCHEMA = 1
MANIFEST = "manifest.json"
_REBUILD = "run the build again, it renews what is damaged"


class _Part(BaseModel):
    """A part of the manifest; keys that a later version adds are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Latency(_Part):
    """Milliseconds for one batch; a percentile without enough samples behind it is None."""

    p50: float | None
    p90: float | None = None
    p99: float | None = None
    samples: int


class Figures(_Part):
    """What one model is and does: ``dense`` is the user's, in the runtime and precision of the product.

    Attributes:
        params: number of weights.
        macs: multiply-accumulates for one image.
        top1: percent of the test images, None without labels.
        predicted_latency_ms: what the search expected.
    """

    params: int
    macs: int
    top1: float | None
    latency_ms: Latency
    predicted_latency_ms: float | None = None


class BudgetFigures(_Part):
    """The budget as resolved to milliseconds."""

    latency_ms: float
    percentile: int
    batch: int
    image_size: tuple[int, int]


class Parity(_Part):
    """How far engine and torch are apart; ``top1_agreement`` in percent, None for a model without a classifier."""

    max_abs: float
    top1_agreement: float | None


class EngineEntry(_Part):
    """An engine, built or also run here."""

    runtime: str
    precision: str
    status: Literal["built", "run"]


class Manifest(_Part):
    """What an output folder holds, and how it was judged; ``weights``: of those that are zero, as the build says it."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    verdict: Literal["pass", "fail", "unstable"]
    reasons: tuple[str, ...]
    device: dict[str, Any]
    versions: dict[str, str]
    dense: Figures
    pruned: Figures
    budget: BudgetFigures
    parity: Parity
    engines: tuple[EngineEntry, ...]
    files: dict[str, str]
    weights: dict[str, Any] | None = None
    files_note: str = "the sums show damage; they do not show who made a file"

    def write(self, folder: Path) -> None:
        """Write it to ``folder``, whole or not at all. Raises as ``atomic_path`` does."""
        plain = self.model_dump(mode="json", by_alias=True)
        write_atomic(folder / MANIFEST, json.dumps(plain, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of ``folder``; its files are not looked at.

        Raises:
            InputError: no such folder, or a newer version wrote it.
            DamagedFile: there is none, or it is cut off.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
        if not path.is_file():
            raise DamagedFile(f"{path} is missing: the build did not finish; run the same command again")
        try:
            plain = json.loads(path.read_bytes())
            if isinstance(plain, dict) and isinstance(plain.get("schema"), int) and plain["schema"] > SCHEMA:
                raise InputError(
                    f"{path} is of schema {plain['schema']}, this vitprune reads up to {SCHEMA}: update it"
                )
            return cls.model_validate(plain)
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise DamagedFile(f"{path} is damaged at {key or 'its start'}; {_REBUILD}") from error
        except (ValueError, RecursionError) as error:
            raise DamagedFile(f"{path} is cut off or no JSON; {_REBUILD}") from error

    def file(self, folder: Path, name: str) -> Path:
        """The file ``name`` of ``folder``, which is what the manifest says.

        Raises:
            DamagedFile: it is missing, changed, or not named by the manifest.
        """
        if name not in self.files:
            raise DamagedFile(f"{folder / MANIFEST} names no {name}; {_REBUILD}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedFile(f"{folder / MANIFEST} names {name}, which lies outside; it was not made by a build")
        if not (folder / name).is_file():
            raise DamagedFile(f"{folder / name} is missing; {_REBUILD}")
        if sha256_file(folder / name) != self.files[name]:
            raise DamagedFile(f"{folder / name} is cut off or changed since it was built; {_REBUILD}")
        return folder / name


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """``names`` in ``folder`` with their SHA-256, as a manifest lists them."""
    return {name: sha256_file(folder / name) for name in sorted(names)}


def verify(folder: Path) -> Manifest:
    """The manifest of ``folder``, all of whose files are what it says. Raises as ``load`` and ``file`` do."""
    manifest = Manifest.load(folder)
    for name in manifest.files:
        manifest.file(folder, name)
    return manifest
