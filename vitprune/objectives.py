"""What a pruned model is trained on: our own distillation, or what the authors of its token method trained with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .model.config import VitConfig
from .model.state import TokenState
from .model.vit import Vit, make_norm
from .tokens.base import Recipe, Reducer

WRONG = -1.0  # reward of a wrong answer


class Draws(NamedTuple):
    """Patches that a token method drew by chance, and what it would have decided.

    Attributes:
        log_chance: log-probability of what was drawn, [B].
        share: of the patches that are left, [B].
        decided_answers, decided_share: the same images' answers [B, classes] and shares without chance.
    """

    log_chance: Tensor
    share: Tensor
    decided_answers: Tensor
    decided_share: Tensor


class Outputs(NamedTuple):
    """What a model says of a batch.

    Attributes:
        answers: logits [B, classes], or features [B, C].
        tokens: [B, N, C], of which teacher and student have equally many.
        kept: [B, N, 1], 1 for the tokens that are compared; None: all are.
        penalty: what the token method adds to the loss.
        draws: what a method that learns by reward drew.
        second: logits [B, classes] of a second classifier that is trained beside.
    """

    answers: Tensor
    tokens: Tensor
    kept: Tensor | None = None
    penalty: Tensor | None = None
    draws: Draws | None = None
    second: Tensor | None = None


class Objective(ABC):
    """A loss between a student and its teacher.

    Attributes:
        needs_labels: the classes of the images.
        second: a classifier of the class token that learns beside the model and is left behind; None: there is none.
    """

    needs_labels = False
    second: nn.Module | None = None

    def outputs(self, model: Vit, images: Tensor) -> Outputs:
        """What ``model``, the student or the teacher, says of ``images`` [B, C, H, W]."""
        with _whole_last_block(model) if self.reads_patches(model) else nullcontext():
            state = model.tokens(images)
            draws = None if state.log_chance is None else _draws(model, images, state)
        tokens, kept = self.compared(model, state)
        second = None if self.second is None else self.second(state.x[:, 0])
        return Outputs(model.classify(state), tokens, kept, state.penalty, draws, second)

    def reads_patches(self, model: Vit) -> bool:
        """Whether patch tokens, or what marks them, are read behind the last block, which then computes all of them."""
        return any(isinstance(module, Reducer) and module.rewarded for module in model.modules())

    @abstractmethod
    def compared(self, model: Vit, state: TokenState) -> tuple[Tensor, Tensor | None]:
        """``tokens`` and ``kept`` of ``Outputs`` from the tokens behind the last block."""

    @abstractmethod
    def loss(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """A number to make small; ``labels`` [B] are the images' classes, or [B, classes] the weights of all."""


class Distillation(Objective):
    """KL of the answers, and the squared error of the tokens that a model with fewer patches has as well.

    These are all of them, or the prefix, or where there is none the mean. Each is normalised: single channels and
    tokens of large models are hundreds of times the others, and would be all that is learned.

    Args:
        config: of the student.
        token_weight: of the error of the tokens beside the KL; a model without a classifier has no other loss.
    """

    def __init__(self, config: VitConfig, token_weight: float) -> None:
        self.classes, self.token_weight = config.classes, token_weight
        self.with_patches = all(block.patches is None for block in config.blocks)

    def compared(self, model: Vit, state: TokenState) -> tuple[Tensor, Tensor | None]:
        tokens = state.x
        if not self.with_patches and state.prefix:
            tokens = tokens[:, : state.prefix]
        elif not self.with_patches:
            weight = torch.ones_like(tokens[..., :1]) if state.size is None else state.size
            weight = weight if state.policy is None else weight * state.policy
            tokens = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return F.layer_norm(tokens, tokens.shape[-1:]), None

    def loss(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        if self.classes and student.tokens.shape[-1] != teacher.tokens.shape[-1]:  # channels have left the student
            loss = divergence(student.answers.float(), teacher.answers.float()).mean()
            return loss + _of_method(student, teacher.answers.argmax(-1))
        loss = F.mse_loss(student.tokens.float(), teacher.tokens.float())
        if self.classes:
            loss = divergence(student.answers.float(), teacher.answers.float()).mean() + self.token_weight * loss
        return loss + _of_method(student, teacher.answers.argmax(-1))


class Published(Objective):
    """The losses of a token method's authors, as its ``Recipe`` weighs them.

    Raises:
        InputError: there is no classifier, which they need.
    """

    def __init__(self, config: VitConfig, recipe: Recipe) -> None:
        if not config.classes:
            raise InputError("recovery: a published recipe trains a classifier, and this model has none")
        self.recipe, self.needs_labels = recipe, recipe.labels > 0
        if recipe.second and config.class_token and config.pool != "token":
            self.second = nn.Sequential(make_norm(config), nn.Linear(config.dim, config.classes))

    def reads_patches(self, model: Vit) -> bool:
        return self.recipe.tokens > 0 or super().reads_patches(model)

    def compared(self, model: Vit, state: TokenState) -> tuple[Tensor, Tensor | None]:
        if not self.recipe.tokens:
            return state.x[:, :0], None
        patches = slice(state.prefix, state.x.shape[1] - state.packages)
        kept = None if state.policy is None else state.policy[:, patches].detach()
        tokens = model.norm(state.x) if model.config.final_norm == "tokens" else state.x
        return tokens[:, patches], kept

    def loss(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        recipe, answers = self.recipe, student.answers.float()
        loss = _of_method(student, teacher.answers.argmax(-1) if labels is None or labels.ndim > 1 else labels)
        if recipe.labels:
            assert labels is not None  # they are asked for before the training begins
            loss = loss + recipe.labels * F.cross_entropy(answers, labels)
            if student.second is not None:
                loss = loss + recipe.second * F.cross_entropy(student.second.float(), labels)
        if recipe.answers:
            loss = loss + recipe.answers * divergence(answers, teacher.answers.float()).mean()
        if recipe.tokens:
            error = (student.tokens.float() - teacher.tokens.float()).square().mean(-1, keepdim=True)
            kept = torch.ones_like(error) if student.kept is None else student.kept
            loss = loss + recipe.tokens * (error * kept).sum() / kept.sum().clamp_min(1)
        return loss


@contextmanager
def _whole_last_block(model: Vit) -> Iterator[None]:
    """Inside, the last block is computed for all tokens."""
    last: Any = model.blocks[-1]
    before, last.prefix_only = last.prefix_only, False
    try:
        yield
    finally:
        last.prefix_only = before


def _draws(model: Vit, images: Tensor, state: TokenState) -> Draws:
    """What was drawn on the way to ``state``, beside what the method decides without chance."""
    assert state.log_chance is not None
    assert state.policy is not None
    methods = [module for module in model.modules() if isinstance(module, Reducer)]
    for method in methods:
        method.decided = True
    try:
        with torch.no_grad():
            decided = model.tokens(images)
            answers = model.classify(decided)
    finally:
        for method in methods:
            method.decided = False
    assert decided.policy is not None
    drawn_share, decided_share = (
        one[:, state.prefix :].mean((1, 2)).detach() for one in (state.policy, decided.policy)
    )
    return Draws(state.log_chance, drawn_share, answers, decided_share)


def _of_method(student: Outputs, wanted: Tensor) -> Tensor:
    """What the token method adds to the loss; ``wanted`` [B] are the right answers, for methods that are rewarded.

    The reward of Pan et al., IA-RED2, NeurIPS 2021, https://arxiv.org/abs/2106.12620: one less the square of the share
    of the patches that are left, where the answer is right, and ``WRONG`` else. What it exceeds that of the method's
    decisions by says how much more probable a draw is to become.
    """
    loss = student.answers.new_zeros(()) if student.penalty is None else student.penalty
    if student.draws is None:
        return loss
    draws = student.draws
    reward, decided = (
        torch.where(answers.argmax(-1) == wanted, 1 - share.square(), WRONG)
        for answers, share in ((student.answers, draws.share), (draws.decided_answers, draws.decided_share))
    )
    return loss - ((reward - decided).detach() * draws.log_chance).mean()


def divergence(answers: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || answers) in nats, one for each image."""
    return F.kl_div(answers.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
