"""IA-RED2: the interpreter, its turns in a training, and the reward."""

from __future__ import annotations

import pytest
import torch
from tiny import images, labelled_by, randomise, tiny_config, tiny_vit

from vitprune.errors import NotSupported
from vitprune.model.state import TokenState
from vitprune.objectives import Distillation, Draws, Outputs, _of_method
from vitprune.recover import RecoverSettings, recover
from vitprune.surgery import build
from vitprune.tokens.base import Place, count_per_image
from vitprune.tokens.ia_red2 import IARED2


def interpreter(**place) -> IARED2:
    reducer = IARED2(Place(dim=8, heads=2, **place))
    randomise(reducer)
    return reducer.eval()


def state(patches: int = 9, prefix: int = 1) -> TokenState:
    return TokenState(torch.randn(2, prefix + patches, 8, generator=torch.Generator().manual_seed(1)), prefix, patches)


@torch.no_grad()
def test_chances_by_hand_and_the_most_probable_stay():
    reducer, before = interpreter(), state()
    x = before.x[0]
    z = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    q, k = z @ reducer.qk.weight[:8].T + reducer.qk.bias[:8], z @ reducer.qk.weight[8:].T + reducer.qk.bias[8:]
    want = sum((k[:, part] @ q[0, part] / 2).sigmoid() for part in (slice(0, 4), slice(4, 8))) / 2
    torch.testing.assert_close(reducer.chances(before.x)[0], want)
    after = reducer(before, None, 3)
    assert torch.equal(after.x[0, 1:], x[1 + want[1:].argsort(descending=True)[:3]])


def test_interpreters_take_turns():
    reducer, before = interpreter(stage=1, stages=3).train(), state()
    decided = (reducer.chances(before.x)[:, 1:] > 0.5).float()
    reducer.done = 0.1  # the first one's turn: this one keeps all
    assert reducer(before, None, 3) is before
    reducer.done = 0.3  # its own: it draws
    torch.manual_seed(0)
    drawn = [reducer(before, None, 3) for _ in range(20)]
    assert len({tuple(one.policy.flatten().tolist()) for one in drawn}) > 1
    chance = reducer.chances(before.x)[:, 1:]
    kept = drawn[0].policy[:, 1:, 0]
    want = (kept * chance + (1 - kept) * (1 - chance)).log().sum(1)
    torch.testing.assert_close(drawn[0].log_chance, want)
    for done in (0.6, 0.9):  # that of a later one, and of the model
        reducer.done = done
        after = reducer(before, None, 3)
        assert after.log_chance is None
        assert torch.equal(after.policy[:, 1:, 0], decided)


def test_what_was_dropped_stays_dropped():
    reducer, before = interpreter().train(), state()
    reducer.done = 0.9
    policy = torch.ones(2, 10, 1)
    policy[:, 4:] = 0
    after = reducer(before._replace(policy=policy), None, 3)
    assert (after.policy <= policy).all()


def test_the_reward_by_hand():
    right, wrong = torch.tensor([[9.0, 0]]), torch.tensor([[0, 9.0]])
    log_chance = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    draws = Draws(log_chance, torch.tensor([0.5, 0.5, 0.2, 1.0]), torch.cat([right, right, wrong, wrong]),
                  torch.tensor([0.8, 0.8, 0.5, 0.5]))  # fmt: skip
    student = Outputs(torch.cat([right, wrong, right, wrong]), torch.zeros(4, 0, 8), draws=draws)
    # 0.75 - 0.36, -1 - 0.36, 0.96 + 1, and -1 + 1
    torch.testing.assert_close(_of_method(student, torch.zeros(4, dtype=torch.long)),
                               -0.5 * torch.tensor([0.39, -1.36, 1.96, 0.0]).mean())  # fmt: skip


@pytest.mark.parametrize("recipe", [None, IARED2.recipe], ids=["distil", "published"])
@pytest.mark.parametrize("last", [None, 0], ids=["all", "prefix"])
def test_a_training_goes_through_all_turns(recipe, last):
    teacher = tiny_vit(depth=3)
    student = build(tiny_config(depth=3, reducer="ia_red2", keep={0: 26, 1: 14, 2: last}))
    student.load_state_dict(teacher.state_dict(), strict=False)
    before = {name: value.clone() for name, value in student.state_dict().items()}

    found = recover(
        student, teacher, labelled_by(teacher), images(16), RecoverSettings(steps=24, lr=2e-3, checks=1, recipe=recipe)
    )
    if recipe is None:  # the other does not aim at the teacher's answers alone
        assert found.checks[-1].loss < found.checks[0].loss
    moved = {name for name, value in found.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"blocks.0.reducer.qk.weight", "blocks.1.reducer.qk.weight", "head.weight"} <= moved
    assert not any(block.reducer.decided for block in found.model.blocks[:2])
    assert found.model.blocks[2].prefix_only == (last == 0)


def test_a_model_without_a_method_that_draws_is_run_once():
    model, calls = tiny_vit(), []
    model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    Distillation(model.config, 4.0).outputs(model, images(1))
    assert len(calls) == 1


@torch.no_grad()
def test_counted_per_image_patches_stay_by_probability_above_one_half():
    reducer, before = interpreter(stage=1, stages=3), state()
    reducer.done = 0.3  # whatever a training has left there
    reducer.per_image = True
    after = reducer(before, None, 3)
    assert torch.equal(after.policy[:, 1:, 0], (reducer.chances(before.x)[:, 1:] > 0.5).float())
    assert after.log_chance is None
    assert after.x is before.x


@torch.no_grad()
def test_a_model_counts_per_image_where_its_method_does():
    model = tiny_vit(reducer="ia_red2", keep={0: 26, 1: 14})
    kept = count_per_image(model).tokens(images(4)).policy[:, 1:].sum((1, 2))
    assert len(kept.unique()) > 1
    for other in (tiny_vit(), tiny_vit(reducer="evit", keep={0: 26})):
        with pytest.raises(NotSupported, match="do not depend on the image"):
            count_per_image(other)
