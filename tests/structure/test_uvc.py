"""UVC, by hand: the gradient of what drops, the proximal step, the dual variables, the gates."""

from __future__ import annotations

import pytest
import torch
from tiny import images, tiny_vit

from vitprune.budgets import macs_budget
from vitprune.structure.base import Moment, Multiples, Target
from vitprune.structure.uvc import PUBLISHED_STEPS, UVC, ascended, drop_gradient, least, shrink, z_lr

SCORES = torch.tensor([4.0, 1, 3, 2])


def make(share: float = 0.5, steps: int = PUBLISHED_STEPS, **config) -> tuple:
    model = tiny_vit(**config)
    return model, UVC(model, macs_budget(model.config, share), Multiples(1, 8, 2), steps)


def test_the_gradient_of_what_drops_is_the_next_score():
    for drop, score in ((0.0, 1), (0.2, 2), (1.0, 2), (1.2, 3), (4.0, 4)):
        assert drop_gradient(SCORES, torch.tensor(drop), torch.tensor(0.5)).item() == 0.5 * score


def test_the_weakest_are_those_of_the_least_scores():
    assert least(SCORES, torch.tensor(1.2)).tolist() == [False, True, False, True]
    assert not least(SCORES, torch.tensor(0.0)).any()


def test_the_proximal_step_divides_by_one_and_twice_rate_times_multiplier():
    assert shrink(0.1, torch.tensor(0.5)).item() == pytest.approx(1 / 1.1)


def test_dual_variables_rise_by_what_is_violated_and_stop_at_0():
    assert ascended(torch.tensor(0.2), 0.5, torch.tensor(0.4)).item() == pytest.approx(0.4)
    assert ascended(torch.tensor(0.2), 1.0, torch.tensor(-0.5)).item() == 0


def test_the_budgets_multiplier_steps_faster_in_each_fifth():
    assert [z_lr(done) for done in (0, 0.19, 0.2, 0.5, 0.99, 1.0)] == [1, 1, 5, 9, 17, 17]


@torch.no_grad()
def test_a_step_shrinks_the_weakest_head_pulls_the_drops_and_raises_the_multipliers():
    model, method = make(share=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.drop_heads[:], method.y_heads[:] = 0.5, 0.3
    method.drop_mlp[:] = method.drop_v[:] = 0
    heads = before["blocks.0.attn.proj.weight"].unflatten(1, (4, 8)).square().sum((0, 2))
    method.after_step(model, Moment(0, 0.0, 0.1), lambda value: value)
    after = model.blocks[0].attn.proj.weight.unflatten(1, (4, 8))
    factors = torch.ones(4)
    factors[heads.argmin()] = 1 / (1 + 2 * 0.1 * 0.3)
    torch.testing.assert_close(after, before["blocks.0.attn.proj.weight"].unflatten(1, (4, 8)) * factors[:, None])
    shrunk = after.square().sum((0, 2)).sort().values
    # y times the second least score pulls it down: 0.3 * score > z * (cost of a head)
    step = 0.02 * (0.3 * shrunk[1]).clamp(max=1)
    assert method.drop_heads[0].item() == pytest.approx(0.5 - step.item(), abs=1e-3)
    assert (method.y_heads >= 0.3).all()
    assert method.y_heads[0].item() == pytest.approx(0.3 + 1e-4 * shrunk[0].item(), rel=1e-3)
    cost = method.budget.cost(method.amounts({"heads": torch.full((2,), 0.5)}, method.logits)).item()
    assert method.z.item() == pytest.approx(1e-3 + min(0.5, cost - 0.5), abs=1e-3)


@torch.no_grad()
def test_the_gap_is_clamped_in_the_multipliers_step_alone_and_its_gradient_lives():
    model, method = make(share=0.1)
    method.z.fill_(100.0)
    method.y_heads.zero_(), method.y_mlp.zero_(), method.y_v.zero_()
    method.after_step(model, Moment(0, 0.0, 0.1), lambda value: value)
    assert method.z.item() == pytest.approx(100.5)  # the gap is 0.8
    assert (method.drop_heads > 0).all()  # in the released code nothing pushes at such a gap


def test_gates_stand_at_a_half_then_draw_and_a_skipped_block_changes_nothing():
    model, method = make()
    hooks = method.attach(model)
    method.train()
    method.begin(Moment(0, 0.0, 0.1), Target(torch.zeros(1, 10)))
    assert method.run_share().tolist() == [0.5, 0.5]
    state = model.embed(images(2))
    plain = model.blocks[0].forward(state).x  # hooks are not called
    torch.testing.assert_close(model.blocks[0](state).x, (state.x + plain) / 2)
    method.begin(Moment(50, 0.5, 0.1), Target(torch.zeros(1, 10)))
    drawn = method.run_share()
    assert ((drawn > 0) & (drawn < 1)).all()
    assert torch.equal(drawn, method.run_share())  # of the same step
    method.eval()
    with torch.no_grad():
        method.logits[0] = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(model.blocks[0](state).x, state.x)
    torch.testing.assert_close(model.blocks[1](state).x, model.blocks[1].forward(state).x)
    kept = method.finish(model)
    assert (kept.blocks[0].heads, kept.blocks[0].mlp) == ((), ())
    assert kept.blocks[1].heads
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_gates_move_by_the_mean_of_their_gradients_and_the_cost():
    _, method = make()
    method.z.fill_(2.0)
    method.logits.grad = torch.tensor([[0.1, -0.3], [0.0, 0.0]])
    slope = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    method._move_gates(Moment(48, 0.5, 0.1), slope)
    assert method.logits[0].tolist() == [-1, 1]  # the fiftieth step moves them
    method.logits.grad = torch.tensor([[0.1, -0.3], [0.0, 0.0]])
    method._move_gates(Moment(49, 0.5, 0.1), slope)
    gradient = torch.tensor([0.2, -0.6]) / 50 + 2 * 5e-4 * slope[0] + 1e-4 * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(method.logits[0], torch.tensor([-1.0, 1.0]) - 0.1 * gradient)
    assert method.logits.grad is None
