from __future__ import annotations

import argparse
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import images, randomise

from vitprune.errors import DamagedFile, InputError
from vitprune.model.checkpoint import read_checkpoint
from vitprune.model.timm import from_timm

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


@pytest.fixture
def source():
    model = timm.create_model(NAME, **TINY).eval()
    randomise(model)
    return model


def save(content, path):
    torch.save(content, path)
    return path


@torch.no_grad()
def check_loads(path, source, name=NAME, **model_args):
    ours = from_timm(name, checkpoint=path, **(TINY | model_args)).model
    torch.testing.assert_close(ours(images(2)), source(images(2)), rtol=0, atol=1e-5)  # fp32, logits of about 1


def test_reads_safetensors(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    check_loads(tmp_path / "model.safetensors", source)


@pytest.mark.parametrize(
    "layout",
    [
        lambda weights, other: weights,
        lambda weights, other: {"model": weights, "epoch": 3, "optimizer": {"state": {}}},
        lambda weights, other: {"state_dict": weights},
        lambda weights, other: {"model_ema": weights, "model": other},
        lambda weights, other: {"state_dict_ema": weights, "state_dict": other},
        lambda weights, other: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        lambda weights, other: {f"module._orig_mod.{name}": value for name, value in weights.items()},
        lambda weights, other: {"n_averaged": torch.tensor(7)} | {f"module.{n}": v for n, v in weights.items()},
        lambda weights, other: {"model": weights, "args": argparse.Namespace(lr=0.1, model="deit")},
    ],
)
def test_reads_what_trainers_write(layout, source, tmp_path):
    weights = source.state_dict()
    other = {name: torch.zeros_like(value) for name, value in weights.items()}
    check_loads(save(layout(weights, other), tmp_path / "checkpoint.pth"), source)


def test_reads_half_precision(source, tmp_path):
    source.half()
    path = save(source.state_dict(), tmp_path / "half.pth")
    check_loads(path, source.float())


def test_reads_the_layout_of_deit_3(tmp_path):
    source = timm.create_model("deit3_small_patch16_224", **TINY).eval()
    randomise(source)
    theirs = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in source.state_dict().items()}
    assert theirs.keys() != source.state_dict().keys()
    check_loads(save({"model": theirs}, tmp_path / "deit3.pth"), source, name="deit3_small_patch16_224")


def test_reads_a_distilled_deit(tmp_path):
    source = timm.create_model("deit_tiny_distilled_patch16_224", **TINY).eval()
    randomise(source)
    path = save({"model": source.state_dict()}, tmp_path / "deit.pth")
    check_loads(path, source, name="deit_tiny_distilled_patch16_224")


@torch.no_grad()
def test_resamples_a_checkpoint_of_another_image_size_as_timm_does(source, tmp_path):
    path = save(source.state_dict(), tmp_path / "checkpoint.pth")
    ours = from_timm(NAME, checkpoint=path, **(TINY | {"img_size": 40})).model
    source.set_input_size((40, 40))
    torch.testing.assert_close(ours(images(2, 40)), source(images(2, 40)), rtol=0, atol=1e-5)


def test_a_checkpoint_wins_over_timms_weights(source, tmp_path):
    path = save(source.state_dict(), tmp_path / "checkpoint.pth")
    from_timm(NAME, checkpoint=path, pretrained=True, **TINY)  # would need a network


@pytest.mark.parametrize(
    ("model_args", "sentence"),
    [
        ({"num_classes": 7}, r"2 weights of another shape \(head.weight is 10x32, not 7x32, head.bias is 10, not 7\)"),
        ({"num_classes": 7}, r"The checkpoint has 10 classes: set num_classes to that$"),
        ({"num_classes": 0}, r"2 weights not part of the model \(head.weight, head.bias\)"),
        ({"depth": 3}, r"12 weights missing \(blocks.2.norm1.weight, .*, \.\.\.\). The checkpoint has another depth"),
        ({"depth": 1}, r"12 weights not part of the model \(blocks.1.norm1.weight, .* depth, from block 1 on"),
        ({"in_chans": 1}, r"\(patch_embed.proj.weight is 32x3x4x4, not 32x1x4x4\)\. .* 3 channels: set in_chans"),
        ({"embed_dim": 64}, r"of another shape .* It is of another architecture"),
        ({"class_token": False, "global_pool": "avg"}, r"not part of the model \(cls_token.*another architecture"),
    ],
)
def test_explains_a_checkpoint_of_another_model(model_args, sentence, source, tmp_path):
    path = save(source.state_dict(), tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=sentence) as caught:
        from_timm(NAME, checkpoint=path, **(TINY | model_args))
    assert str(caught.value).startswith(f"{path} does not fit the model: ")


def test_explains_missing_weights(source, tmp_path):
    weights = source.state_dict()
    for name in ("head.weight", "head.bias"):
        del weights[name]
    path = save(weights, tmp_path / "headless.pth")
    with pytest.raises(InputError, match=r"2 weights missing .* no classifier: set num_classes to 0"):
        from_timm(NAME, checkpoint=path, **TINY)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "-legacy.pth"])
def test_names_a_file_that_is_cut_off(suffix, share, source, tmp_path):
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pth")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DamagedFile, match=rf"^{re.escape(str(path))}: cut off or not a \w+ file"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"not weights at all\n" * 100, b"\x80\x02K\x01.", b"<html><body>404</body></html>"]
)
def test_names_a_file_that_holds_something_else(content, tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises((DamagedFile, InputError), match=rf"^{re.escape(str(path))}: "):
        read_checkpoint(path)


class Trainer:
    """What a careless script leaves in a checkpoint."""


def test_does_not_run_what_a_file_holds(source, tmp_path):
    path = save({"model": source.state_dict(), "trainer": Trainer()}, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=r"holds [\w.]*Trainer besides tensors, .*save the weights alone"):
        read_checkpoint(path)


def test_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.pth: no such file"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, [torch.zeros(2)], torch.zeros(2)])
def test_names_a_file_without_weights(content, tmp_path):
    path = save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=r"no weights in it|expected a dictionary"):
        read_checkpoint(path)
