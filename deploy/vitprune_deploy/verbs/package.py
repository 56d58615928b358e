"""An output folder in the form that a server takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitprune.errors import InputError

from ..triton import Written, write_repository
from .answer import Answer, table

KINDS = ("triton",)


def package(
    kind: str,
    folders: Sequence[Path],
    output: Path | None,
    *,
    name: str | None,
    runtime: str | None,
    queue_delay_us: int,
) -> Answer:
    """A model in the repository ``output``, by default the folder ``triton`` in the first of ``folders``.

    Raises:
        InputError: ``kind`` is not known, or as ``write_repository``.
        DamagedFile, MissingError, ImportError: as ``write_repository``.
    """
    if kind not in KINDS:
        raise InputError(f"package makes {', '.join(KINDS)}, got {kind!r}")
    repository = output or folders[0] / "triton"
    written = write_repository(folders, repository, name=name, runtime=runtime, queue_delay_us=queue_delay_us)
    data = {
        "repository": str(repository),
        "model": written.config["name"],
        "folder": str(written.folder),
        "backend": written.config["backend"],
        "max_batch_size": written.config["max_batch_size"],
        "files": written.files,
    }
    return Answer(_text(written, repository), data)


def _text(written: Written, repository: Path) -> str:
    config = written.config
    rows = [["model", config["name"]], ["backend", config["backend"]], ["batches", _batches(written)]]
    rows += [["engine", str(engine.files[0])] for engine in written.engines]
    files = [str(written.folder / name) for name in written.files]
    served = f"tritonserver --model-repository={repository.resolve()}"  # which takes absolute paths alone
    return "\n".join([*files, "", table(rows), "", f"to serve it: {served}"])


def _batches(written: Written) -> str:
    """What Triton does about batches, and if it is nothing, why."""
    largest, (least, most) = written.config["max_batch_size"], written.engines[0].batch
    if largest > 1:
        return f"Triton puts requests together, up to {largest} images"
    images = f"{least} image{'s' * (least > 1)}" if least == most else f"{least} to {most} images"
    return f"none are formed, the engine takes {images}; to have them, build with input.batch from 1 upwards"
