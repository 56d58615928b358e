"""DynamicViT: predictor, selection, and the masks that it trains with."""

from __future__ import annotations

import pytest
import torch
from test_macs import deit_small
from tiny import images, labelled_by, randomise, tiny_config, tiny_vit
from torch.nn import functional as F

from vitprune.macs import macs, params
from vitprune.model.state import TokenState
from vitprune.model.vit import policy_softmax
from vitprune.objectives import Published
from vitprune.recover import RecoverSettings, recover
from vitprune.surgery import build
from vitprune.tokens.base import Place
from vitprune.tokens.dynamicvit import DynamicViT

KEEP = {1: 30, 2: 12}


def predictor(**place) -> DynamicViT:
    reducer = DynamicViT(Place(dim=8, **place))
    randomise(reducer)
    return reducer.eval()


def state(patches: int = 5, prefix: int = 1, batch: int = 2) -> TokenState:
    x = torch.randn(batch, prefix + patches, 8, generator=torch.Generator().manual_seed(patches))
    return TokenState(x, prefix, patches)


def reference(reducer: DynamicViT, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Log-probability of keeping each patch, written from the paper's equations 3 to 6, image by image."""
    rows = []
    for tokens, flags in zip(x, kept, strict=True):
        z = F.gelu(F.layer_norm(tokens, (8,), reducer.norm.weight, reducer.norm.bias) @ reducer.inner.weight.T
                   + reducer.inner.bias)  # fmt: skip
        pooled = sum(flag * row for flag, row in zip(flags, z[:, 4:], strict=True)) / flags.sum()
        both = torch.stack([torch.cat([row, pooled]) for row in z[:, :4]])
        rows.append(reducer.outer(both).log_softmax(-1)[:, 0])
    return torch.stack(rows)


@torch.no_grad()
def test_scores_are_those_of_the_papers_equations():
    reducer, x = predictor(), state().x[:, 1:]
    kept = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    found = reducer.logits(x, kept[..., None]).log_softmax(-1)[..., 0]
    torch.testing.assert_close(found, reference(reducer, x, kept), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reducer.logits(x)[1], reducer.logits(x, kept[..., None])[1])


@torch.no_grad()
def test_the_best_patches_stay_best_first():
    reducer, before = predictor(), state(prefix=2)
    after = reducer(before, None, 3)
    best = reference(reducer, before.x[:, 2:], torch.ones(2, 5)).argsort(1, descending=True)[:, :3]
    for image in range(2):
        assert torch.equal(after.x[image], before.x[image, [0, 1, *(2 + best[image]).tolist()]])


def test_the_policy_softmax_by_hand():
    logits = torch.tensor([0.0, 1, 2]).log1p().expand(1, 1, 3, 3)  # weights 1, 2 and 3
    found = policy_softmax(logits, torch.tensor([1.0, 0, 1])[None, :, None], eps=0.0)
    want = [[1 / 4, 0, 3 / 4], [1 / 6, 2 / 6, 3 / 6], [1 / 4, 0, 3 / 4]]  # the second reads itself, and nobody else it
    torch.testing.assert_close(found[0, 0], torch.tensor(want))


@torch.no_grad()
def test_tokens_that_are_masked_are_as_good_as_gone():
    model = tiny_vit(depth=4, reducer="dynamicvit", keep=KEEP)
    gathered = marked = model.embed(images(3))
    marked = marked._replace(policy=torch.ones(3, 50, 1))
    for block in model.blocks:
        gathered = block(gathered)
        if block.keep is not None:
            marked = marked._replace(policy=chosen(block, marked))
        marked = through(block, marked)
    torch.testing.assert_close(model.classify(marked), model.classify(gathered), rtol=0, atol=1e-5)
    for image in range(3):
        kept = marked.x[image][marked.policy[image, :, 0] > 0]
        distance = torch.cdist(gathered.x[image], kept, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(1).values.max() < 1e-4  # the same tokens, in another order


def chosen(block, marked: TokenState) -> torch.Tensor:
    """The policy that keeps what the selection keeps: the best of those kept so far."""
    before = marked.policy[:, 1:]
    logits = block.reducer.logits(marked.x[:, 1:], before)
    score = (logits[..., 0] - logits[..., 1]).masked_fill(before[..., 0] == 0, -torch.inf)
    kept = torch.zeros_like(score).scatter(1, score.topk(block.keep).indices, 1.0)
    return torch.cat([torch.ones(len(score), 1, 1), kept[..., None]], dim=1)


def through(block, marked: TokenState) -> TokenState:
    """The block with all tokens in it."""
    left = block.mix(marked, None)
    return left._replace(x=left.x + block.feed(left.x))


def test_training_samples_masks_that_only_grow_stricter_and_evaluation_never_samples():
    model = tiny_vit(depth=4, reducer="dynamicvit", keep=KEEP)
    with torch.no_grad():
        assert torch.equal(model(images(2)), model(images(2)))
    model.train()
    torch.manual_seed(0)
    now, policies = model.embed(images(2)), []
    for block in model.blocks:
        now = block(now)
        policies.append(now.policy)
    assert policies[0] is None
    assert now.x.shape == (2, 50, 32)
    assert set(policies[1].unique().tolist()) == {0.0, 1.0}
    assert (policies[2] <= policies[1]).all()
    assert policies[2].sum() < policies[1].sum()
    assert (policies[3][:, 0] == 1).all()


def test_the_penalty_by_hand():
    reducer = predictor(stages=4).train()
    after = reducer(state(patches=10), None, 3)
    share = after.policy[:, 1:].mean((1, 2))
    want = 2.0 / 4 * (share - 0.3).square().mean()
    torch.testing.assert_close(after.penalty, want)
    again = reducer(after, None, 1)
    share = again.policy[:, 1:].mean((1, 2))
    torch.testing.assert_close(again.penalty, want + 2.0 / 4 * (share - 0.1).square().mean())


def test_the_published_loss_by_hand():
    objective = Published(tiny_config(reducer="dynamicvit", keep=KEEP), DynamicViT.recipe)
    teacher, model = tiny_vit(), tiny_vit(reducer="dynamicvit", keep={0: 20}).train()
    labels = torch.tensor([1, 2])
    torch.manual_seed(1)
    student, wanted = objective.outputs(model, images(2)), objective.outputs(teacher, images(2))
    kept = student.kept[..., 0] > 0
    assert 0 < kept.sum() < kept.numel()
    want = (
        F.cross_entropy(student.answers, labels)
        + 0.5 * F.kl_div(student.answers.log_softmax(-1), wanted.answers.softmax(-1), reduction="batchmean")
        + 0.5 * F.mse_loss(student.tokens[kept], wanted.tokens[kept])
        + 2.0 * (kept.float().mean(1) - 20 / 49).square().mean()
    )
    torch.testing.assert_close(objective.loss(student, wanted, labels), want)


def test_the_published_loss_compares_tokens_behind_a_whole_last_block_too():
    early, whole = (tiny_vit(depth=3, reducer="dynamicvit", keep={0: 20, 2: last}) for last in (0, None))
    whole.load_state_dict(early.state_dict())
    objective = Published(early.config, DynamicViT.recipe)
    found = []
    for model in (early.train(), whole.train()):
        torch.manual_seed(1)
        found.append(objective.outputs(model, images(2)))
    torch.testing.assert_close(found[0].tokens, found[1].tokens)
    assert early.blocks[2].prefix_only
    assert early.eval()(images(2)).shape == (2, 10)


@pytest.mark.parametrize("recipe", [None, DynamicViT.recipe], ids=["distil", "published"])
def test_recovery_trains_the_predictor(recipe):
    teacher = tiny_vit()
    student = build(tiny_config(reducer="dynamicvit", keep={0: 26, 1: 14}))
    student.load_state_dict(teacher.state_dict(), strict=False)
    before = {name: value.clone() for name, value in student.state_dict().items()}

    settings = RecoverSettings(steps=24, lr=2e-3, checks=1, recipe=recipe)
    found = recover(student, teacher, labelled_by(teacher), images(16), settings)
    if recipe is None:  # the other does not aim at the teacher's answers alone
        assert found.checks[-1].loss < found.checks[0].loss
    moved = {name for name, value in found.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"blocks.0.reducer.inner.weight", "blocks.1.reducer.outer.4.weight", "head.weight"} <= moved
    assert ("pos_embed" in moved) == (recipe is None)
    assert all(parameter.requires_grad for parameter in found.model.parameters())


def test_deit_small_has_the_weights_and_costs_that_were_published():
    keep = {3: 137, 6: 96, 9: 67}
    assert macs(deit_small(keep, "dynamicvit")) == pytest.approx(2.988e9, rel=0.005)
    assert params(deit_small(keep, "dynamicvit")) == pytest.approx(22.774e6, rel=1e-4)
