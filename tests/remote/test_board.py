"""A board behind a real sshd: models answer there as here, what it has is not sent again, and cuts are survived."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vitprune.errors import DamagedFile, MissingError
from vitprune_deploy.latency.protocol import measure
from vitprune_deploy.latency.visits import Subject
from vitprune_deploy.remote import board as boards
from vitprune_deploy.remote.board import Board
from vitprune_deploy.remote.bundle import bundle
from vitprune_deploy.remote.connection import Lost
from vitprune_deploy.remote.registry import Device


@pytest.fixture
def registered(sshd, tmp_path):
    return Device("here", sshd.host, sys.executable, str(tmp_path / "board"))


@pytest.fixture
def board(registered, monkeypatch):
    monkeypatch.setattr(boards, "AGAIN_S", (0.1, 0.3))
    found = Board(registered)
    yield found
    found.close()


def files_there(registered):
    return {path.name: path.stat().st_mtime_ns for path in (Path(registered.folder) / "files").iterdir()}


def test_a_model_answers_there_as_here_at_any_batch(board, exported):
    path, batch, wanted = exported
    with board.load("onnxruntime", path, threads=1) as model:
        assert model.runtime.startswith("onnxruntime ")
        assert model.provider == "cpu"
        for count in (5, 1):
            np.testing.assert_array_equal(model.run(batch[:count]), wanted[:count])
        with pytest.raises(Exception, match="input images must be float32"):
            model.run(batch.astype(np.float64))
        assert board.memory_mb("onnxruntime", path, batch, threads=1) > 0
        with board.answering("onnxruntime", path, batch[None], {"threads": 1}) as wait:
            np.testing.assert_allclose(wait()[0], wanted, atol=1e-5)


def test_latency_is_measured_there_by_the_same_protocol(board, exported):
    path, batch, _ = exported
    with board.load("onnxruntime", path, threads=1) as model:
        one = Subject.of("one", model, {"images": batch})
        less = Subject.of("less", model, {"images": batch[:1]})
        found, small = measure([one, less], less, max_rounds=6, max_seconds=20.0)
    assert found.rounds >= 1
    assert found.value_ms > small.value_ms > 0
    assert found.gated == board.facts["gates"] or found.unstable


def test_what_the_board_has_is_not_sent_again(board, registered, exported):
    path, batch, _ = exported
    for _ in range(2):
        with board.load("onnxruntime", path, threads=1) as model:
            model.run(batch)
    before = files_there(registered)
    again = Board(registered)
    sent = []
    with again.load("onnxruntime", path, threads=1) as model:
        again._connection.send = lambda *given: sent.append(given)
        model.run(batch)
    again.close()
    assert sent == []
    assert files_there(registered).keys() == before.keys()


def test_a_connection_that_is_cut_is_made_again_and_the_model_loaded_again(board, sshd, exported):
    path, batch, wanted = exported
    with board.load("onnxruntime", path, threads=1) as model:
        run = model.bind({"images": batch})
        for _ in range(2):
            sshd.kill_connections()
            np.testing.assert_array_equal(model.run(batch), wanted)
            assert run() > 0


def test_a_board_that_was_let_go_while_nobody_asked_is_taken_again(board, exported, monkeypatch):
    """As in a training that takes longer than the runner waits."""
    monkeypatch.setattr(boards, "bundle", impatient)
    path, batch, wanted = exported
    with board.load("onnxruntime", path, threads=1) as model:
        np.testing.assert_array_equal(model.run(batch), wanted)
        end_s = time.monotonic() + 10
        while children_named(board._registered.folder) and time.monotonic() < end_s:
            time.sleep(0.1)
        assert not children_named(board._registered.folder)
        np.testing.assert_array_equal(model.run(batch), wanted)


def impatient():
    """The program for boards, which waits a second in place of ten minutes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(bundle())) as usual, zipfile.ZipFile(buffer, "w") as archive:
        for name in usual.namelist():
            text = usual.read(name).decode().replace("IDLE_S = 600.0", "IDLE_S = 1.0")
            archive.writestr(name, text.replace("POLL_S = 5.0", "POLL_S = 0.2"))
    return buffer.getvalue()


def test_a_board_that_is_rebooted_and_forgets_its_files_is_fed_again(board, registered, sshd, exported, monkeypatch):
    monkeypatch.setattr(boards, "AGAIN_S", (0.3, 0.6, 1.2, 2.0))
    path, batch, wanted = exported
    with board.load("onnxruntime", path, threads=1) as model:
        run = model.bind({"images": batch})
        (runner,) = children_named(registered.folder)
        threading.Thread(target=sshd.server.restart, args=[1.0], daemon=True).start()
        os.kill(runner, signal.SIGKILL)
        time.sleep(0.5)  # it is down
        shutil.rmtree(registered.folder)
        np.testing.assert_array_equal(model.run(batch), wanted)
        assert run() > 0
    assert children_named(registered.folder) != (runner,)


def children_named(folder):
    """The runners that serve from a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if any(word.endswith(b".pyz") for word in words) and words[-2] == folder.encode():
                found.append(int(path.parent.name))
    return tuple(found)


def test_cuts_at_random_moments_change_nothing(board, sshd, exported):
    path, batch, wanted = exported
    rng, stop = np.random.default_rng(0), threading.Event()

    def cut():
        while not stop.wait(rng.uniform(0.3, 1.5)):
            sshd.kill_connections()

    threading.Thread(target=cut, daemon=True).start()
    try:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            try:
                with board.load("onnxruntime", path, threads=1) as model:
                    np.testing.assert_array_equal(model.run(batch), wanted)
            except Lost:
                continue  # a command that is run again goes on
    finally:
        stop.set()


def test_a_board_that_is_gone_is_a_sentence(registered, sshd_server, monkeypatch):
    monkeypatch.setattr(boards, "AGAIN_S", ())
    gone = Board(registered._replace(host=registered.host._replace(port=1)))
    with pytest.raises(MissingError, match=r"127\.0\.0\.1"):
        gone.fingerprint("none")


def test_what_goes_wrong_there_is_said_with_the_boards_address(board, sshd, exported, tmp_path):
    path, *_ = exported
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedFile, match=rf"{sshd.address}: .*cut\.onnx is cut off"):
        board.load("onnxruntime", tmp_path / "cut.onnx")
    with pytest.raises(MissingError, match="CUDAExecutionProvider"):
        board.load("onnxruntime", path, options={"provider": "cuda"})


def test_a_second_measurer_is_refused_while_a_model_is_loaded(board, registered, exported):
    path, *_ = exported
    other = Board(registered)
    with (
        board.load("onnxruntime", path, threads=1),
        pytest.raises(MissingError, match="somebody else is measuring on this board"),
    ):
        other.load("onnxruntime", path)
    other.load("onnxruntime", path).close()
    other.close()


def test_a_python_that_is_not_there_is_a_sentence(registered):
    wrong = Board(registered._replace(python="/nowhere/python3"))
    with pytest.raises(MissingError, match="python3"):
        wrong.fingerprint("none")


def test_a_full_disk_is_a_sentence(board, exported, monkeypatch):
    monkeypatch.setattr(boards, "SPARE_MB", 1e12)
    with pytest.raises(MissingError, match=r"its disk has \d+ MB left, and \d+ MB are to be put there"):
        board.load("onnxruntime", exported[0])


def test_an_engine_is_built_there_and_brought_back_with_its_sidecar(board, exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from vitprune_deploy.backends.tensorrt import EngineOptions, Shapes, read_sidecar

    shapes = Shapes((1, 3, 28, 28), (2, 3, 28, 28), (4, 3, 28, 28))
    options = EngineOptions(({"images": shapes},), module="tensorrt_rtx", compute_capabilities=("8.9",))
    assert board.has("tensorrt_rtx")
    found = board.build(exported[0], tmp_path / "model.plan", options)
    assert read_sidecar(tmp_path / "model.plan") == found
    assert found["compute_capabilities"] == ["8.9"]
    assert [list(map(list, one["images"])) for one in found["profiles"]] == [[list(size) for size in shapes]]
    with pytest.raises(MissingError, match="no NVIDIA driver was found"):  # it needs a GPU to run
        board.load("tensorrt", tmp_path / "model.plan")
