"""The C++ library against Python's runtime on the same folders, compiled here; its README as a reader follows it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL
import pytest
import tiny
from PIL import Image

import vitprune
from tools.cpp_headers import headers
from vitprune.errors import MissingError, VitpruneError
from vitprune_deploy.artifact import Manifest, hash_files
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.data import Preprocess
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.runtime import Model, load
from vitprune_deploy.validate import write_golden
from vitprune_deploy.verbs.doctor import try_openvino

ROOT = Path(__file__).parents[2]
CPP = ROOT / "deploy" / "cpp"
README = CPP / "README.md"
PILLOW = PIL.__version__.partition(".")[0]
PREPROCESS = Preprocess((3, 28, 28), crop_pct=0.9)
SOME = {"params": 1, "macs": 1, "top1": None, "latency_ms": {"p50": 1.0, "samples": 100}}
ONNX = {"runtime": "onnxruntime", "precision": "fp32", "status": "run", "file": "model.onnx", "max_batch": 8}
PLAN = {"runtime": "tensorrt", "precision": "fp16", "status": "run", "file": "engine/model.plan", "max_batch": 8,
        "min_batch": 2}  # fmt: skip
SIDECAR = {"runtime": "tensorrt", "version": "10.3.0", "compute_capabilities": ["8.7"]}


@pytest.fixture(scope="module")
def prefix() -> Path:
    """Where the headers are that the library is compiled with."""
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    try:
        return headers()
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def programs(prefix, tmp_path_factory) -> Path:
    """The folder of the compiled programs of tests/cpp: all backends, warnings taken as errors."""
    build = tmp_path_factory.mktemp("programs")
    openvino = importlib.util.find_spec("openvino")
    more = [f"-DOpenVINO_DIR={Path(openvino.origin).parent / 'cmake'}", "-DVITPRUNE_OPENVINO=ON"] if openvino else []
    run("cmake", "-S", ROOT / "tests/cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", *more)
    run("cmake", "--build", build, "--parallel", "2")
    return build


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as a build leaves it, as far as a service reads it."""
    out = tmp_path_factory.mktemp("artefact")
    export_onnx(tiny.tiny_vit(), out / "model.onnx", batch=(1, 8))
    with Model(OnnxRuntime.load(out / "model.onnx"), PREPROCESS) as model:
        assert write_golden(out, model, Image.fromarray(picture(0, 60, 45)), "fp32")
    return written(out, ONNX)


def written(out: Path, engine, **manifest) -> Path:
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    Manifest(
        **{
            "schema": 1, "verdict": "pass", "reasons": (), "device": {}, "versions": {"pillow": PIL.__version__},
            "dense": SOME, "pruned": SOME,
            "budget": {"latency_ms": 1.0, "percentile": 50, "batch": 1, "image_size": (28, 28)},
            "parity": {"max_abs": 0.0, "top1_agreement": 100.0}, "engines": (engine,),
            "files": hash_files(out, [name for name in files if name != "manifest.json"]),
            "preprocess": PREPROCESS.to_dict(), "classes": [f"class {i}" for i in range(10)],
        } | manifest
    ).write(out)  # fmt: skip
    return out


def library() -> Path:
    """ONNX Runtime's library, as its Python package brings it."""
    return next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"VITPRUNE_ONNXRUNTIME": str(library())} | more


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth gradient with noise, so that resampling and cropping both matter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    layers = [127 + 90 * np.sin(y / rng.uniform(3, 9) + x / rng.uniform(3, 9) + rng.uniform(0, 6)) for _ in range(3)]
    return np.clip(np.stack(layers, -1) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pngs(tmp_path_factory) -> list[Path]:
    """200 files of many sizes, in the modes that PNG has."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [root / f"{i:03}.png" for i in range(200)]
    for i, path in enumerate(paths):
        image = Image.fromarray(picture(i, *rng.integers(9, 120, 2)))
        image.convert(("RGB", "RGB", "L", "RGBA", "P", "LA")[i % 6]).save(path)
    return paths


def answer(programs, folder, images, runtime="-", threads=0, **env) -> tuple[np.ndarray, str]:
    """What C++ says of the images: logits [N, 10]; and by what."""
    out = programs / "out.f32"
    said = run(programs / "answer", folder, runtime, threads, out, *images, env=environment(**env))
    return np.fromfile(out, np.float32).reshape(len(images), 10), said.strip()


def refusal(programs, folder, images, runtime="-", **env) -> str:
    command = [programs / "answer", folder, runtime, 0, programs / "none", *images]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment(**env))
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    return done.stderr.strip()


def by_python(folder, images) -> np.ndarray:
    with load(folder, threads=1) as model:
        return model.predict([Image.open(path) for path in images]).logits


def test_logits_of_200_png_files_are_pythons(programs, folder, pngs):
    found, runtime = answer(programs, folder, pngs)
    assert runtime == f"onnxruntime {library().name.partition('.so.')[2]}"
    np.testing.assert_allclose(found, by_python(folder, pngs), rtol=0, atol=1e-5)  # another pixel moves them by 1e-3


def test_threads_share_a_model(programs, folder, pngs):
    found, _ = answer(programs, folder, pngs[:40], threads=4)
    np.testing.assert_allclose(found, by_python(folder, pngs[:40]), rtol=0, atol=1e-5)


def test_jpeg_files_are_the_same_classes_though_two_decoders_differ(programs, folder, tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(40)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(i, 40 + i, 90 - i)).save(path, quality=90)
    found, wanted = answer(programs, folder, paths)[0], by_python(folder, paths)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02)  # a step of a pixel moves them by less
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).all()


PIXELS = [  # input size, mean, deviation
    ((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((1, 24, 40), (0.286,), (0.353,)),
    ((3, 200, 160), (0.5, 0.4, 0.3), (0.5, 1.0, 2.0)),
    ((1, 7, 7), (0.1,), (0.9,)),
]


def preprocessed(programs, wanted, pillow=PILLOW) -> np.ndarray:
    """What C++ makes of each pair of a configuration and a file, one behind the other."""
    lines = []
    for one, path in wanted:
        words = (*one.input_size, one.interpolation, one.crop_mode, one.crop_pct, pillow, *one.mean, *one.std, path)
        lines.append(" ".join(map(str, words)))
    done = subprocess.run([programs / "pixels"], input="\n".join(lines).encode(), capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32)


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_preprocessing_is_pillows_bit_for_bit(interpolation, programs, pngs):
    wanted = []
    for crop_mode, (size, mean, std) in itertools.product(("center", "squash", "border"), PIXELS):
        config = Preprocess(size, interpolation, mean, std, 0.875, crop_mode)
        wanted += [(config, path) for path in pngs[len(wanted) % 190 :][:8]]
    by_pillow = np.concatenate([config(Image.open(path)).ravel() for config, path in wanted])
    np.testing.assert_array_equal(preprocessed(programs, wanted), by_pillow)


def test_the_pillow_that_a_model_was_validated_with_is_followed(programs, tmp_path):
    image = Image.fromarray(picture(0, 180, 60))
    image.save(path := tmp_path / "tall.png")
    config, bicubic = Preprocess((3, 30, 50), crop_pct=1.0, crop_mode="squash"), Image.Resampling.BICUBIC
    across_first = image.resize((50, 180), bicubic).resize((50, 30), bicubic)
    down_first = image.resize((60, 30), bicubic).resize((50, 30), bicubic)
    for pillow, pixels in ((12, across_first), (13, down_first)):
        wanted = config.normalise(np.asarray(pixels)[None])
        np.testing.assert_array_equal(preprocessed(programs, [(config, path)], pillow), wanted.ravel())
    assert (np.asarray(across_first) != np.asarray(down_first)).any()


def test_grey_and_colour_pnm_files_are_read_too(programs, folder, tmp_path):
    paths = [tmp_path / "grey.pgm", tmp_path / "colour.ppm"]
    Image.fromarray(picture(1, 40, 50)).convert("L").save(paths[0])
    paths[1].write_bytes(b"P6 # a comment\n50 40\n255\n" + picture(2, 40, 50).tobytes())
    found, _ = answer(programs, folder, paths)
    np.testing.assert_allclose(found, by_python(folder, paths), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["none.png", "cut.png", "cut.jpg", "cut.ppm", "text.png"])
def test_a_file_that_is_no_image_is_named(name, programs, folder, tmp_path):
    path = tmp_path / name
    if name == "text.png":
        path.write_text("not an image")
    elif name != "none.png":
        Image.fromarray(picture(0, 40, 50)).save(path)
        cut(path, 60)
    reason = "there is no such image file" if name == "none.png" else "is cut off or not an image that this reads: PNG"
    said = refusal(programs, folder, [path])
    assert said.startswith(f"InputError: {path}")
    assert reason in said


def test_what_a_caller_may_do_wrong_is_a_sentence_and_the_rest_of_the_header_works(programs, folder, tmp_path):
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    edited(changed, files={})
    lines = run(programs / "interface", folder, changed, env=environment()).splitlines()
    assert lines == [
        "0",
        "1 0.6 dog", "2 0.3 owl", "0 0.5 cat", "1 0.5 dog",
        "2", "0", "1",
        "top: k must be at least 1, got 0",
        "top: there are 2 images, counted from 0, got 2",
        "predict: wanted at least one image, got none",
        "predict: an image must have pixels, [height, width, 1, 3 or 4 channels], got none of [0, 0, 3]",
        "predict: an image must have pixels, [height, width, 1, 3 or 4 channels], got [50, 40, 2]",
        "an image of 100000 x 1 pixels would become 3100000 x 31 for an input of 28 x 28; crop it first",
        *(f"predict: float32 is taken as preprocessed, [B, 3, height, width], got {shape}; give pixels as uint8"
          for shape in ("none of [0, 0, 0, 0]", "[1, 1, 32, 32]")),
        "input images must be float32 [batch, 3, 28, 28], got float32 [1, 3, 32, 32]",
        "10",
    ]  # fmt: skip


def cut(path: Path, size: int = -7) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edited(folder: Path, **values) -> None:
    """Replace keys of the manifest, as a hand would."""
    plain = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(plain | values))


def outside(folder: Path) -> None:
    plain = json.loads((folder / "manifest.json").read_text())
    engine = plain["engines"][0] | {"file": "../model.onnx"}
    edited(folder, engines=[engine], files={"../model.onnx": "0"})


SPOILT = {
    "engine truncated": lambda folder: cut(folder / "model.onnx"),
    "engine tampered": lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b"0"),
    "engine missing": lambda folder: (folder / "model.onnx").unlink(),
    "weights tampered": lambda folder: cut(folder / "model.onnx.data"),
    "weights missing": lambda folder: (folder / "model.onnx.data").unlink(),
    "engine not listed": lambda folder: edited(folder, files={}),
    "engine outside": outside,
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest truncated": lambda folder: cut(folder / "manifest.json", 300),
    "manifest empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest no JSON": lambda folder: (folder / "manifest.json").write_bytes(bytes(range(256))),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[1, 2]"),
    "manifest foreign": lambda folder: (folder / "manifest.json").write_text('{"name": "left-pad", "version": "1"}'),
    "manifest newer": lambda folder: edited(folder, schema=2),
    "files damaged": lambda folder: edited(folder, files=["model.onnx"]),
    "no preprocessing": lambda folder: edited(folder, preprocess=None),
    "preprocessing out of range": lambda folder: edited(folder, preprocess=PREPROCESS.to_dict() | {"crop_pct": 1.5}),
    "only built": lambda folder: edited(folder, engines=[ONNX | {"status": "built"}]),
    "folder missing": shutil.rmtree,
}


@pytest.fixture(scope="module")
def with_weights(folder, tmp_path_factory) -> Path:
    """The folder with its weights in a file of their own."""
    out = tmp_path_factory.mktemp("weights")
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return written(out, ONNX)


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_spoilt_is_refused_with_pythons_sentence(kind, programs, with_weights, pngs, tmp_path):
    folder = Path(shutil.copytree(with_weights, tmp_path / "copy"))
    SPOILT[kind](folder)
    with pytest.raises(VitpruneError) as said:
        load(folder)
    assert refusal(programs, folder, pngs[:1]) == f"{type(said.value).__name__}: {said.value}"


def test_a_whole_folder_with_weights_beside_the_engine_loads(programs, with_weights, pngs):
    found, _ = answer(programs, with_weights, pngs[:3])
    np.testing.assert_allclose(found, by_python(with_weights, pngs[:3]), rtol=0, atol=1e-5)


def test_a_runtime_or_library_that_is_not_there_is_a_sentence(programs, folder, pngs):
    said = refusal(programs, folder, pngs[:1], runtime="tensorrt")
    assert said == f"InputError: {folder} has no engine for 'tensorrt'; it has onnxruntime (fp32, run): " \
                   "name one of these runtimes"  # fmt: skip
    said = refusal(programs, folder, pngs[:1], VITPRUNE_ONNXRUNTIME="/nowhere/libonnxruntime.so")
    assert said.startswith("MissingError: ONNX Runtime's library does not load: /nowhere/libonnxruntime.so")
    said = refusal(programs, folder, pngs[:1], VITPRUNE_ONNXRUNTIME="libm.so.6")
    assert said == "MissingError: libm.so.6 is not a library of ONNX Runtime"


@pytest.mark.parametrize("provider", ["cuda", "CUDAExecutionProvider", "tensorrt"])
def test_a_provider_that_does_not_start_is_a_sentence(provider, programs, folder, pngs, tmp_path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    other = written(Path(shutil.copytree(folder, tmp_path / "copy")), ONNX | {"options": {"provider": provider}})
    said, name = refusal(programs, other, pngs[:1]), provider.lower().removesuffix("executionprovider")
    assert said.startswith(f"MissingError: ONNX Runtime's provider {name} did not start on this machine: ")


def test_an_option_that_the_library_does_not_know_is_not_passed_over(programs, folder, pngs, tmp_path):
    strange = written(Path(shutil.copytree(folder, tmp_path / "copy")), ONNX | {"options": {"turbo": True}})
    assert "NotSupported" in (said := refusal(programs, strange, pngs[:1]))
    assert said.endswith("has the option turbo for onnxruntime, which this library does not know; update it")


def test_openvino_answers_as_the_engine_that_was_validated(programs, folder, pngs):
    pytest.importorskip("openvino")
    found, runtime = answer(programs, folder, pngs[:40], runtime="openvino")
    assert runtime.startswith("openvino 20")
    np.testing.assert_allclose(found, by_python(folder, pngs[:40]), rtol=0, atol=1e-4)  # fp32, other kernels


def test_openvino_computes_in_the_precision_that_was_validated(programs, tmp_path, folder, pngs):
    pytest.importorskip("openvino")
    if try_openvino("bf16"):
        pytest.skip("this processor has no bf16")
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    engine = {"runtime": "openvino", "precision": "bf16", "status": "run", "options": {"precision": "bf16"}}
    out = written(tmp_path, {**engine, "file": "model.onnx", "max_batch": 8})
    found, _ = answer(programs, out, pngs[:8])
    np.testing.assert_allclose(found, by_python(out, pngs[:8]), rtol=0, atol=1e-4)
    assert np.abs(found - by_python(folder, pngs[:8])).max() > 1e-3


def test_an_engine_for_onnx_runtimes_openvino_provider_runs_in_openvino(programs, folder, pngs, tmp_path):
    options = {"provider": "OpenVINOExecutionProvider", "provider_options": {"INFERENCE_PRECISION_HINT": "f32"}}
    other = written(Path(shutil.copytree(folder, tmp_path / "copy")), ONNX | {"options": options})
    if importlib.util.find_spec("openvino") is None:
        assert "was built without OpenVINO" in refusal(programs, other, pngs[:1])
        return
    found, runtime = answer(programs, other, pngs[:40])
    assert runtime.startswith("openvino 20")
    np.testing.assert_allclose(found, by_python(folder, pngs[:40]), rtol=0, atol=1e-4)
    strange = written(other, ONNX | {"options": options | {"provider_options": {"turbo": True}}})
    assert "OpenVINO does not run" in refusal(programs, strange, pngs[:1])


def test_what_a_plugin_of_onnx_runtime_compiled_is_passed_over_for_the_graph(programs, folder, pngs, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edited(copy, engines=[ONNX | {"file": "engine/model.compiled.onnx", "compiled": True}, ONNX])
    found, _ = answer(programs, copy, pngs[:4])
    np.testing.assert_allclose(found, by_python(folder, pngs[:4]), rtol=0, atol=1e-5)


def test_a_library_without_openvino_says_how_to_get_it(programs, folder, pngs):
    if importlib.util.find_spec("openvino"):
        pytest.skip("openvino is installed, so the library has it")
    said = refusal(programs, folder, pngs[:1], runtime="openvino")
    assert said.endswith("this vitprune library was built without OpenVINO; build it with -DVITPRUNE_OPENVINO=ON")


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    """A folder with an engine for the test double of TensorRT: from 2 to 8 images, and a second profile up to 4."""
    out = tmp_path_factory.mktemp("plan")
    (out / "engine").mkdir()
    (out / "engine" / "model.plan").write_text("double 3 28 28 10 2 8 2 4\n")
    (out / "engine" / "model.json").write_text(json.dumps(SIDECAR))
    return written(out, PLAN)


@pytest.mark.parametrize(("count", "threads", "profiles"), [
    (1, 0, [1]), (4, 0, [1] * 4), (5, 0, [0] * 5), (11, 0, [0] * 8 + [1] * 3), (11, 3, [1] * 11),
])  # fmt: skip
def test_the_tensorrt_backend_fills_splits_and_places_batches(count, threads, profiles, programs, plan, pngs):
    found, runtime = answer(programs, plan, pngs[:count], threads=threads)
    assert runtime == "tensorrt 99.1.0"
    inputs = np.stack([PREPROCESS(Image.open(path)) for path in pngs[:count]])
    means = inputs.mean(axis=(1, 2, 3), dtype=np.float64)
    wanted = means[:, None] * np.arange(1, 11) + inputs[:, 0, 0, :10] + 100 * np.array(profiles)[:, None]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)  # near 100, fp32 has steps of 8e-6


def test_a_batch_that_no_profile_takes_is_refused_with_those_that_are_taken(programs, plan, pngs, tmp_path):
    larger = written(Path(shutil.copytree(plan, tmp_path / "larger")), PLAN | {"max_batch": 12})
    assert refusal(programs, larger, pngs[:11]) == (
        "InputError: input images must be float32 from [2, 3, 28, 28] to [8, 3, 28, 28] or from [2, 3, 28, 28] to "
        "[4, 3, 28, 28], got float32 [11, 3, 28, 28]"
    )


def test_a_version_compatible_plan_may_bring_its_code(programs, plan, pngs, tmp_path):
    folder = Path(shutil.copytree(plan, tmp_path / "copy"))
    (folder / "engine/model.plan").write_text("double-with-code 3 28 28 10 2 8\n")
    assert "does not load in tensorrt 99.1.0" in refusal(programs, written(folder, PLAN), pngs[:1])
    (folder / "engine/model.json").write_text(json.dumps(SIDECAR | {"flags": ["VERSION_COMPATIBLE"]}))
    answer(programs, written(folder, PLAN), pngs[:1])


NO_ENGINE = ("does not load in tensorrt 99.1.0; it was built by tensorrt 10.3.0 for compute capability 8.7; build it "
             "again with this version, for this GPU: the plan is of another version")  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ("driver", "MissingError", "CUDA could not find a GPU: CUDA driver version is insufficient"),
        ("runtime", "MissingError", "tensorrt 99.1.0 does not start here"),
        ("engine", "MissingError", NO_ENGINE),
        ("context", "MissingError", "TensorRT made no execution context; the GPU has too little memory left"),
        ("profile", "MissingError", "TensorRT made no execution context; the GPU has too little memory left"),
        ("float32", "NotSupported", "logits must be float32"),
        ("shape", "InputError", "this engine refuses images of shape [2, 3, 28, 28]"),
        ("memory", "MissingError", "CUDA could not allocate memory on the GPU: out of memory"),
        ("pinned", "MissingError", "CUDA could not allocate memory on the host: out of memory"),
        ("enqueue", "MissingError", "could not run the engine; the GPU may have too little memory left: the launch"),
    ],
)
def test_what_fails_on_a_gpu_is_a_sentence_and_nothing_leaks(call, kind, words, programs, plan, pngs):
    said = refusal(programs, plan, pngs[:1], DOUBLE_FAILS=call)
    assert said.startswith(f"{kind}: ")
    assert words in said


def test_a_plan_or_sidecar_that_was_changed_is_refused_before_loading(programs, plan, pngs, tmp_path):
    for name in ("engine/model.plan", "engine/model.json"):
        folder = Path(shutil.copytree(plan, tmp_path / name.replace("/", "-")))
        cut(folder / name, -1)
        assert refusal(programs, folder, pngs[:1]) == (
            f"DamagedFile: {folder / name} is cut off or changed since it was built; "
            "run the build again, it renews what is damaged"
        )


@pytest.fixture(scope="module")
def desk(prefix, folder, tmp_path_factory) -> tuple[Path, str]:
    """A reader's folder after all commands of the README, and what they said."""
    root, text = tmp_path_factory.mktemp("reader"), README.read_text(encoding="utf-8")
    (root / "deploy").symlink_to(ROOT / "deploy")
    shutil.copytree(folder, root / "out" / "small")
    Image.fromarray(picture(3, 50, 70)).save(root / "photo.jpg")
    (root / "service").mkdir()
    for kind, name in (("cmake", "CMakeLists.txt"), ("cpp", "main.cpp")):
        (block,) = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
        (root / "service" / name).write_text(block)
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    commands = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    install, *others = commands
    assert install.startswith("apt-get install ")  # what that brings, the fixture prefix has
    script = "\n".join(["set -e", *others])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = run("bash", "-c", script, cwd=root, env=os.environ | {"CMAKE_PREFIX_PATH": str(prefix), "PATH": path})
    return root, said


def test_the_commands_of_the_readme_do_what_they_say(desk):
    root, said = desk
    assert "100% tests passed, 0 tests failed out of 2" in said
    assert said.count("photo.jpg\n") == 1
    with load(root / "out/small") as model, Image.open(root / "photo.jpg") as photo:
        label = model.predict(photo).top().labels[0][0]
        grey = model.predict(np.full((480, 640, 3), 128, np.uint8)).top(3)
    assert f"%  {label}\n" in said  # of classify
    assert [line.rpartition(" ")[0] for line in said.splitlines()[-3:]] == grey.labels[0]  # of the reader's own program
    assert (root / "vitprune/include/vitprune/vitprune.hpp").is_file()


def test_ctest_fails_when_the_golden_logits_are_others(desk):
    root, _ = desk
    golden, program = root / "out/small/golden.json", root / "build/cpp/tests/vitprune_golden"
    plain = json.loads(golden.read_text())
    plain["logits"][3] += 0.5
    folder = Path(shutil.copytree(root / "out/small", root / "changed"))
    (folder / "golden.json").write_text(json.dumps(plain))
    written(folder, ONNX)
    done = subprocess.run([program, folder], capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert "the golden image's logits differ by at most 0.5, allowed are 0.00" in done.stdout
    (folder / "golden.json").write_text(golden.read_text())  # whole, but not what the manifest lists now
    done = subprocess.run([program, folder], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "golden.json is cut off or changed since it was built" in done.stderr


def test_a_component_that_was_not_built_is_refused_by_find_package(desk, prefix, tmp_path):
    root, _ = desk
    lines = ["cmake_minimum_required(VERSION 3.18)", "project(service CXX)",
             "find_package(vitprune REQUIRED COMPONENTS ort tensorrt)"]  # fmt: skip
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines))
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={root / 'vitprune'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert "was built without tensorrt; build it with -DVITPRUNE_TENSORRT=ON" in " ".join(done.stderr.split())


def test_what_is_missing_to_compile_is_named_with_its_package(prefix, tmp_path):
    command = ["cmake", "-S", CPP, "-B", tmp_path, "-DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert "`apt install nlohmann-json3-dev` or `vcpkg install nlohmann-json`" in " ".join(done.stderr.split())


def test_the_package_has_pythons_version():
    assert f"project(vitprune VERSION {vitprune.__version__} " in (CPP / "CMakeLists.txt").read_text()
