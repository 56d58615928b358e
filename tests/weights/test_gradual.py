"""Weights that go while a model trains: when, how many, and that they stay away."""

from __future__ import annotations

import pytest
import torch
from tiny import images, labelled_by, tiny_vit

from vitprune.errors import InputError
from vitprune.gradual import Gradual, KeptZeros
from vitprune.model.vit import fingerprint
from vitprune.recover import RecoverSettings, recover
from vitprune.sparsify import sparsify
from vitprune.surgery import build
from vitprune.weights.base import Pattern

SETTINGS = RecoverSettings(steps=12, lr=1e-3, checks=6)


@pytest.fixture
def teacher():
    return tiny_vit()


def copy_of(model):
    return build(model.config, model.state_dict())


def share_of_zeros(model, names):
    weights = [dict(model.named_modules())[name].weight for name in names]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def train(student, teacher, thinning, settings=SETTINGS, **options):
    return recover(student, teacher, labelled_by(teacher), images(16), settings, thinning=thinning, **options)


def test_zeros_stay_zeros_while_the_rest_recovers(teacher):
    sparse = sparsify(teacher, None, "magnitude", "2:4")
    student = copy_of(sparse.model)
    found = train(student, teacher, KeptZeros(student))
    assert min(check.loss for check in found.checks) < 0.9 * found.checks[0].loss
    for name, mask in sparse.masks.items():
        weight = dict(found.model.named_modules())[name].weight
        assert torch.equal(weight != 0, mask)
        assert not torch.equal(weight, dict(sparse.model.named_modules())[name].weight)


def test_without_the_hook_training_fills_the_zeros(teacher):
    student = copy_of(sparsify(teacher, None, "magnitude", "2:4").model)
    found = train(student, teacher, None)
    assert share_of_zeros(found.model, ["blocks.0.mlp.fc1"]) < 0.01


@pytest.mark.parametrize(
    ("rule", "shares"),
    [("cubic", [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0]), ("geometric", [0.2047, 0.3675, 0.4970, 0.6])],
)
def test_sparsity_rises_by_the_rule(rule, shares, teacher):
    student = copy_of(teacher)
    thinning = Gradual(student, None, "magnitude", sparsity=0.6, steps=4, end=0.5, rule=rule)
    seen = []
    train(
        student, teacher, thinning, progress=lambda *_: seen.append(round(share_of_zeros(student, thinning.chosen), 3))
    )
    wanted = [0.6 * share for share in shares] if rule == "cubic" else shares
    assert sorted(set(seen)) == pytest.approx(wanted, abs=2e-3)
    assert seen[0] == pytest.approx(wanted[0], abs=2e-3)  # the first at once
    assert seen[5] == pytest.approx(wanted[-1], abs=2e-3)  # the last after half of the steps
    assert share_of_zeros(student, thinning.chosen) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("method", ["cap", "mfac", "sparsegpt"])
def test_second_order_methods_prune_gradually(method, teacher):
    student = copy_of(teacher)
    thinning = Gradual(student, images(16), method, sparsity=0.5, steps=3)
    found = train(student, teacher, thinning)
    assert share_of_zeros(found.model, thinning.chosen) == pytest.approx(0.5, abs=1e-3)
    assert not found.model.training


def test_checks_before_the_last_pruning_are_not_handed_back(teacher):
    student = copy_of(teacher)
    thinning = Gradual(student, None, "magnitude", sparsity=0.9, steps=2, end=1.0)
    found = train(student, teacher, thinning)
    assert found.checks[0].loss < 0.01  # the dense student's
    assert share_of_zeros(found.model, thinning.chosen) == pytest.approx(0.9, abs=1e-3)


def test_a_training_that_time_ends_early_is_pruned_to_the_end(teacher):
    student = copy_of(teacher)
    thinning = Gradual(student, None, "magnitude", sparsity=0.9, steps=4, end=1.0)
    found = train(student, teacher, thinning, RecoverSettings(steps=10**6, seconds=0.5, checks=2))
    assert share_of_zeros(found.model, thinning.chosen) == pytest.approx(0.9, abs=1e-3)


def test_an_interrupted_training_prunes_on_where_it_was(teacher, tmp_path):
    def student_and_thinning():
        student = copy_of(teacher)
        return student, Gradual(student, images(16), "obd_fisher", sparsity=0.6, steps=4, end=0.75)

    def killer(step, steps, what):
        if step == 7:
            raise KeyboardInterrupt

    whole, thinning = student_and_thinning()
    train(whole, teacher, thinning)
    first, thinning = student_and_thinning()
    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(first, teacher, thinning, progress=killer, checkpoint=path)
    second, thinning = student_and_thinning()
    train(second, teacher, thinning, checkpoint=path)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_refused_pruning_leaves_the_student_alone_and_in_training(teacher):
    student, pictures = copy_of(teacher).train(), images(16)
    before, pictures[3] = fingerprint(student), torch.nan
    thinning = Gradual(student, pictures, "sparsegpt", sparsity=0.5)
    with pytest.raises(InputError, match="no number"):
        thinning.after_step(0.0)
    assert student.training
    assert fingerprint(student) == before


def test_2_to_4_is_made_in_one_step(teacher):
    student = copy_of(teacher)
    with pytest.raises(InputError, match="2:4 is made in one step, got 8"):
        Gradual(student, None, "magnitude", "2:4")
    found = train(student, teacher, Gradual(student, None, "magnitude", "2:4", steps=1))
    assert all(Pattern.parse("2:4").holds(block.mlp.fc1.weight != 0) for block in found.model.blocks)


@pytest.mark.parametrize("options", [{"steps": 0}, {"end": 1.5}, {"rule": "linear"}])
def test_options_out_of_range_are_a_sentence(options, teacher):
    with pytest.raises(InputError, match="gradual pruning takes"):
        Gradual(teacher, None, "magnitude", sparsity=0.5, **options)
