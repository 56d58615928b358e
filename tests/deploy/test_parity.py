"""Parity: agreement is found, disagreement is an error with figures, and a tie is neither."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from tiny import images, randomise, tiny_config, tiny_vit

from vitprune.errors import InputError, NotSupported
from vitprune.surgery import build
from vitprune_deploy.export.in_fp32 import write_in_fp32
from vitprune_deploy.export.onnx import export_module, export_onnx
from vitprune_deploy.export.parity import Tolerance, check_parity


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = tiny_vit(depth=1)
    path = tmp_path_factory.mktemp("parity") / "dense.onnx"
    export_onnx(model, path)
    return model, path


@pytest.fixture(scope="module")
def reducing(tmp_path_factory):
    """A model that drops tokens, and a file whose attention scores are larger by twenty millionths."""
    model = build(tiny_config(depth=2, keep={0: 30}, reducer="evit"))
    randomise(model)
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        nudged.blocks[0].attn.qkv.weight.mul_(1 + 2e-5)
    path = tmp_path_factory.mktemp("parity") / "reducing.onnx"
    export_onnx(nudged, path)
    return model, path


def kept(model, image):
    """The patches that the first block keeps of one image, in the order of their scores."""
    state = model.embed(image)
    *_, attention = model.blocks[0].attend(state)
    return attention.class_row().mean(1)[:, 1:].topk(29).indices.sort().values


@torch.no_grad()
def on_the_edge(model):
    """Images around a point at which, in fp32, one patch takes another's place among those kept."""
    first, second = images(2, seed=5).split(1)
    low, high = 0.0, 1.0
    start = kept(model, first)
    for _ in range(40):
        middle = (low + high) / 2
        if torch.equal(kept(model, first.lerp(second, middle)), start):
            low = middle
        else:
            high = middle
    return torch.cat([first.lerp(second, high + step * 1e-6) for step in range(-12, 13)])


def test_a_faithful_file_agrees_in_every_image_at_every_batch(dense):
    found = check_parity(*dense, images(10), batches=(1, 3))
    assert [(case.batch, case.image_size, case.images) for case in found.cases] == [
        (1, (28, 28), 3),
        (3, (28, 28), 9),  # dealt out 1, 3, 1, 3, ...; the last batch is filled up from the front
    ]
    assert found.images == 12
    assert (found.top1_agreement, found.ties) == (100.0, 0)
    assert found.max_abs < 1e-5  # fp32, one block


def test_without_images_random_ones_serve_each_case_once(dense):
    assert [case.images for case in check_parity(*dense).cases] == [1, 3]


def test_a_file_with_dynamic_size_is_compared_at_two(tmp_path):
    model = tiny_vit(depth=1, dynamic_image_size=True)
    export_onnx(model, tmp_path / "m.onnx", image_size=((16, 56), (16, 56)))
    sizes = {case.image_size for case in check_parity(model, tmp_path / "m.onnx").cases}
    assert sizes == {(28, 28), (20, 32)}


def test_a_file_with_fixed_batch_is_compared_at_that(tmp_path):
    model = tiny_vit(depth=1)
    export_onnx(model, tmp_path / "m.onnx", batch=2)
    assert [case.batch for case in check_parity(model, tmp_path / "m.onnx").cases] == [2]


@pytest.mark.parametrize("opset", [22, 23])
def test_a_bf16_file_is_compared_although_nothing_here_has_kernels_for_it(opset, tmp_path):
    model = tiny_vit(depth=1)
    export_onnx(model, tmp_path / "m.onnx", precision="bf16", opset=opset)
    found = check_parity(model, tmp_path / "m.onnx", images(8), precision="bf16")
    assert 1e-3 < found.max_abs < 0.2  # rounded to 8 bits at every step, of logits up to 3
    assert found.top1_agreement == 100.0
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    with torch.no_grad():
        model.head.bias[3] += 0.1  # less than bf16 may be off; without its rounding it shows
    with pytest.raises(NotSupported, match=r"m\.onnx, computed in fp32: 1 of 1 images .* from torch by up to 0\.1 "):
        check_parity(model, tmp_path / "m.onnx", images(4), precision="bf16")


def test_results_are_rounded_as_bf16_rounds_them(tmp_path):
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(0.1, 7.3, 64))

        def forward(self, x):
            return (x.bfloat16() * self.weight).float()

    product = Product().bfloat16()
    export_module(product, (torch.zeros(2, 64),), tmp_path / "m.onnx", dynamic=[{}], names=(["x"], ["y"]))
    (tmp_path / "fp32").mkdir()
    session = onnxruntime.InferenceSession(
        write_in_fp32(tmp_path / "m.onnx", tmp_path / "fp32", rounded=True), providers=["CPUExecutionProvider"]
    )
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), product(x).detach(), rtol=0, atol=0)


def test_fp16_that_overflows_is_an_error_that_names_bf16(tmp_path):
    model = tiny_vit(depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 1e5
    export_onnx(model, tmp_path / "m.onnx", precision="fp16")
    with pytest.raises(NotSupported, match="something left the range of fp16, which ends at 65504: bf16 would hold it"):
        check_parity(model, tmp_path / "m.onnx", images(2), precision="fp16")


def test_one_ranking_for_all_images_is_followed_too(tmp_path):
    model = tiny_vit(depth=2, reducer="psvit", keep={0: 30})
    export_onnx(model, tmp_path / "m.onnx")
    with torch.no_grad():
        model.head.bias[3] += 0.1
    with pytest.raises(NotSupported, match=r"differ from torch by up to 0\.1 "):
        check_parity(model, tmp_path / "m.onnx", images(2))


def test_other_weights_are_an_error_with_figures(dense):
    other = tiny_vit(depth=1, seed=1)
    with pytest.raises(NotSupported, match=r"1 of 1 images \[1, 3, 28, 28\] differ from torch by up to \d.* allowed"):
        check_parity(other, dense[1])


def test_a_model_without_classes_has_no_top1(tmp_path):
    model = tiny_vit(depth=1, classes=0)
    export_onnx(model, tmp_path / "m.onnx", names=("images", "features"))
    assert check_parity(model, tmp_path / "m.onnx").top1_agreement is None


def test_tied_tokens_are_counted_and_do_not_fail(reducing):
    found = check_parity(*reducing, on_the_edge(reducing[0]), batches=(5,))
    assert found.ties > 0  # the file keeps another patch than torch does
    assert found.max_abs < 1e-4  # and agrees as soon as torch keeps that patch too


def test_what_is_a_tie_is_a_matter_of_the_tolerance(reducing):
    edge = on_the_edge(reducing[0])
    with pytest.raises(NotSupported, match="not because scores are tied"):
        check_parity(*reducing, edge, batches=(5,), tolerance=Tolerance(output=1e-4, score=0.0))


def test_another_selection_is_no_tie(reducing):
    model = copy.deepcopy(reducing[0])
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:32] *= -1  # queries turned round: the least attended patches come first
    with pytest.raises(NotSupported, match="not because scores are tied"):
        check_parity(model, reducing[1], images(4))


def test_an_error_behind_the_selection_is_no_tie(reducing):
    model = copy.deepcopy(reducing[0])
    with torch.no_grad():
        model.head.bias[3] += 0.1
    with pytest.raises(NotSupported, match=r"differ from torch by up to 0\.1 "):
        check_parity(model, reducing[1], images(4))


def test_a_count_that_the_export_has_fixed_shows_at_the_second_size(tmp_path, monkeypatch):
    model = build(tiny_config(depth=2, keep={0: 30}, reducer="evit", dynamic_image_size=True))
    randomise(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.blocks[0]), "kept", lambda self, state: 30 if self.keep else None)
        export_onnx(model, tmp_path / "m.onnx", image_size=((24, 56), (24, 56)))
    assert check_parity(model, tmp_path / "m.onnx", image_sizes=[(28, 28)]).max_abs < 1e-5  # one size shows nothing
    with pytest.raises(NotSupported, match=r"images \[1, 3, 40, 40\] differ"):
        check_parity(model, tmp_path / "m.onnx", batches=(1,), image_sizes=[(28, 28), (40, 40)])


def test_no_images_are_an_error(dense):
    with pytest.raises(InputError, match="at least one image"):
        check_parity(*dense, images(0))
