"""The program that travels to a board, run as a board runs it: one file, a bare Python, lines on a pipe."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vitprune_deploy import backends, latency, remote
from vitprune_deploy.latency.machine import Asked, Taken
from vitprune_deploy.remote import runner as program
from vitprune_deploy.remote.bundle import bundle, name_of

HEAVY = ("pydantic", "torch", "onnx", "yaml", "typer", "rich", "PIL", "asyncssh")


class Pipe:
    """A runner at the other end of two pipes, as ssh would have it."""

    def __init__(self, file: Path, folder: Path) -> None:
        command = [sys.executable, str(file), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = folder

    def say(self, do, **request):
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def ask(self, do, **request):
        answer = self.say(do, **request)
        assert "result" in answer, answer
        return answer["result"]

    def put(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        if self.ask("missing", sums=[name]):
            (self.folder / "files" / f"{name}.part").write_bytes(content)
            self.ask("keep", sums=[name])
        return name

    def put_array(self, array) -> str:
        path = self.folder / "array.npy"
        np.save(path, array)
        return self.put(path.read_bytes())

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(20) == 0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "runner.pyz"
    path.write_bytes(bundle())
    return path


@pytest.fixture
def runner(file, tmp_path):
    pipe = Pipe(file, tmp_path / "board")
    yield pipe
    pipe.close()


def loaded(runner, path, key=1, **more):
    files = {path.name: runner.put(path.read_bytes())}
    request = {"backend": "onnxruntime", "model": path.name, "files": files}
    return request, runner.ask("load", key=key, load={"threads": 1, "options": {}}, **request, **more)


def test_the_file_is_small_the_same_each_time_and_needs_numpy_alone(file):
    assert file.read_bytes() == bundle()
    assert len(bundle()) < 150_000
    assert name_of(bundle()).startswith("runner-")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import vitprune_deploy.remote.runner; "
        f"print([name for name in {HEAVY} if name in sys.modules], vitprune_deploy.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"[] {file}"), done.stdout


def test_every_line_of_it_is_of_python_3_8(file, tmp_path):
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    vermin = Path(sys.executable).with_name("vermin")
    done = subprocess.run([vermin, "--no-tips", "--target=3.8-", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_board_says_what_it_is_and_has(runner):
    found = runner.ask("hello", distributions=["numpy", "nobody's"], modules=["onnxruntime", "nobody"])
    assert found["versions"] == {"numpy": np.__version__}
    assert found["modules"] == ["onnxruntime"]
    assert found["device"]["cores"] >= 1
    assert found["python"].startswith("3.")
    assert "load_1min" in runner.ask("state")


def test_a_model_answers_there_what_it_answers_here(runner, exported):
    path, batch, wanted = exported
    request, facts = loaded(runner, path)
    assert facts["inputs"][0] == ["images", ["batch", 3, 28, 28], "float32"]
    assert facts["runtime"].startswith("onnxruntime ")
    found = program.unpacked(runner.ask("run", model=1, images=runner.put_array(batch)))
    np.testing.assert_array_equal(found, wanted)
    apart = runner.ask("apart", **request, load={"threads": 1}, batches=runner.put_array(batch[None]))
    np.testing.assert_allclose(program.unpacked(apart)[0], wanted, atol=1e-5)
    assert runner.ask("memory", **request, load={"threads": 1}, shape=list(batch.shape), dtype="float32") > 0


def test_visits_are_made_there(runner, exported):
    path, batch, _ = exported
    loaded(runner, path)
    runner.ask("bind", key=2, name="one", model=1, feed={"images": runner.put_array(batch)})
    runner.ask("bind", key=3, name="two", model=1, feed={"images": runner.put_array(batch[:1])})
    assert runner.ask("once", subject=2) > 0
    taken = Taken(*runner.ask("take", subject=2, reference=3, asked=list(Asked(3, 2, True, True, False))))
    assert (len(taken.samples_ms), taken.rejected, len(taken.references_ms)) == (3, 0, 2)
    assert min(taken.samples_ms) > 0
    first = Taken(*runner.ask("take", subject=None, reference=3, asked=list(Asked(0, 1, True, True, False))))
    assert (first.samples_ms, len(first.references_ms)) == ([], 2)


def test_what_goes_wrong_is_a_sentence_and_the_runner_goes_on(runner, exported):
    path, *_ = exported
    damaged = runner.put(path.read_bytes()[:1000])
    request = {"backend": "onnxruntime", "model": "cut.onnx", "files": {"cut.onnx": damaged}, "load": {}}
    kind, text = runner.say("load", key=1, **request)["error"]
    assert (kind, "cut.onnx is cut off" in text) == ("damaged", True)
    kind, text = runner.say("load", key=1, **{**request, "load": {"options": {"provider": "cuda"}}})["error"]
    assert kind == "missing"
    kind, text = runner.say("run", model=9, images=damaged)["error"]
    assert (kind, "KeyError" in text) == ("bug", True)
    (runner.folder / "files" / f"{'0' * 64}.part").write_bytes(b"half")
    kind, text = runner.say("keep", sums=["0" * 64])["error"]
    assert (kind, "did not arrive whole" in text) == ("damaged", True)
    assert not list((runner.folder / "files").glob("*.part"))
    assert runner.ask("missing", sums=[damaged]) == []


def test_two_measurers_are_kept_apart_until_the_first_has_let_go_or_died(file, runner, exported):
    path, *_ = exported
    loaded(runner, path)
    other = Pipe(file, runner.folder)
    request = {"backend": "onnxruntime", "model": path.name, "files": {path.name: other.put(path.read_bytes())}}
    kind, text = other.say("load", key=1, load={"threads": 1}, **request)["error"]
    assert kind == "missing"
    assert f"somebody else is measuring on this board (process {runner.process.pid}, since 20" in text
    runner.ask("drop", models=[1], subjects=[])
    other.ask("load", key=1, load={"threads": 1}, **request)
    assert "error" in runner.say("load", key=1, load={"threads": 1}, **request)
    other.process.kill()
    other.process.wait()
    for _ in range(50):  # the kernel lets go when the process is gone
        if "result" in runner.say("load", key=1, load={"threads": 1}, **request):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the lock outlived its process")


def test_the_files_that_were_used_longest_ago_make_room(runner):
    names = [runner.put(bytes([n]) * 400_000) for n in range(3)]
    for age, name in ((30, names[0]), (20, names[1]), (10, names[2])):
        moment = time.time() - age
        os.utime(runner.folder / "files" / name, (moment, moment))
    runner.ask("missing", sums=[names[0]])  # is used
    assert runner.ask("make_room", wanted_mb=0.1, spare_mb=0.0, most_mb=1.0) > 0
    assert runner.ask("missing", sums=names) == [names[1]]
    assert runner.ask("make_room", wanted_mb=1e12, spare_mb=0.0, most_mb=1e15) < 1e12  # all of them are not enough
    assert runner.ask("missing", sums=names) == names


def test_a_python_without_numpy_or_of_long_ago_says_so(file):
    command = [sys.executable, "-I", "-S", str(file)]
    bare = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    kind, text = json.loads(bare.stdout)["error"]
    assert (kind, "has no numpy; run" in text) == ("missing", True)
    main = zipfile.ZipFile(file).read("__main__.py").decode()
    old = f"import sys\nsys.version_info = (3, 6, 9)\n{main}"
    done = subprocess.run([sys.executable, "-I", "-c", old], capture_output=True, text=True)
    assert "its Python is 3.6, and 3.8 or newer is needed" in json.loads(done.stdout)["error"][1]


def test_a_runner_that_nobody_asks_lets_the_board_go(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "IDLE_S", 0.2)
    monkeypatch.setattr(program, "POLL_S", 0.1)
    served = program.Runner(tmp_path)
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as stream, os.fdopen(write, "wb", buffering=0) as sender:
        sender.write(b'{"do": "state"}\n')
        assert program._next_line(stream, served) == b'{"do": "state"}\n'
        served._lock.take()
        with pytest.raises(SystemExit) as ended:
            program._next_line(stream, served)
    assert ended.value.code == program.LET_GO


def test_no_clock_that_can_be_set_measures_or_limits_anything():
    """A board without a battery jumps by years when it hears of the time: durations come from the monotonic clock."""
    sources = [Path(file.__file__).parent for file in (latency, remote, backends)]
    for path in (one for folder in sources for one in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert f"{node.value.id}.{node.attr}" not in ("time.time", "time.time_ns", "datetime.now"), path
