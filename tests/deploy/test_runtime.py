from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from outputs import CLASSES, PREPROCESS, exported, written
from PIL import Image

from vitprune.errors import DamagedFile, InputError
from vitprune_deploy import runtime
from vitprune_deploy.artifact import hash_files
from vitprune_deploy.backends.onnxruntime import OnnxRuntime


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("artefact"))


@pytest.fixture(scope="module")
def model(folder) -> runtime.Model:
    return runtime.load(folder, threads=1)


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@torch.no_grad()
def by_torch(pixels: list[np.ndarray]) -> np.ndarray:
    inputs = np.stack([PREPROCESS(Image.fromarray(p)) for p in pixels])
    return tiny.tiny_vit()(torch.from_numpy(inputs)).numpy()


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)  # fp32 through two blocks; another image is off by O(1)


def test_every_way_to_give_images_gives_what_torch_says(model):
    arrays = [picture(i) for i in range(3)]
    want = by_torch(arrays)
    images = [Image.fromarray(a) for a in arrays]
    ready = np.stack([PREPROCESS(i) for i in images])
    for given in (images, tuple(images), arrays, np.stack(arrays), ready, [images[0], arrays[1], arrays[2]]):
        got = model.predict(given)
        assert got.logits.dtype == np.float32
        close(got.logits, want)
    for one in (images[0], arrays[0], ready[0]):
        close(model.predict(one).logits, want[:1])


def test_images_of_mixed_sizes_and_modes_go_in_one_list(model):
    grey = picture(0)[:, :, 0]
    mixed = [picture(1, 30, 60), grey, grey[:, :, None], Image.fromarray(picture(2)).convert("RGBA")]
    assert model.predict(mixed).logits.shape == (4, 10)
    close(model.predict(grey).logits, by_torch([np.stack([grey] * 3, -1)]))


@pytest.mark.parametrize("batch", [(1, 8), 4])
def test_more_images_than_the_engine_takes_are_split(tmp_path, batch):
    most = batch if isinstance(batch, int) else batch[1]
    arrays = [picture(i) for i in range(2 * 8 + 3)]
    with runtime.load(written(tmp_path, batch, max_batch=most)) as model:
        close(model.predict(arrays).logits, by_torch(arrays))
        close(model.predict(arrays[0]).logits, by_torch(arrays[:1]))


def test_an_engine_that_takes_no_single_image_gets_its_batch_filled(tmp_path):
    arrays = [picture(i) for i in range(5)]
    with runtime.load(written(tmp_path, (1, 4), max_batch=4, min_batch=3)) as model:
        seen, run = [], model.backend.run
        model.backend.run = lambda chunk: seen.append(len(chunk)) or run(chunk)
        close(model.predict(arrays).logits, by_torch(arrays))
    assert seen == [4, 3]


def test_the_top_classes_come_with_names_and_probabilities(model):
    logits = np.array([[0.0, np.log(6), np.log(3)], [5.0, 5.0, -np.inf]], np.float32)
    top = runtime.Prediction(logits, ("cat", "dog", "owl")).top(2)
    assert top.indices.tolist() == [[1, 2], [0, 1]]
    np.testing.assert_allclose(top.probabilities, [[0.6, 0.3], [0.5, 0.5]], rtol=1e-6)
    assert top.labels == [["dog", "owl"], ["cat", "dog"]]
    assert runtime.Prediction(logits).top(9).labels == [["1", "2", "0"], ["0", "1", "2"]]
    assert model.predict(picture(0)).top().labels[0][0] in CLASSES
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        runtime.Prediction(logits).top(0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("rose.jpg", "wanted images, got str; open files with PIL.Image.open"),
        ([], "wanted at least one image, got none"),
        (np.zeros((0, 8, 8, 3), np.uint8), "wanted at least one image, got none"),
        (np.zeros((8, 8, 3)), r"pixels must be uint8 \[height, width, channels\], got float64 \[8, 8, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"must be uint8 .* got uint8 \[3, 8, 8\]"),
        (np.zeros((2, 1, 28, 28), np.float32), r"preprocessed, \[B, 3, height, width\], got \[2, 1, 28, 28\]"),
        (np.zeros((28, 28), np.float32), r"got \[28, 28\]; give pixels as uint8"),
        (np.zeros((0, 3, 28, 28), np.float32), "float32 is taken as preprocessed"),
        (np.zeros((1, 3, 32, 32), np.float32), r"input images must be float32 \[batch, 3, 28, 28\]"),
        (["rose.jpg"], "wanted images, got str in the list"),
        (3, "wanted images, got int"),
    ],
)
def test_what_is_no_image_is_refused_with_what_would_be_right(model, given, words):
    with pytest.raises(InputError, match=words):
        model.predict(given)


def test_threads_share_a_model(model):
    arrays = [picture(i) for i in range(8)]
    want, got = by_torch(arrays), [None] * 8

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = model.predict(arrays[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(np.concatenate(got), want)


def test_a_changed_engine_is_refused_by_its_sum_unless_told_not_to_look(tmp_path):
    folder = written(tmp_path)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DamagedFile, match=r"model.onnx is cut off or changed since it was built"):
        runtime.load(folder)


def test_without_verification_a_file_that_still_loads_is_taken(tmp_path):
    folder = written(tmp_path)
    (folder / "model.onnx").write_bytes(exported(4))
    runtime.load(folder, verify=False).close()


def test_an_engine_that_is_not_there_is_told_with_those_that_are(tmp_path):
    folder = written(tmp_path, status="built")
    with pytest.raises(InputError, match=r"no engine that was run .* it has onnxruntime \(fp32, built\): name one"):
        runtime.load(folder)
    runtime.load(folder, runtime="onnxruntime").close()
    with pytest.raises(InputError, match="no engine for 'tensorrt'"):
        runtime.load(folder, runtime="tensorrt")


@pytest.mark.parametrize("sidecar", ["model.sm89.trt11.4.fp16.b1.json", "model.sm89.trt11.4.fp16.b1.plan.json"])
def test_an_engine_whose_sidecar_was_changed_is_refused_before_it_is_loaded(sidecar, tmp_path):
    (tmp_path / "engine").mkdir()
    names = ["engine/model.sm89.trt11.4.fp16.b1.plan", f"engine/{sidecar}"]
    for name in names:
        (tmp_path / name).write_text("{}")
    folder = written(tmp_path, runtime="tensorrt", precision="fp16", file=names[0])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": hash_files(folder, names)}))
    (tmp_path / names[1]).write_text('{"sha256": "of something else"}')
    with pytest.raises(DamagedFile, match=rf"{sidecar} is cut off or changed since it was built"):
        runtime.load(folder)


def test_a_manifest_without_preprocessing_is_damaged(tmp_path):
    folder = written(tmp_path)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"preprocess"', '"something"'))
    with pytest.raises(DamagedFile, match="does not say how images are preprocessed"):
        runtime.load(folder)


def test_a_model_without_class_names_gives_indices(folder):
    with runtime.Model(OnnxRuntime.load(folder / "model.onnx"), PREPROCESS) as model:
        top = model.predict(picture(0)).top(3)
        assert top.labels[0] == [str(i) for i in top.indices[0]]


def test_a_service_imports_neither_torch_nor_timm(folder):
    code = (
        "import sys, numpy; sys.path[:0] = ['.', 'deploy']; import vitprune_deploy.runtime as r\n"
        f"print(r.load({str(folder)!r}).predict(numpy.zeros((9, 9, 3), 'uint8')).logits.shape)\n"
        "print([n for n in ('torch', 'timm', 'onnx', 'scipy') if n in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.split("\n")[:2] == ["(1, 10)", "[]"], done.stderr
