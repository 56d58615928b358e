from __future__ import annotations

import pytest
import torch
from tiny import images, labelled_by, tiny_vit

from vitprune.errors import InputError
from vitprune.recover import RecoverSettings, recover
from vitprune.sparsify import MLP, sparsify
from vitprune.zeros import Growth, Zeros

LAYERS = [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("fc1", "fc2")]


def by_magnitude(model, sparsity):
    return sparsify(model, None, "magnitude", "unstructured", sparsity, layers=MLP)


def share_of_zeros(model):
    weights = [model.get_submodule(name).weight for name in LAYERS]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def train(student, zeros, steps=24, **more):
    teacher = tiny_vit(seed=1)
    settings = RecoverSettings(steps=steps, lr=2e-3, checks=6)
    return recover(student, teacher, labelled_by(teacher), images(16), settings, zeros=zeros, **more)


def test_what_is_zero_stays_so_and_the_rest_learns():
    student = sparsify(tiny_vit(), None, "magnitude", "2:4").model
    before = {name: student.get_submodule(name).weight.detach().clone() for name in LAYERS}
    found = train(student, Zeros(student, LAYERS)).model
    for name, old in before.items():
        new = found.get_submodule(name).weight
        assert torch.equal(new != 0, old != 0)
        assert not torch.equal(new, old)
    dense = train(sparsify(tiny_vit(), None, "magnitude", "2:4").model, None).model
    assert share_of_zeros(dense) == 0  # without being held they are gone after a step


def test_zeros_grow_along_a_cubic_and_are_all_there_before_the_training_ends():
    growth, seen = Growth(by_magnitude, 0.8, steps=4, until=0.5), []
    assert [growth.due(done) for done in (0, 0.16, 0.17, 0.34, 0.5, 1)] == [1, 1, 2, 3, 4, 4]
    student = tiny_vit()
    found = train(student, Zeros(student, LAYERS, growth), progress=lambda *_: seen.append(share_of_zeros(student)))
    shares = sorted({round(share, 3) for share in seen})
    assert shares == pytest.approx([0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8 * (1 - 0.25**3), 0.8], abs=2e-3)
    assert seen == sorted(seen)
    assert share_of_zeros(found.model) == pytest.approx(0.8, abs=1e-3)  # though the untrained model had the least loss


def test_zeros_that_are_due_come_at_the_end_of_a_training_that_is_cut_short():
    student = tiny_vit()
    found = train(student, Zeros(student, LAYERS, Growth(by_magnitude, 0.6, steps=3, until=1.0)), steps=1)
    assert share_of_zeros(found.model) == pytest.approx(0.6, abs=1e-3)


def test_a_training_with_growing_zeros_goes_on_where_it_was(tmp_path):
    def grown(student):
        return Zeros(student, LAYERS, Growth(by_magnitude, 0.8, steps=4, until=0.5))

    whole = tiny_vit()
    wanted = train(whole, grown(whole)).model.state_dict()

    def stop(step, *_):
        if step == 14:
            raise KeyboardInterrupt

    first, second, path = tiny_vit(), tiny_vit(), tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(first, grown(first), progress=stop, checkpoint=path)
    resumed = train(second, grown(second), checkpoint=path).model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in wanted.items())


def test_gradients_of_zeros_have_no_say_in_clipping():
    student = sparsify(tiny_vit(), None, "magnitude", "2:4").model
    zeros = Zeros(student, LAYERS)
    student(images(4)).square().sum().backward()
    zeros.mask_gradients()
    for name in LAYERS:
        weight = student.get_submodule(name).weight
        assert not weight.grad[weight == 0].any()
        assert weight.grad[weight != 0].any()


def test_a_layer_that_is_not_there_is_a_sentence():
    with pytest.raises(InputError, match=r"the model has no linear layer blocks\.7\.mlp\.fc1"):
        Zeros(tiny_vit(), ["blocks.7.mlp.fc1"])
