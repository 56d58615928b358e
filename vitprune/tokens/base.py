"""What a token method is: told how many patch tokens to leave, it turns scored tokens into fewer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import NotSupported
from ..model.config import VitConfig
from ..model.state import AttentionView, TokenState

Schedule = Callable[[int, int], list[int]]  # (blocks, patch tokens that enter) -> patch tokens that leave each block


class Place(NamedTuple):
    """Where in a model a token method acts, and what methods with weights need to know of the model.

    Attributes:
        block, depth: in which block of how many.
        stage, stages: which application it is of how many in this model.
        dim: width of the residual stream.
        heads: attention heads of a block that nothing has been pruned of.
        patches: patch tokens of the image that the model is made for.
    """

    block: int = 0
    depth: int = 1
    stage: int = 0
    stages: int = 1
    dim: int = 0
    heads: int = 0
    patches: int = 0

    @classmethod
    def of(cls, config: VitConfig, block: int) -> Place:
        """Block ``block`` of the model that ``config`` describes, reduced there if nowhere else."""
        reduced = sorted({block, *(i for i, one in enumerate(config.blocks) if one.patches)})
        head_dim = round(max(one.scale for one in config.blocks) ** -2)
        most = max(1, config.dim // head_dim)
        heads = next(count for count in range(most, 0, -1) if config.dim % count == 0)  # of any number of channels
        return cls(block, len(config.blocks), reduced.index(block), len(reduced), config.dim, heads, config.patches)


NOWHERE = Place()


class Recipe(NamedTuple):
    """What the authors of a method train their models with, beside the losses of the method itself.

    The defaults are those of EViT's fine-tuning. Augmentation of single images, drop path and averages of weights are
    no part of it.

    Attributes:
        labels: weight of the cross entropy with the images' classes.
        second: weight of the cross entropy of a second classifier, which reads the class token where the model's own
            reads the mean, and is left behind when the training is over.
        answers: weight of KL(teacher || student).
        tokens: weight of the mean squared error between the teacher's patch tokens behind the last norm and the
            student's, of those that it keeps.
        lr: peak learning rate of the method's own weights, and of all where it has none.
        backbone_lr: that of the model's weights, as a share of ``lr``.
        backbone_from: share of the training that is over before the model's weights begin to learn.
        warmup: share of the training in which the learning rate rises.
        last_lr: the learning rate at the end, as a share of ``lr``; it falls as a cosine.
        weight_decay: of AdamW, on matrices alone.
        frozen: names of the model's weights that do not learn.
        mixup, cutmix: alphas of the two ways to mix pairs of images and their classes, of which chance takes one; both
            0: images stay as they are.
        smoothing: share of a class's weight that is spread over all of them, where images are mixed.
    """

    labels: float = 1.0
    second: float = 0.0
    answers: float = 0.0
    tokens: float = 0.0
    lr: float = 2e-5
    backbone_lr: float = 1.0
    backbone_from: float = 0.0
    warmup: float = 0.0
    last_lr: float = 0.1
    weight_decay: float = 1e-6
    frozen: tuple[str, ...] = ()
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1


class Reducer(nn.Module, ABC):
    """A token method. It is told how many tokens to leave; published rules for the counts are its ``schedules``.

    Args:
        place: methods that do not work alike in all blocks, or have weights, ask for it.

    Attributes:
        schedules: the authors' hyper-parameters, by name.
        where: 'before': in front of the block, which works on those that are left, and without an ``AttentionView``;
            'after': between attention and MLP, so that the attention works on the tokens that come in; 'q_rows':
            inside attention: those that are left ask, and all that came in are read.
        proportional: the method keeps token sizes, and attention adds their logarithm from then on.
        needs_class_token: the method scores by the class token's attention, and cannot act without one.
        keeps_order: patches leave in the order in which they came.
        drops: patches may vanish; otherwise each is merged into a token that stays.
        watches: the method looks at the attention of every block, and has a module in each.
        grid: the method merges neighbours of a square grid: one application leaves exactly ``fewest``, and may need to
            know the number of patches when a graph is exported.
        rewarded: the method draws while it trains, and learns by reward.
        any_size: images may be of other sizes than those that the method was made for.
        stand_in: a method with weights chooses at random until they have been trained; what a search measures losses
            with in its place. None: the method needs no training.
        recipe: how its authors train.
        official_args: of timm's ``create_model``, for the authors' checkpoints.
        own_counts: in the authors' form each image has as many patches as the method decides; see ``count_per_image``.
        done: share of a training that is over; whoever trains sets it.
        decided: a method that learns by reward decides instead of drawing; whoever trains sets it.
        per_image: the method decides how many patches an image keeps, and only marks them; set by ``count_per_image``.
    """

    where: ClassVar[Literal["before", "after", "q_rows"]] = "after"
    proportional: ClassVar[bool] = False
    needs_class_token: ClassVar[bool] = False
    keeps_order: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    grid: ClassVar[bool] = False
    rewarded: ClassVar[bool] = False
    own_counts: ClassVar[bool] = False
    any_size: ClassVar[bool] = True
    stand_in: ClassVar[str | None] = None
    recipe: ClassVar[Recipe] = Recipe()
    official_args: ClassVar[Mapping[str, Any]] = {}
    schedules: ClassVar[Mapping[str, Schedule]] = {}
    done: float = 1.0
    decided: bool = False
    per_image: bool = False

    def __init__(self, place: Place = NOWHERE) -> None:
        super().__init__()
        self.place = place

    @staticmethod
    @abstractmethod
    def fewest(patches: int, prefix: int) -> int:
        """The fewest patch tokens that one application can leave of ``patches``, at least 1."""

    @classmethod
    def reaches(cls, patches: int, left: int, prefix: int) -> bool:
        """Whether one application can turn ``patches`` into fewer, ``left``."""
        fewest = cls.fewest(patches, prefix)
        return left < patches and (left == fewest if cls.grid else left >= fewest)

    @staticmethod
    def again(block: int, depth: int) -> bool:
        """Whether a block acts even where no patch leaves, once some have left: it chooses others."""
        return False

    def keep_anyway(self, state: TokenState) -> int | None:
        """What ``forward`` is to leave in a block whose count is not told; None: it is not called there."""
        return None

    def watch(self, state: TokenState, attention: AttentionView) -> TokenState:
        """What to remember of a block's attention, for methods that watch."""
        return state

    @abstractmethod
    def forward(self, state: TokenState, attention: Any, keep: int) -> TokenState:
        """Leave ``keep`` patch tokens behind the prefix, ``fewest(...) <= keep <= N - prefix``.

        ``attention`` is an ``AttentionView``; None for methods that act before it.
        Nothing changes where ``keep == N - prefix``. Under export ``keep`` and N may be symbolic: no branch may
        depend on them (``leaves_all`` is False then), and each operation must be one that TensorRT-RTX parses.
        While a method with weights trains, all tokens stay, and ``policy`` and ``penalty`` of the state say more.
        """

    @classmethod
    def calibrated(cls, model: Any, images: Tensor) -> dict[str, Tensor]:
        """What the method must find out about a dense ``Vit`` beforehand, by names in the model with the method.

        Args:
            images: calibration images [M, channels, height, width].
        """
        return {}

    @classmethod
    def official(cls, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The authors' checkpoint as timm names its weights, and the method's own by their names in a ``Vit``.

        Raises:
            InputError: it is no checkpoint of this method.
        """
        return dict(weights), {}

    def macs(self, patches: int) -> int:
        """Multiply-accumulates of the method's own weights for ``patches`` that come in."""
        return 0


def count_per_image(model: nn.Module) -> nn.Module:
    """``model``, whose token method decides from now on how many patches each image keeps, as its authors publish it.

    The counts that the method was told say only which blocks reduce. All patches stay in the tensors, those that are
    removed marked as such: what is kept of each image is ``model.tokens(images).policy`` [B, N, 1]. For studies of
    accuracy; it saves no time, and a graph needs counts that are told.

    Raises:
        NotSupported: the method is told how many patches to leave by its authors, too, or there is none.
    """
    methods = [module for module in model.modules() if isinstance(module, Reducer)]
    if not methods or not methods[0].own_counts:
        raise NotSupported("the counts of this model's token method do not depend on the image")
    for method in methods:
        method.per_image = True
    return model


def stepwise(leaves: Callable[[int, int, int], int]) -> Schedule:
    """The schedule of a rule for one block: (block, blocks, patch tokens that enter) -> those that leave."""

    def counts(depth: int, patches: int) -> list[int]:
        left = []
        for block in range(depth):
            patches = leaves(block, depth, patches)
            left.append(patches)
        return left

    return counts


def thrice(depth: int) -> set[int]:
    """The blocks of a model of ``depth`` in which several methods act: the fourth, seventh and tenth of twelve."""
    return {depth * quarter // 4 for quarter in (1, 2, 3)}


def blocks_in(weights: Mapping[str, Tensor]) -> int:
    """The number of blocks of a model whose weights are named as timm's."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def leaves_all(keep: int, patches: int) -> bool:
    """Whether ``keep`` is all of ``patches``; False where that depends on the size of the image."""
    return isinstance(keep, int) and isinstance(patches, int) and keep == patches


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` [B, K] of ``x`` [B, N, C], as [B, K, C]."""
    # indexing, not torch.gather: GatherND copies whole tokens, which ONNX Runtime does 2.6 times as fast on a CPU
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def keep_patches(state: TokenState, index: Tensor) -> TokenState:
    """The prefix and the patches ``index`` [B, K], in that order, with all that is remembered of them."""
    prefix = state.prefix
    return state.select(lambda of: torch.cat([of[:, :prefix], gather_tokens(of[:, prefix:], index)], dim=1))


def keep_best(state: TokenState, score: Tensor, keep: int) -> TokenState:
    """The prefix and the ``keep`` patches of the highest ``score`` [B, n], one for each patch, best first."""
    # all are sorted and some taken: ``keep`` may be symbolic
    return keep_patches(state, score.topk(score.shape[1], dim=1).indices[:, :keep])


def track_sources(state: TokenState) -> TokenState:
    """``state`` of an image's own patches, made to record which of them end up in which token."""
    patches = state.x.shape[1] - state.prefix
    own = torch.eye(state.x.shape[1], dtype=state.x.dtype, device=state.x.device)[:, state.prefix :]
    return state._replace(source=own.expand(state.x.shape[0], -1, patches))
