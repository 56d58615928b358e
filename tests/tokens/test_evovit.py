"""Evo-ViT: what it remembers of attention, and patches that wait and come back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import images, labelled_by, tiny_vit
from torch.nn import functional as F

from vitprune.errors import InputError
from vitprune.objectives import Published
from vitprune.recover import RecoverSettings, recover
from vitprune.surgery import reduce_tokens
from vitprune.tokens.evovit import EvoViT


def reduced(**config):
    """Six blocks, of which the third and the fifth choose 20 of 49 patches."""
    return reduce_tokens(tiny_vit(depth=6, **config), "evovit", {2: 20})


@torch.no_grad()
def states(model, batch: int = 2):
    found = [model.embed(images(batch))]
    for block in model.blocks:
        found.append(block(found[-1]))
    return found


@torch.no_grad()
def test_the_memory_is_the_last_class_attention_and_later_half_of_what_it_was():
    model = reduced()
    seen = states(model)
    rows = [block.attend(state)[2].class_row().mean(1)[..., None] for block, state in zip(model.blocks, seen[:2])]  # noqa: B905
    torch.testing.assert_close(seen[1].score, rows[0])
    torch.testing.assert_close(seen[2].score, rows[1])  # a third of the blocks: nothing of the past yet
    chosen = model.blocks[2].reducer(seen[2], None, 20)
    row = model.blocks[2].attend(chosen)[2].class_row().mean(1)[..., None]
    torch.testing.assert_close(seen[3].score, 0.5 * chosen.score + 0.5 * row)


@torch.no_grad()
def test_parked_patches_are_normalised_as_the_others_where_all_are_pooled():
    model = reduced(pool="avg", final_norm="tokens")
    last = states(model)[-1]
    patches = torch.cat([last.x[:, 1:], last.parked.x], dim=1)
    torch.testing.assert_close(model(images(2)), model.head(model.norm(patches).mean(1)))


@torch.no_grad()
def test_the_best_are_computed_on_and_the_others_wait_unchanged():
    model = reduced()
    seen = states(model)
    assert [state.x.shape[1] for state in seen] == [50, 50, 50, 21, 21, 21, 21]
    score = seen[2].score[:, 1:, 0]
    best = score.topk(20).indices
    chosen = model.blocks[2].reducer(seen[2], None, 20)
    for image in range(2):
        assert torch.equal(chosen.x[image, 1:], seen[2].x[image, 1 + best[image]])
        waiting = seen[3].parked.x[image]
        assert torch.equal(
            torch.cdist(waiting, seen[2].x[image], compute_mode="donot_use_mm_for_euclid_dist").min(1).values,
            torch.zeros(29),
        )
    assert torch.equal(seen[4].parked.x, seen[3].parked.x)


@torch.no_grad()
def test_the_second_stage_chooses_among_all_patches_again():
    model = reduced()
    entering = states(model)[4]
    waiting = entering.parked._replace(score=1 + entering.parked.score)  # now the best of all
    chosen = model.blocks[4].reducer(entering._replace(parked=waiting), None, 20)
    best = waiting.score[:, :, 0].topk(20).indices
    assert torch.equal(chosen.x[:, 1:], torch.stack([waiting.x[i, best[i]] for i in range(2)]))
    assert chosen.parked.x.shape[1] == 29
    assert [block.keep for block in model.blocks] == [None, None, 20, None, 20, None]


@torch.no_grad()
def test_the_mean_that_is_classified_counts_those_that_wait():
    model = reduced(pool="avg", final_norm="pooled")
    last = states(model)[-1]
    mean = torch.cat([last.x[:, 1:], last.parked.x], dim=1).mean(1)
    torch.testing.assert_close(model.classify(last), model.head(model.norm(mean)))


def test_two_thirds_of_a_training_choose_in_every_block_from_the_first_stage_on():
    model = reduced().train()

    def parked_differ(done: float) -> list[bool]:
        for block in model.blocks:
            block.reducer.done = done
        seen = states(model)
        return [after.parked is not before.parked for before, after in pairwise(seen[3:])]

    assert parked_differ(0.5) == [True, True, True]
    assert parked_differ(0.7) == [False, True, False]
    model.eval()
    assert parked_differ(0.5) == [False, True, False]


def test_a_second_classifier_of_the_class_token_counts_half():
    model, labels = reduced(pool="avg", final_norm="pooled"), torch.arange(4)
    objective = Published(model.config, EvoViT.recipe)
    said = objective.outputs(model, images(4))
    answers = model(images(4)), objective.second(model.tokens(images(4)).x[:, 0])
    want = sum(0.5 * F.cross_entropy(one, labels) for one in answers)
    torch.testing.assert_close(objective.loss(said, said, labels), want)
    assert Published(reduced().config, EvoViT.recipe).second is None  # there the model's own reads the class token


def test_the_second_classifier_learns_through_an_interruption_and_is_left_behind(tmp_path):
    teacher = tiny_vit(depth=6, pool="avg", final_norm="pooled")
    settings = RecoverSettings(steps=6, lr=1e-3, checks=3, recipe=EvoViT.recipe)

    def train(**more):
        student = reduce_tokens(teacher, "evovit", {2: 20})
        return recover(student, teacher, labelled_by(teacher), images(8), settings, **more).model.state_dict()

    def stop(step, steps, what):
        if step == 4:
            raise KeyboardInterrupt

    whole, file = train(), tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(progress=stop, checkpoint=file)
    second = torch.load(file, weights_only=True)["second"]
    assert (second["1.weight"] != 0).any()
    resumed = train(checkpoint=file)
    assert resumed.keys() == teacher.state_dict().keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


def test_the_first_block_cannot_act():
    with pytest.raises(InputError, match="block 0: evovit has seen no attention yet; let it act from block 1 on"):
        reduce_tokens(tiny_vit(), "evovit", {0: 20})
