"""WDPruning, by hand: how many stay, whose gradients flow, which way the multipliers go, and where the tail is cut."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import images, tiny_vit
from torch.nn import functional as F

from vitprune.budgets import macs_budget, params_budget
from vitprune.errors import InputError
from vitprune.learn import learn
from vitprune.model.vit import fingerprint
from vitprune.plan import Plan
from vitprune.recover import Batch, RecoverSettings, _method_groups
from vitprune.structure._lagrangian import Lagrangian
from vitprune.structure.base import Amounts, Multiples, Target
from vitprune.structure.wdpruning import WDPruning, _TopMask, kept_count
from vitprune.surgery import prune


def theta(count: float, units: int) -> float:
    """The threshold under which ``ceil`` leaves ``count`` of ``units``."""
    share = (count - 0.5) / units
    return math.log(share / (1 - share))


@pytest.mark.parametrize(
    ("asked", "kept"),
    [(1, 16), (16, 16), (23, 16), (24, 32), (25, 32), (39, 32), (1000, 1008), (1527, 1520), (1529, 1536)],
)
def test_of_1536_units_a_multiple_of_16_is_kept(asked, kept):
    assert kept_count(theta(asked, 1536), 1536, 1) == asked
    assert kept_count(theta(asked, 1536), 1536, 16) == kept


def test_all_are_kept_at_first_and_one_at_last():
    assert kept_count(10.0, 1536, 16) == 1536
    assert [kept_count(t, 6, 1) for t in (10.0, 0.0, -20.0)] == [6, 3, 1]
    assert kept_count(theta(9, 100), 100, 16) == 9  # 16 does not divide 100


def test_scores_get_every_gradient_and_the_threshold_the_sum_of_the_kept_without_the_sigmoids_derivative():
    scores, threshold = (torch.tensor(v, requires_grad=True) for v in ([0.3, 0.1, 0.2], 0.0))
    mask = _TopMask.apply(scores, threshold, 1)
    assert mask.tolist() == [1, 0, 1]
    (mask * torch.tensor([2.0, 5.0, 7.0])).sum().backward()
    assert scores.grad.tolist() == [2, 5, 7]
    assert threshold.grad.item() == 9


def test_the_multipliers_rise_while_too_much_is_kept_and_stand_else():
    lagrangian = Lagrangian()
    with torch.no_grad():
        lagrangian.lam1.fill_(2), lagrangian.lam2.fill_(3)
    loss = lagrangian(torch.tensor(0.8), 0.5)
    assert loss.item() == pytest.approx(2 * 0.3 + 3 * 0.09)
    loss.backward()
    assert [lagrangian.lam1.grad.item(), lagrangian.lam2.grad.item()] == pytest.approx([0.3, 0.09])
    group = lagrangian.group()
    torch.optim.AdamW([{"params": list(group.parameters)}], lr=group.lr, maximize=group.ascent, weight_decay=0).step()
    assert [lagrangian.lam1.item(), lagrangian.lam2.item()] == pytest.approx([12, 13])  # Adam's first step is the rate
    assert lagrangian(torch.tensor(0.4), 0.5).item() == 0


def test_scores_and_thresholds_have_the_papers_learning_rate_and_no_decay():
    model = tiny_vit()
    method = WDPruning(model, params_budget(model.config, 0.5), steps=100_000)
    groups = _method_groups(method, 1e-4)
    own = {id(p) for p in (*method.scores.parameters(), *method.thresholds.parameters())}
    assert [g["peak"] for g in groups if own & {id(p) for p in g["params"]}] == [0.025]
    assert all(group["weight_decay"] == 0 for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(list(method.parameters()))


def test_the_share_that_is_kept_is_the_papers():
    config = tiny_vit(depth=3, mlp=128).config  # as DeiT, four times as many units as channels
    shares = {"heads": 0.5, "attn_out": 0.25, "mlp": 0.75, "mlp_out": 0.5}  # a, o, f and g
    dense = Amounts.dense(config)
    left = dense._replace(**{name: share * getattr(dense, name) for name, share in shares.items()})
    a, o, f, g = shares.values()
    assert params_budget(config, 0.5).cost(left).item() == pytest.approx((3 * a + a * o + 4 * f + 4 * f * g) / 12)


def test_classifiers_behind_the_last_blocks_start_as_the_models_own_and_add_their_loss():
    model = tiny_vit(depth=3)
    method = WDPruning(model, macs_budget(model.config, 1.0))
    assert method.places == [1, 2]
    hooks = method.attach(model)
    labels = torch.tensor([3, 1])
    states = [model.embed(images(2))]
    for block in model.blocks:
        states.append(block(states[-1]))
    by_hand = sum(F.cross_entropy(model.classify(states[place]), labels) for place in (1, 2))
    found = method.penalty(model, Target(model.classify(states[-1]), labels))
    torch.testing.assert_close(found, by_hand)
    for hook in hooks:
        hook.remove()


def test_the_tail_is_cut_and_the_classifier_behind_the_rest_answers():
    model = tiny_vit(depth=3)

    def batches(epoch):
        return [Batch(images(8, seed=epoch))]

    settings = RecoverSettings(steps=4, checks=1, lr=1e-3)
    found = learn(
        "wdpruning", model, macs_budget(model.config, 0.5), batches, images(4), settings,
        multiples=Multiples(1, 8), blocks=2,
    )  # fmt: skip
    slim = prune(found.model, found.plan)
    assert (slim.config.blocks[2].heads, slim.config.blocks[2].mlp) == (0, 0)
    assert not torch.equal(slim.head.weight, model.head.weight)
    state = slim.embed(images(2))
    for block in slim.blocks[:2]:
        state = block(state)
    torch.testing.assert_close(slim(images(2)), slim.classify(state))
    with pytest.raises(InputError, match="1 to 3 blocks"):
        WDPruning(model, macs_budget(model.config, 0.5), blocks=4)


def test_channels_that_are_not_written_become_rows_of_zeros_and_the_gated_model_is_the_slim_one():
    model = tiny_vit()
    method = WDPruning(model, params_budget(model.config, 1.0), Multiples(1, 16))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scores in method.scores.parameters():
            scores.copy_(torch.randn(scores.shape, generator=generator))
        for part, threshold in (("attn_out", 0.0), ("mlp_out", 0.0), ("heads", 0.3), ("mlp", -0.5)):
            for one in method.thresholds[part]:
                one.fill_(threshold)
    left = dict(
        zip(
            ("heads", "mlp", "attn_out", "mlp_out"), (torch.full((2,), n) for n in (3.0, 32.0, 16.0, 16.0)), strict=True
        )
    )
    share = method.budget.cost(Amounts.dense(model.config)._replace(**left)).item()
    method.budget = method.budget._replace(share=share)
    method.eval()
    with torch.no_grad():
        gated = method.computed(model, lambda: model(images(3)))
    kept = method.finish(model)
    assert [(len(b.heads), len(b.mlp)) for b in kept.blocks] == [(3, 32), (3, 32)]
    for block in model.blocks:
        assert (block.attn.proj.weight == 0).all(1).sum() == (block.mlp.fc2.bias == 0).sum() == 16
    slim = prune(model, Plan(fingerprint(model), 49, None, kept.blocks))
    torch.testing.assert_close(slim(images(3)), gated, rtol=0, atol=1e-5)
