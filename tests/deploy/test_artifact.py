"""Files that are whole or absent, and the manifest that notices when one is not what it was."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitprune.errors import DamagedFile, InputError, MissingError
from vitprune_deploy.artifact import Manifest, hash_files, verify
from vitprune_deploy.files import atomic_path, canonical_sha256, copy_atomic, sha256_file, sweep, write_atomic

FIGURES = {"params": 10, "macs": 20, "top1": 90.5, "latency_ms": {"p50": 1.5, "p90": 2.0, "p99": None, "samples": 500}}
PLAIN = {
    "schema": 1,
    "verdict": "pass",
    "reasons": [],
    "device": {"cpu": "x"},
    "versions": {"vitprune": "0.1.0"},
    "dense": FIGURES,
    "pruned": FIGURES | {"predicted_latency_ms": 1.4},
    "budget": {"latency_ms": 1.6, "percentile": 50, "batch": 8, "image_size": [30, 30]},
    "parity": {"max_abs": 1e-6, "top1_agreement": 1.0},
    "engines": [{"runtime": "onnxruntime", "precision": "fp32", "status": "run"}],
}


@pytest.fixture
def artefact(tmp_path) -> Path:
    """A folder of two files and their manifest."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"weights" * 1000)
    (tmp_path / "engine" / "e.plan").write_bytes(b"plan")
    Manifest.model_validate(PLAIN | {"files": hash_files(tmp_path, ["model.onnx", "engine/e.plan"])}).write(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    plain = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(plain | changes))


def test_sums_are_those_of_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "a") == expected


def test_equal_data_has_an_equal_sum_whatever_the_order_of_its_keys():
    assert canonical_sha256({"a": [1, 2.5, None], "b": {"c": True}}) == canonical_sha256(
        {"b": {"c": True}, "a": (1, 2.5, None)}
    )
    assert canonical_sha256({"a": 1}) != canonical_sha256({"a": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_sha256([float("nan")])


def test_a_manifest_says_none_of_what_was_not_found(tmp_path):
    few = {"latency_ms": {"p50": None, "samples": 3}, "top1": None}
    unknown = {"dense": FIGURES | few, "pruned": FIGURES | few, "parity": {"max_abs": 0.0, "top1_agreement": None}}
    Manifest.model_validate(PLAIN | unknown | {"files": {}}).write(tmp_path)
    found = Manifest.load(tmp_path)
    assert (found.pruned.latency_ms.p50, found.parity.top1_agreement) == (None, None)


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    write_atomic(tmp_path / "sub" / "a.txt", "old")
    write_atomic(tmp_path / "sub" / "a.txt", b"new")
    copy_atomic(tmp_path / "sub" / "a.txt", tmp_path / "sub" / "b.txt")
    assert {p.name: p.read_text() for p in (tmp_path / "sub").iterdir()} == {"a.txt": "new", "b.txt": "new"}
    assert (tmp_path / "sub" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half" * 10_000 + "\ud800", encoding="utf-8")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(tmp_path):
    child = f"""
import resource
from pathlib import Path
from vitprune_deploy.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the kernel refuses to write more
try:
    write_atomic(Path({str(tmp_path)!r}) / "a", b"x" * 5000)
except Exception as error:
    print(type(error).__name__, error)
"""
    path = os.pathsep.join(["deploy", "."])
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout == (
        f"MissingError no room left on the disk of {tmp_path}; free some and run the same command again\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_room_that_runs_out_only_when_the_disk_is_flushed_is_noticed(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)  # where file systems that allocate late report it
    with pytest.raises(MissingError, match="no room left"):
        write_atomic(tmp_path / "a", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_full_disk_that_a_library_reports_in_its_own_words_is_noticed(tmp_path):
    with pytest.raises(MissingError, match="no room left"), atomic_path(tmp_path / "a"):
        raise RuntimeError("Error serializing: No space left on device (os error 28)")


def test_a_folder_that_is_a_file_is_the_users_to_change(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match=r"out cannot be written to .*; choose another folder"):
        write_atomic(tmp_path / "out" / "a", "x")


def test_errors_about_other_files_pass_as_they_are(tmp_path):
    with pytest.raises(NotADirectoryError), atomic_path(tmp_path / "out" / "a"):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", "/elsewhere/images")


def test_what_a_killed_run_left_is_swept(tmp_path):
    (tmp_path / ".tmp-x").write_text("half")
    (tmp_path / ".tmp-y").mkdir()
    (tmp_path / ".tmp-y" / "z").write_text("half")
    (tmp_path / "a").write_text("whole")
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_manifest_comes_back_as_it_was_written(artefact):
    manifest = verify(artefact)
    assert manifest.pruned.predicted_latency_ms == 1.4
    assert manifest.dense.latency_ms.p99 is None
    assert manifest.file(artefact, "engine/e.plan") == artefact / "engine" / "e.plan"
    plain = json.loads((artefact / "manifest.json").read_text())
    assert {key: plain[key] for key in ("schema", "verdict", "budget", "engines")} == {
        key: PLAIN[key] for key in ("schema", "verdict", "budget", "engines")
    }


def test_keys_that_a_later_version_adds_are_kept(artefact):
    edit(artefact, notes=["x"])
    manifest = Manifest.load(artefact)
    manifest.write(artefact)
    assert json.loads((artefact / "manifest.json").read_text())["notes"] == ["x"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "model.onnx").write_bytes(b"weights" * 999), "model.onnx is cut off or changed"),
        (lambda f: (f / "model.onnx").write_bytes(b"weighty" * 1000), "model.onnx is cut off or changed"),
        (lambda f: (f / "engine" / "e.plan").unlink(), "e.plan is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing: the build did not finish"),
        (lambda f: (f / "manifest.json").write_text('{"schema": 1, "ver'), "manifest.json is cut off or no JSON"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is cut off or no JSON"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is cut off or no JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged at its start"),
        (lambda f: edit(f, verdict="good"), "manifest.json is damaged at verdict"),
        (lambda f: edit(f, parity={"max_abs": float("nan"), "top1_agreement": 1}), "damaged at parity.max_abs"),
        (lambda f: edit(f, files={"../x": "0"}), "which lies outside"),
    ],
    ids=range(11),
)
def test_damage_is_noticed_and_the_file_named(artefact, damage, sentence):
    damage(artefact)
    with pytest.raises(DamagedFile) as caught:
        verify(artefact)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_are_none_and_manifests_from_the_future_are_input_errors(artefact, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "nowhere")
    edit(artefact, schema=2)
    with pytest.raises(InputError, match="is of schema 2, this vitprune reads up to 1: update it"):
        verify(artefact)


def test_a_file_that_the_manifest_does_not_name_is_refused(artefact):
    with pytest.raises(DamagedFile, match=r"names no model\.bin"):
        Manifest.load(artefact).file(artefact, "model.bin")
