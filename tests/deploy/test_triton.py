"""``package triton``: what it writes is read back with Triton's own schema; the server itself runs in none of these."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from outputs import CLASSES, PREPROCESS, described, exported, written
from PIL import Image

from vitprune.errors import DamagedFile, InputError, MissingError
from vitprune_deploy import cli, runtime
from vitprune_deploy.artifact import verify
from vitprune_deploy.backends.onnxruntime import OnnxRuntime
from vitprune_deploy.backends.tensorrt import EngineOptions, Shapes, build_engine, sidecar_path
from vitprune_deploy.data import Preprocess
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.files import sha256_file
from vitprune_deploy.triton import write_repository
from vitprune_deploy.triton.pbtxt import Word, entries, to_text

IMAGE = (3, 28, 28)


@pytest.fixture(scope="module")
def schema():
    """Triton's messages, as its client ships them."""
    return pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")


@pytest.fixture
def parse(schema):
    """From a model's folder to its configuration; a field or value that Triton does not know is an error."""
    from google.protobuf import text_format

    return lambda folder: text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def packaged(folders, repository, **options):
    folders = [folders] if isinstance(folders, Path) else folders
    return write_repository(folders, repository, **{"name": "flowers", "queue_delay_us": 700} | options)


def planned(folder, capability="8.9", batches=((1, 4, 8),), manifest=None, sizes=IMAGE, **engine):
    """An output folder with a TensorRT plan; its bytes are anything, since nothing here runs it."""
    plan = folder / "engine" / "model.tensorrt.fp16.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(f"plan for {capability}".encode())
    sidecar = {
        "runtime": "tensorrt",
        "version": "11.4.0",
        "sha256": sha256_file(plan),
        "inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", *sizes]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}],
        "profiles": [{"images": [[size, *IMAGE] for size in profile]} for profile in batches],
        "compute_capabilities": [capability],
    }
    sidecar_path(plan).write_text(json.dumps(sidecar))
    files = [f"engine/{plan.name}", f"engine/{sidecar_path(plan).name}"]
    served = {"runtime": "tensorrt", "precision": "fp16", "min_batch": 1, "max_batch": 8}
    return described(folder, files, manifest, **served | engine)


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---- an ONNX file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = written(tmp_path_factory.mktemp("built"), max_batch=8, manifest={"device": {"threads": 2}})
    return folder, packaged(folder, tmp_path_factory.mktemp("models")).folder


def test_tensors_and_batches_are_those_of_the_onnx_file(built, parse, schema):
    config, graph = parse(built[1]), onnx.load(built[0] / "model.onnx").graph
    assert (config.name, config.backend, config.max_batch_size) == ("flowers", "onnxruntime", 8)
    for ours, theirs in ((config.input, graph.input), (config.output, graph.output)):
        assert [one.name for one in ours] == [one.name for one in theirs]
        for one, value in zip(ours, theirs, strict=True):
            batch, *sizes = value.type.tensor_type.shape.dim
            assert batch.dim_param  # free, so that Triton may make batches
            assert list(one.dims) == [size.dim_value for size in sizes]
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            assert schema.DataType.Name(one.data_type) == "TYPE_FP32"


def test_requests_share_batches_and_instances_run_where_the_build_did(built, parse, schema):
    config = parse(built[1])
    assert config.dynamic_batching.max_queue_delay_microseconds == 700
    assert list(config.dynamic_batching.preferred_batch_size) == []
    kinds = [(group.count, group.kind) for group in config.instance_group]
    assert kinds == [(1, schema.ModelInstanceGroup.KIND_CPU)]
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert not config.HasField("optimization")


def test_the_first_and_the_largest_batch_are_warmed_up(built, parse):
    config = parse(built[1])
    assert [sample.batch_size for sample in config.model_warmup] == [1, 8]
    for sample in config.model_warmup:
        assert list(sample.inputs) == ["images"]
        assert tuple(sample.inputs["images"].dims) == IMAGE
        assert sample.inputs["images"].data_type == config.input[0].data_type
        assert sample.inputs["images"].zero_data


def test_preprocessing_labels_and_the_manifest_go_with_the_model(built, parse):
    folder, model = built
    config = parse(model)
    constants = json.loads(config.parameters["vitprune.preprocess"].string_value)
    assert Preprocess.from_dict(constants) == PREPROCESS
    assert config.parameters["vitprune.manifest_sha256"].string_value == sha256_file(folder / "manifest.json")
    assert config.output[0].label_filename == "labels.txt"
    assert (model / "labels.txt").read_text().splitlines() == CLASSES
    assert names_in(model) == ["1/model.onnx", "config.pbtxt", "labels.txt", "vitprune.json"]


def test_a_client_of_the_repository_gets_what_the_build_gives(built, parse):
    folder, model = built
    images = [np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8) for seed in range(5)]
    preprocess = Preprocess.from_dict(json.loads(parse(model).parameters["vitprune.preprocess"].string_value))
    inputs = np.stack([preprocess(Image.fromarray(image)) for image in images])
    with OnnxRuntime.load(model / "1" / "model.onnx") as copied, runtime.load(folder) as original:
        logits, want = copied.run(inputs), original.predict(images)
    np.testing.assert_allclose(logits, want.logits, rtol=0, atol=1e-6)  # the same file and kernels
    labels = (model / "labels.txt").read_text().splitlines()
    assert [labels[i] for i in logits.argmax(axis=1)] == [row[0] for row in want.top().labels]


@pytest.mark.parametrize(("batch", "dims"), [(4, [4, *IMAGE]), (1, [1, *IMAGE])])
def test_a_fixed_batch_stays_in_the_shape_and_nothing_is_put_together(tmp_path, parse, batch, dims):
    config = parse(packaged(written(tmp_path, batch, max_batch=batch), tmp_path / "models").folder)
    assert config.max_batch_size == 0
    assert [list(one.dims) for one in (*config.input, *config.output)] == [dims, [batch, 10]]
    assert not config.HasField("dynamic_batching")
    assert [(s.batch_size, list(s.inputs["images"].dims)) for s in config.model_warmup] == [(1, dims)]


def test_an_engine_that_takes_no_single_image_is_left_to_its_clients(tmp_path, parse):
    config = parse(packaged(written(tmp_path, (1, 8), min_batch=2, max_batch=8), tmp_path / "models").folder)
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [-1, *IMAGE])
    assert list(config.model_warmup[0].inputs["images"].dims) == [2, *IMAGE]


def test_free_heights_and_widths_are_free_in_triton_and_warmed_up_at_the_budgets_size(tmp_path, parse):
    (tmp_path / "model.onnx").write_bytes(exported((1, 8), ((20, 32), (28, 28))))
    budget = {"latency_ms": 1.0, "percentile": 50, "batch": 1, "image_size": (24, 28)}
    folder = described(tmp_path, ["model.onnx"], {"budget": budget}, max_batch=8)
    config = parse(packaged(folder, tmp_path / "models").folder)
    assert list(config.input[0].dims) == [3, -1, 28]
    assert [list(sample.inputs["images"].dims) for sample in config.model_warmup] == [[3, 24, 28]] * 2


def test_weights_beside_the_file_go_with_it_and_give_the_same_answers(tmp_path, parse):
    folder = tmp_path / "built"
    folder.mkdir()
    model = onnx.load_from_string(exported((1, 8)))
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    described(folder, ["model.onnx", "model.onnx.data"], max_batch=8)
    packed = packaged(folder, tmp_path / "models").folder
    assert [name for name in names_in(packed) if name.startswith("1/")] == [
        "1/model.onnx/model.onnx",
        "1/model.onnx/model.onnx.data",
    ]
    assert parse(packed).max_batch_size == 8
    inputs = tiny.images(3).numpy()
    with OnnxRuntime.load(packed / "1/model.onnx/model.onnx") as copied, runtime.load(folder) as original:
        np.testing.assert_array_equal(copied.run(inputs), original.predict(inputs).logits)


def test_a_model_without_class_names_has_no_labels(tmp_path, parse):
    packed = packaged(written(tmp_path, manifest={"classes": None}), tmp_path / "models").folder
    assert parse(packed).output[0].label_filename == ""
    assert "labels.txt" not in names_in(packed)


@pytest.mark.parametrize(
    ("options", "kind", "accelerators"),
    [
        ({"provider": "cuda"}, "KIND_GPU", {}),
        ({"provider": "cuda", "provider_options": {"use_tf32": 0}}, "KIND_GPU", {"cuda": {"use_tf32": "0"}}),
        ({"provider": "TensorrtExecutionProvider"}, "KIND_GPU", {"tensorrt": {}}),
        (
            {
                "provider": "tensorrt",
                "provider_options": {
                    "trt_fp16_enable": True,
                    "trt_max_workspace_size": 1 << 30,
                    "trt_engine_cache_enable": True,
                },
            },
            "KIND_GPU",
            {"tensorrt": {"precision_mode": "FP16", "max_workspace_size_bytes": "1073741824",
                          "trt_engine_cache_enable": "1"}},
        ),
        ({"provider": "openvino", "provider_options": {}}, "KIND_CPU", {"openvino": {}}),
        ({"provider": "cpu", "provider_options": {}}, "KIND_CPU", {}),
    ],
    ids=range(6),
)  # fmt: skip
def test_the_provider_of_the_build_is_the_one_in_triton(tmp_path, parse, schema, options, kind, accelerators):
    config = parse(packaged(written(tmp_path, options=options), tmp_path / "models").folder)
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.Kind.Value(kind)
    named = config.optimization.execution_accelerators
    given = [*named.gpu_execution_accelerator, *named.cpu_execution_accelerator]
    assert {one.name: dict(one.parameters) for one in given} == accelerators
    assert bool(named.gpu_execution_accelerator) == (kind == "KIND_GPU" and bool(accelerators))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"provider": "coreml"}, "provider coreml, which Triton does not have; build for cpu, openvino, cuda"),
        ({"provider": "openvino", "provider_options": {"device_type": "GPU"}}, r"for openvino \(device_type\), and T"),
        ({"provider": "tensorrt", "provider_options": {"trt_nonsense": 1}}, "option trt_nonsense, which Triton doe"),
        (
            {"provider": "tensorrt", "provider_options": {"trt_fp16_enable": 1, "trt_int8_enable": 1}},
            "with FP16 and INT8 together, and Triton takes one of them",
        ),
    ],
)
def test_what_triton_cannot_do_as_the_build_did_is_refused(tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        packaged(written(tmp_path, options=options), tmp_path / "models")
    assert not (tmp_path / "models").exists()


# ---- TensorRT plans -------------------------------------------------------------------------------------------------


def test_a_plan_is_served_by_the_tensorrt_backend(tmp_path, parse, schema):
    folder = planned(tmp_path / "built")
    packed = packaged(folder, tmp_path / "models").folder
    config = parse(packed)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 8)
    assert [list(one.dims) for one in (*config.input, *config.output)] == [list(IMAGE), [10]]
    group = config.instance_group[0]
    assert (group.kind, list(group.profile)) == (schema.ModelInstanceGroup.KIND_GPU, ["0"])
    assert list(config.dynamic_batching.preferred_batch_size) == []
    assert not config.cc_model_filenames
    assert "intra_op_thread_count" not in config.parameters
    assert names_in(packed) == ["1/model.plan", "config.pbtxt", "labels.txt", "vitprune.json"]
    assert (packed / "1" / "model.plan").read_bytes() == b"plan for 8.9"


def test_the_batches_that_several_profiles_are_tuned_for_are_preferred(tmp_path, parse):
    folder = planned(tmp_path / "built", batches=[(1, 1, 2), (1, 8, 8), (1, 32, 64)])
    config = parse(packaged(folder, tmp_path / "models").folder)
    assert list(config.instance_group[0].profile) == ["0", "1", "2"]
    assert config.max_batch_size == 8  # as the manifest says, although a profile would take more
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 8]


def test_no_batch_is_larger_than_the_profile_takes(tmp_path, parse):
    folder = planned(tmp_path / "built", batches=[(1, 2, 4)], max_batch=8)
    assert parse(packaged(folder, tmp_path / "models").folder).max_batch_size == 4


def test_plans_for_several_gpus_make_one_model(tmp_path, parse):
    folders = [planned(tmp_path / one, one, max_batch=most) for one, most in (("8.6", 8), ("8.9", 4))]
    written_ = packaged(folders, tmp_path / "models")
    config = parse(written_.folder)
    assert dict(config.cc_model_filenames) == {"8.6": "model_sm86.plan", "8.9": "model_sm89.plan"}
    assert config.max_batch_size == 4  # what all of them take
    for capability, name in config.cc_model_filenames.items():
        assert (written_.folder / "1" / name).read_bytes() == f"plan for {capability}".encode()
    assert "1/model.plan" not in names_in(written_.folder)  # another GPU must not fall back on a plan that is not its
    for folder in folders:
        digest = config.parameters[f"vitprune.manifest_sha256.{folder.name}"].string_value
        assert digest == sha256_file(folder / "manifest.json")


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (lambda folder: planned(folder, "8.9"), "are both for compute capability 8.9; give one of them"),
        (lambda folder: planned(folder, "8.6", sizes=(3, 32, 32)), "differ in their tensors"),
        (lambda folder: planned(folder, "8.6", manifest={"classes": None}), "differ in .* classes"),
        (lambda folder: planned(folder, "8.6", batches=[(1, 1, 8), (1, 8, 8)]), "differ in .* optimisation profiles"),
        (lambda folder: planned(folder, "8.0+"), r"capability 8\.0\+, and Triton chooses by exact ones"),
        (lambda folder: folder.mkdir() or written(folder), "has an engine for onnxruntime: several folders make one"),
    ],
    ids=range(6),
)
def test_folders_that_make_no_single_model_are_refused(tmp_path, second, says):
    folders = [planned(tmp_path / "first"), second(tmp_path / "second")]
    with pytest.raises(InputError, match=says):
        packaged(folders, tmp_path / "models")


def test_what_a_real_sidecar_says_is_understood(tmp_path, parse):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    (tmp_path / "engine").mkdir()
    export_onnx(tiny.tiny_vit(depth=1), tmp_path / "small.onnx")
    shapes = {"images": Shapes((1, *IMAGE), (4, *IMAGE), (8, *IMAGE))}
    plan = tmp_path / "engine" / "model.plan"
    build_engine(tmp_path / "small.onnx", plan, EngineOptions(profiles=(shapes,), module="tensorrt_rtx"))
    files = [f"engine/{path.name}" for path in (plan, sidecar_path(plan))]
    config = parse(packaged(described(tmp_path, files, runtime="tensorrt"), tmp_path / "models").folder)
    assert config.max_batch_size == 8
    assert [list(one.dims) for one in (*config.input, *config.output)] == [list(IMAGE), [10]]


def test_engines_that_triton_has_no_backend_for_are_refused_with_what_would_be_right(tmp_path):
    folder = planned(tmp_path / "built", runtime="tensorrt-rtx")
    for asked in (None, "tensorrt-rtx"):
        with pytest.raises(InputError, match=r"no backend for TensorRT-RTX, .*; build one with the runtime onn"):
            packaged(folder, tmp_path / "models", runtime=asked)
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other")
    with pytest.raises(InputError, match="it has no engine for tensorrt, only onnxruntime"):
        packaged(other, tmp_path / "models", runtime="tensorrt")
    with pytest.raises(InputError, match="--runtime must be onnxruntime or tensorrt, got 'torch'"):
        packaged(folder, tmp_path / "models", runtime="torch")


def test_of_several_engines_the_one_that_was_run_is_served_unless_another_is_named(tmp_path, parse):
    folder = planned(tmp_path / "built", status="built")
    plain = json.loads((folder / "manifest.json").read_text())
    (folder / "model.onnx").write_bytes(exported((1, 8)))
    files = [*plain["files"], "model.onnx"]
    run = {"runtime": "onnxruntime", "precision": "fp32", "status": "run", "file": "model.onnx", "max_batch": 8}
    described(folder, files, {"engines": [*plain["engines"], run]})
    assert parse(packaged(folder, tmp_path / "models").folder).backend == "onnxruntime"
    assert parse(packaged(folder, tmp_path / "models", runtime="tensorrt").folder).backend == "tensorrt"


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [lambda plan: plan, sidecar_path], ids=["plan", "sidecar"])
def test_a_folder_that_was_tampered_with_is_refused(tmp_path, which):
    folder = planned(tmp_path / "built")
    changed = which(folder / "engine" / "model.tensorrt.fp16.plan")
    with changed.open("ab") as file:
        file.write(b" ")
    with pytest.raises(DamagedFile, match=f"{changed.name} is cut off or changed since it was built"):
        packaged(folder, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_bytes_that_are_no_onnx_file_are_refused(tmp_path):
    for content in (b"", b"\xff" * 9):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(DamagedFile, match=r"model\.onnx is no ONNX file"):
            packaged(described(tmp_path, ["model.onnx"]), tmp_path / "models")


def test_a_model_of_ours_is_replaced_as_a_whole(tmp_path, parse):
    first = packaged(written(tmp_path), tmp_path / "models").folder
    second = packaged(planned(tmp_path / "other", manifest={"classes": None}), tmp_path / "models").folder
    assert first == second
    assert names_in(second) == ["1/model.plan", "config.pbtxt", "vitprune.json"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["flowers"]
    assert oct(second.stat().st_mode & 0o777) == "0o755"  # a server in a container is another user


@pytest.mark.parametrize(
    "meddle",
    [
        lambda folder: (folder / "config.pbtxt").write_text("max_batch_size: 2\n"),
        lambda folder: (folder / "2").mkdir() or (folder / "2" / "model.onnx").write_bytes(b"theirs"),
        lambda folder: (folder / "vitprune.json").unlink(),
        lambda folder: (folder / "vitprune.json").write_text("[]"),
        lambda folder: (folder / "labels.txt").unlink(),
        lambda folder: shutil.rmtree(folder) or folder.write_text("a file"),
    ],
    ids=["edited", "a second version", "no record", "another record", "a file less", "no folder"],
)
def test_what_others_wrote_or_changed_is_never_overwritten(tmp_path, meddle):
    folder = packaged(written(tmp_path), tmp_path / "models").folder
    meddle(folder)
    before = names_in(tmp_path / "models")
    with pytest.raises(InputError, match="flowers was not written by this command, or has been changed since; remove"):
        packaged(tmp_path, tmp_path / "models")
    assert names_in(tmp_path / "models") == before


def test_a_disk_that_fills_up_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    folder = packaged(written(tmp_path), tmp_path / "models").folder
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(MissingError, match="no room left on the disk"):
        packaged(tmp_path, tmp_path / "models", queue_delay_us=5)
    assert {name: (folder / name).read_bytes() for name in names_in(tmp_path / "models" / "flowers")} == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["flowers"]


def test_what_a_killed_run_left_is_swept_and_other_models_are_let_be(tmp_path):
    for left in (".tmp-flowers-k1ll_d00", ".tmp-flowers-fp16-k1ll_d00"):
        (tmp_path / "models" / left).mkdir(parents=True)
    packaged(written(tmp_path), tmp_path / "models")
    assert names_in_repository(tmp_path / "models") == [".tmp-flowers-fp16-k1ll_d00", "flowers"]


def names_in_repository(repository):
    return sorted(path.name for path in repository.iterdir())


@pytest.mark.parametrize(("manifest", "name"), [({"name": "../out"}, None), ({}, "a b"), ({"name": ".hidden"}, None)])
def test_a_name_that_is_no_folder_of_the_repository_is_refused(tmp_path, manifest, name):
    with pytest.raises(InputError, match=r"must be made of letters, digits and \._-, got .*; give one with --name"):
        packaged(written(tmp_path, manifest=manifest), tmp_path / "models", name=name)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_into_the_builds_folder_and_says_how_to_serve_it(tmp_path, parse, capsys):
    folder = written(tmp_path, max_batch=8, manifest={"name": "quick"})
    assert cli.main(["package", "triton", str(folder), "--queue-delay-us", "250"]) == 0
    text = capsys.readouterr().out
    assert f"{folder}/triton/quick/1/model.onnx\n" in text
    assert "Triton puts requests together, up to 8 images" in text
    assert f"tritonserver --model-repository={folder.resolve()}/triton\n" in text
    assert parse(folder / "triton" / "quick").dynamic_batching.max_queue_delay_microseconds == 250
    verify(folder)  # which is as whole as before


def test_the_command_tells_a_program_what_it_wrote(tmp_path, capsys):
    folders = [str(planned(tmp_path / one, one)) for one in ("8.6", "8.9")]
    asked = ["package", "triton", *folders, "--output", str(tmp_path / "models"), "--name", "flowers", "--json"]
    assert cli.main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "flowers"
    assert found["files"]["1/model_sm86.plan"] == sha256_file(tmp_path / "models" / "flowers" / "1" / "model_sm86.plan")


@pytest.mark.parametrize(
    ("batch", "served", "says"),
    [
        (1, {}, "the engine takes 1 image;"),
        (4, {}, "the engine takes 4 images;"),
        ((1, 8), {"min_batch": 2, "max_batch": 8}, "the engine takes 2 to 8 images;"),
    ],
)
def test_the_command_says_why_no_batches_are_formed(tmp_path, capsys, batch, served, says):
    assert cli.main(["package", "triton", str(written(tmp_path, batch, **served)), "--name", "one"]) == 0
    assert says in capsys.readouterr().out


# ---- the text format ------------------------------------------------------------------------------------------------


def test_texts_come_back_as_they_were(schema):
    from google.protobuf import text_format

    texts = {'a "quote"': 'C:\\new, "quotes"\nand a line', "unicode": "Blüte 花", "empty": ""}
    parameters = entries({key: {"string_value": text} for key, text in texts.items()})
    config = text_format.Parse(to_text({"name": "x", "parameters": parameters}), schema.ModelConfig())
    assert {key: value.string_value for key, value in config.parameters.items()} == texts


def test_the_format_is_plain():
    group = {"count": 1, "kind": Word("KIND_GPU"), "profile": ["0"], "passive": True}
    assert to_text({"input": [{"dims": [3, -1]}], "instance_group": [group]}) == (
        "input {\n  dims: [3, -1]\n}\n"
        'instance_group {\n  count: 1\n  kind: KIND_GPU\n  profile: ["0"]\n  passive: true\n}\n'
    )
