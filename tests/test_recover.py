"""Recovery: it learns, it never hands back something worse, and an interruption changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import images, randomise, tiny_config, tiny_vit

from vitprune.errors import InputError
from vitprune.model.vit import fingerprint
from vitprune.objectives import Distillation
from vitprune.plan import BlockPlan, Plan
from vitprune.recover import Batch, RecoverSettings, _Run, learning_rate_share, recover
from vitprune.surgery import build, prune
from vitprune.tokens.base import Recipe


@pytest.fixture
def teacher():
    return tiny_vit()


@pytest.fixture
def student(teacher):
    keep = BlockPlan(heads=(0, 1, 2), mlp=tuple(range(48)))
    return prune(teacher, Plan(fingerprint(teacher), teacher.config.patches, None, (keep, keep)))


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        yield Batch(torch.randn(8, 3, 28, 28, generator=generator))


def the_same_again(epoch):
    """Batches of 8 out of 20 images; half of the last batch came in the first one."""
    for numbers in torch.arange(24).remainder(20).split(8):
        yield Batch(images(20)[numbers], numbers)


def test_the_held_out_loss_falls(student, teacher):
    settings = RecoverSettings(steps=24, lr=2e-3, checks=3)
    found = recover(student, teacher, batches, images(16), settings)
    assert [check.step for check in found.checks] == [0, 8, 16, 24]
    assert found.checks[-1].loss < 0.8 * found.checks[0].loss
    assert not found.model.training


def test_a_ruinous_learning_rate_hands_back_the_student_as_it_came(student, teacher):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    found = recover(student, teacher, batches, images(16), RecoverSettings(steps=6, lr=3.0, checks=2))
    assert min(found.checks, key=lambda check: check.loss).step == 0
    assert all(torch.equal(before[name], value) for name, value in found.model.state_dict().items())


def test_an_interrupted_training_ends_as_an_uninterrupted_one(student, teacher, tmp_path):
    settings = RecoverSettings(steps=8, lr=1e-3, checks=4)
    twin = prune(student, Plan.dense(fingerprint(student), student.config.patches, [3, 3], [48, 48]))
    whole = recover(twin, teacher, batches, images(16), settings)

    class Killed(Exception):
        pass

    def killer(step, steps, what):
        if step == 5:
            raise Killed

    first = prune(student, Plan.dense(fingerprint(student), student.config.patches, [3, 3], [48, 48]))
    with pytest.raises(Killed):
        recover(first, teacher, batches, images(16), settings, progress=killer, checkpoint=tmp_path / "state.pt")
    resumed = recover(student, teacher, batches, images(16), settings, checkpoint=tmp_path / "state.pt")
    assert [check.step for check in resumed.checks] == [0, 2, 4, 6, 8]
    for name, value in whole.model.state_dict().items():
        # the same steps in the same order: equal but for the order of sums in threads
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.iterdir())


def stop_at(last):
    def progress(step, steps, what):
        if step == last:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("change", ["cut off", "another student", "other settings"])
def test_a_checkpoint_of_another_training_or_a_damaged_one_is_not_used(change, student, teacher, tmp_path):
    path, settings = tmp_path / "state.pt", RecoverSettings(steps=6, checks=3)
    again = build(student.config, student.state_dict())
    with pytest.raises(KeyboardInterrupt):
        recover(student, teacher, batches, images(4), settings, progress=stop_at(5), checkpoint=path)
    if change == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "another student":
        randomise(again, seed=1)
    else:
        settings = RecoverSettings(steps=4, checks=4)
    seen = []
    recover(again, teacher, batches, images(4), settings, progress=lambda *a: seen.append(a[0]), checkpoint=path)
    assert seen[0] == 1


@pytest.mark.parametrize("reducer", ["evit", "tome"])
def test_a_student_with_fewer_tokens_learns_from_the_prefix(reducer, teacher):
    student = build(tiny_config(reducer=reducer, keep={0: 26, 1: 14}), teacher.state_dict())
    found = recover(student, teacher, batches, images(16), RecoverSettings(steps=24, lr=2e-3, checks=1))
    assert found.checks[-1].loss < 0.8 * found.checks[0].loss


def test_without_prefix_the_mean_over_patches_counts_merged_ones_as_often_as_they_were():
    teacher = tiny_vit(depth=1, class_token=False, pool="avg")
    student = build(tiny_config(depth=1, class_token=False, pool="avg", reducer="tome", keep={0: 30}))
    state = student.blocks[0](student.embed(images(1)))
    objective = Distillation(student.config, 4.0)
    tokens = objective.outputs(student, images(1)).tokens
    mean = (state.x * state.size).sum(1, keepdim=True) / 49
    torch.testing.assert_close(tokens, torch.nn.functional.layer_norm(mean, (32,)))
    assert objective.outputs(teacher, images(1)).tokens.shape == tokens.shape


def test_a_model_without_classifier_learns_its_tokens():
    teacher = tiny_vit(classes=0)
    keep = BlockPlan(heads=(0, 1, 2), mlp=tuple(range(48)))
    student = prune(teacher, Plan(fingerprint(teacher), 49, None, (keep, keep)))
    found = recover(student, teacher, batches, images(16), RecoverSettings(steps=24, lr=2e-3, checks=1))
    assert found.checks[-1].loss < 0.8 * found.checks[0].loss


def test_the_teacher_stays_as_it_is(student, teacher):
    before = fingerprint(teacher)
    recover(student, teacher, batches, images(4), RecoverSettings(steps=3, checks=1))
    assert fingerprint(teacher) == before
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("kept_bytes", "asked"), [(2**20, 20), (2 * 8 * (10 + 50 * 32) * 4, 16 + 4 + 4), (0, 48)])
def test_the_teacher_is_asked_once_about_images_that_come_again(monkeypatch, student, teacher, kept_bytes, asked):
    monkeypatch.setattr("vitprune.recover.KEPT_BYTES", kept_bytes)
    settings, counts = RecoverSettings(steps=6, lr=1e-3, checks=1), []
    twin = build(student.config, student.state_dict())
    anew = recover(
        twin, teacher, lambda epoch: (Batch(one.images) for one in the_same_again(epoch)), images(4), settings
    )
    teacher.patch_embed.register_forward_hook(lambda _, given, out: counts.append(len(given[0])))
    found = recover(student, teacher, the_same_again, images(4), settings)
    assert sum(counts) == 4 + asked
    for name, value in anew.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value)


def test_the_same_batches_give_the_same_weights(student, teacher):
    twin = build(student.config, student.state_dict())
    settings = RecoverSettings(steps=4, lr=1e-3, checks=1)
    first, second = (recover(one, teacher, batches, images(4), settings).model for one in (student, twin))
    assert fingerprint(first) == fingerprint(second)


def test_a_recipe_mixes_images_and_their_classes_alike_at_the_same_step(student, teacher):
    run = _Run(student, teacher, images(4), RecoverSettings(recipe=Recipe()))
    batch = Batch(images(9), torch.arange(9), torch.arange(9))
    np.random.seed(5)
    first, again = run._mixed(batch), run._mixed(batch)
    assert np.random.rand() == np.random.RandomState(5).rand()  # nobody else's chances change
    assert torch.equal(first.images, again.images)
    assert first.numbers is None
    assert first.labels.shape == (8, 10)  # of nine one has no partner
    torch.testing.assert_close(first.labels.sum(1), torch.ones(8))
    share = first.labels.max(1).values
    assert (share < 1).all()  # at least smoothed
    run.step = 1
    assert not torch.equal(run._mixed(batch).images, first.images)
    assert torch.equal(batch.images, images(9))


@pytest.mark.parametrize("recipe", [None, Recipe(mixup=0.0, cutmix=0.0), Recipe(labels=0.0)])
def test_other_trainings_take_images_as_they_are(recipe, student, teacher):
    run = _Run(student, teacher, images(4), RecoverSettings(recipe=recipe))
    batch = Batch(images(4), torch.arange(4), torch.arange(4))
    assert run._mixed(batch) is batch


def test_seconds_end_it(monkeypatch, student, teacher):
    clock = count()
    monkeypatch.setattr("vitprune.recover.time.monotonic", lambda: next(clock) / 100)
    found = recover(student, teacher, batches, images(16), RecoverSettings(steps=10**6, seconds=0.5, checks=100))
    assert 1 <= found.checks[-1].step < 1000
    assert len(found.checks) > 2  # though no hundredth of the steps was made


@pytest.mark.parametrize(("settings", "words"), [({"lr": 0}, "lr above 0"), ({"steps": 0}, "steps")])
def test_settings_out_of_range_are_a_sentence(settings, words):
    with pytest.raises(InputError, match=words):
        RecoverSettings(**settings)


def test_no_training_images_is_a_sentence(student, teacher):
    with pytest.raises(InputError, match="no training images"):
        recover(student, teacher, lambda epoch: [], images(4), RecoverSettings(steps=2))


def test_the_learning_rate_rises_then_falls():
    shares = [learning_rate_share(done / 10) for done in range(11)]
    assert shares[0] == pytest.approx(0.01)
    assert shares[1] == pytest.approx(1.0)
    assert shares[10] == pytest.approx(0.01)
    assert shares[1:] == sorted(shares[1:], reverse=True)


TWO_PROCESSES = """
import os
import sys
import torch
from pathlib import Path
from tiny import images, tiny_config, tiny_vit
from vitprune.model.vit import fingerprint
from vitprune.recover import Batch, RecoverSettings, recover
from vitprune.parts import load
from vitprune.surgery import build
from vitprune.tokens.base import Reducer

method, published = sys.argv[1], len(sys.argv) > 2
pooled = {"pool": "avg", "final_norm": "pooled"} if method == "evovit" else {}
teacher = tiny_vit(depth=3, **pooled)
student = build(tiny_config(depth=3, reducer=method, keep={1: 26, 2: 14}, **pooled))
student.load_state_dict(teacher.state_dict(), strict=False)
drawn = lambda epoch: torch.randn(16, 4, 3, 28, 28, generator=torch.Generator().manual_seed(epoch))
batches = lambda epoch: (Batch(some, labels=teacher(some).argmax(1)) for some in drawn(epoch))
recipe = load("vitprune.tokens", method, Reducer).recipe if published else None
settings = RecoverSettings(steps=10_000, seconds=3.0, lr=1e-3, checks=1000, recipe=recipe)
found = recover(student, teacher, batches, images(8), settings, checkpoint=Path("state.pt"))
said = f"{len(found.checks)} {min(found.checks, key=lambda check: check.loss).step} {fingerprint(found.model)}"
Path(f"said by {os.environ['RANK']}").write_text(said)
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    "asked", [["evit"], ["dynamicvit", "published"], ["evovit", "published"], ["ia_red2", "published"]], ids=" ".join
)
def test_two_processes_agree_when_to_stop_and_on_the_weights(asked, tmp_path):
    root = Path(__file__).parent.parent
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    paths = os.pathsep.join(map(str, (root, root / "tests")))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *launch, "train.py", *asked],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    assert (tmp_path / "said by 0").read_text() == (tmp_path / "said by 1").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"train.py", "said by 0", "said by 1"}
