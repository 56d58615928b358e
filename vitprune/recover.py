"""Gives a pruned model its accuracy back: training by distillation from the dense one.

The student learns the teacher's answers, as in Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network,
2015, https://arxiv.org/abs/1503.02531, and its tokens behind the last block: the prefix tokens, and the patch tokens
too where none were removed. Labels are not needed. One CPU or GPU, or several through accelerate
(``accelerate launch``), with bfloat16 where the machine has units for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import InputError
from .model.vit import Vit, fingerprint
from .objectives import Distillation, Objective, Outputs, Published, divergence
from .structure.base import Moment, StructureMethod, Target
from .surgery import METHOD_WEIGHT
from .tokens.base import Recipe, Reducer


class Batch(NamedTuple):
    """Images to train on.

    Attributes:
        images: normalised, [B, C, H, W].
        numbers: which they are, [B], where each image comes again as it was, so that the teacher need not be asked
            about it again; else None.
        labels: their classes, [B], where they are known; or the weights of all, [B, classes].
    """

    images: Tensor
    numbers: Tensor | None = None
    labels: Tensor | None = None


Batches = Callable[[int], Iterable[Batch]]  # epoch -> batches, the same each time
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what to say

KEPT_BYTES = 512 * 2**20  # of the teacher's outputs
# what the learning rate of a token method's own weights is to that of the model's, which have been trained before
METHOD_LR = 10.0
OURS = Recipe(warmup=0.1, last_lr=0.01, weight_decay=0.01)


@dataclass(frozen=True)
class RecoverSettings:
    """How long and how hard to train.

    Attributes:
        steps: optimiser steps.
        seconds: no step begins after so long, all of it counted and all runs of a resumed training; None: no limit.
        lr: peak learning rate of AdamW; rises over the first tenth of the steps, then falls as a cosine to 1% of it.
        token_weight: weight of the squared error of normalised tokens beside the KL of the answers. Held-out KL of a
            pruned Fashion-MNIST model after 120 steps at lr 5e-4: 0.065 with 0, 0.050 with 1; after 150 steps at
            2e-4: 0.034 with 1, 0.032 with 4 and with 12; 0.080 before.
        checks: how often, over the whole training, the held-out loss is looked at and a checkpoint written.
        recipe: a token method's authors' way to train in place of ours; ``lr`` is then that of the method's weights.
    """

    steps: int = 300
    seconds: float | None = None
    lr: float = 2e-4
    token_weight: float = 4.0
    checks: int = 10
    seed: int = 0
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checks < 1 or not self.lr > 0 or self.token_weight < 0:
            raise InputError(f"recovery needs steps, checks and lr above 0 and token_weight from 0 on, got {self}")


class Check(NamedTuple):
    """The held-out loss after some steps, in nats per image (without a classifier: token error)."""

    step: int
    seconds: float
    loss: float


class Thinning(Protocol):
    """What removes weights of the student while it trains (see ``gradual``)."""

    @property
    def done(self) -> bool:
        """Whether the student is as sparse as it is to be: before, its checks do not count as the best."""

    def after_step(self, share: float) -> None:
        """Act on the student behind an optimiser step, after a ``share`` of the training."""

    def state_dict(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave."""


class Recovered(NamedTuple):
    """A trained model.

    Attributes:
        model: the student with the least held-out loss of all checks, the untrained one included; of a training by a
            recipe, which does not aim at that loss, and of one in which a method learns what stays, the last; in eval
            mode.
        checks: the held-out losses in order, the first before any step.
    """

    model: Vit
    checks: tuple[Check, ...]


def recover(
    student: Vit,
    teacher: Vit,
    batches: Batches,
    held_out: Tensor,
    settings: RecoverSettings = RecoverSettings(),
    *,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    method: StructureMethod | None = None,
    thinning: Thinning | None = None,
) -> Recovered:
    """Train ``student`` to answer as ``teacher`` does; the student itself is changed, and both stay on their devices.

    Args:
        batches: training images; with several processes, each takes every so many-th batch.
        held_out: images that the training does not see, [M, C, H, W]: they choose among the checks.
        checkpoint: file that lets an interrupted training of the same models and settings go on; removed at the end.
        method: learns beside the model what may stay of it; see ``vitprune.learn``. Held-out losses are then those of
            the model as it is gated.
        thinning: removes weights of the student on the way; the checks before the last of them are not handed back.

    Raises:
        InputError: there are no training images, or the loss is no number (the learning rate is too high).
    """
    homes = [(model, next(model.parameters()).device) for model in (student, teacher)]
    run = _Run(student, teacher, held_out, settings, method, thinning)
    if checkpoint is not None and checkpoint.is_file():
        run.load(checkpoint)
    attached = method.attach(student) if method else []
    try:
        _go_on(run, batches, progress, checkpoint)
    finally:
        for hook in attached:
            hook.remove()
    student.load_state_dict(run.best)
    student.requires_grad_()
    for model, device in homes:
        model.to(device)
    if checkpoint is not None and run.accelerator.is_main_process:
        checkpoint.unlink(missing_ok=True)
    return Recovered(student.eval(), tuple(run.checks))


def _go_on(run: _Run, batches: Batches, progress: Progress | None, checkpoint: Path | None) -> None:
    """The steps that are left, and the checks among them."""
    if not run.checks:
        run.check()
    run.set_training(True)
    checked = run.checks_due()
    for batch in run.left_of(batches):
        run.train(batch)
        if progress is not None:
            progress(run.step, run.settings.steps, f"held-out loss {run.checks[-1].loss:.4f}")
        if run.checks_due() > checked:
            checked = run.checks_due()
            run.check()
            if checkpoint is not None:
                run.save(checkpoint)
    if run.thin(1.0) or run.checks[-1].step != run.step:
        run.check()


class _Run:
    """The state of a training."""

    def __init__(
        self,
        student: Vit,
        teacher: Vit,
        held_out: Tensor,
        settings: RecoverSettings,
        method: StructureMethod | None = None,
        thinning: Thinning | None = None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        torch.manual_seed(settings.seed)
        takes_turns = any(isinstance(module, Reducer) and module.rewarded for module in student.modules())
        self.accelerator = Accelerator(
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=takes_turns or method is not None)],
            cpu=not torch.accelerator.is_available(),  # unasked, processes on CPUs would each train on their own
            mixed_precision="bf16" if _has_bfloat16_units() else "no",
        )
        self.settings, self.plain, self.recipe = settings, student, settings.recipe or OURS
        self.method = method
        self.objective: Objective = Distillation(student.config, settings.token_weight)
        if settings.recipe:
            self.objective = Published(student.config, settings.recipe)
        self.mix = _mixing(self.recipe, student.config.classes) if self.objective.needs_labels else None
        self.judge = Distillation(student.config, settings.token_weight)
        self.teacher = _Teacher(teacher.to(self.accelerator.device), self.objective)
        groups = [*_groups(student, self.objective.second, self.recipe), *_method_groups(method, settings.lr)]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        with_outputs = _WithOutputs(student, self.objective, method)
        self.student, self.optimizer = self.accelerator.prepare(with_outputs, optimizer)
        self.clipped = [p for group in groups if "own" in group for p in group["params"]]
        self.of = (
            f"{fingerprint(student)} {fingerprint(teacher)} {settings} {method.identity if method else None} {thinning}"
        )
        self.held_out, self.thinning = held_out, thinning
        with torch.no_grad():
            self.wanted = [self.judge.outputs(self.teacher.model, some) for some in self._held_out()]
        self.step, self.begun = 0, time.monotonic()
        self.checks: list[Check] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf

    @property
    def seconds(self) -> float:
        """Since the training began, as the first of several processes counts them."""
        from accelerate.utils import broadcast

        passed = time.monotonic() - self.begun
        if self.accelerator.num_processes == 1:
            return passed
        return float(broadcast(torch.tensor([passed], device=self.accelerator.device)))

    def checks_due(self) -> int:
        """Checks that belong to what is done of the training, by steps or by seconds."""
        return int(self._done() * self.settings.checks + 1e-9)

    def left_of(self, batches: Batches) -> Iterator[Batch]:
        """The batches of the steps that are left, until steps or seconds run out."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        every = endless(batches, "recovery: there are no training images")
        for batch in islice(every, self.step * processes + rank, None, processes):
            if self._done() >= 1.0:
                return
            if self.objective.needs_labels and batch.labels is None:
                raise InputError("recovery: the published recipe learns classes, and the training images carry none")
            device = self.accelerator.device
            labels = None if batch.labels is None else batch.labels.to(device)
            yield batch._replace(images=batch.images.to(device), labels=labels)

    def train(self, batch: Batch) -> None:
        """One optimiser step."""
        batch, done = self._mixed(batch), self._done()
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(group, done)
        moment = Moment(self.step, done, self._lr({"own": False}, done))
        for module in self.plain.modules():
            if isinstance(module, Reducer):
                module.done = done
        # on a CPU the fused attention's backward pass takes twice as long as the plain one (torch 2.14)
        plain_attention = [SDPBackend.MATH] if batch.images.device.type == "cpu" else list(_FUSED_TOO)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher.ask(batch.images, batch.numbers)
        target = Target(wanted.answers, batch.labels if self.objective.needs_labels else None)
        if self.method is not None:
            self.method.begin(moment, target)
        with sdpa_kernel(plain_attention), self.accelerator.autocast():
            loss = self.objective.loss(self.student(batch.images, target), wanted, batch.labels)
        if not torch.isfinite(loss):
            raise InputError(f"recovery: the loss is {loss.item()} after {self.step} steps; lower recover.lr")
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.method is not None:
            self.method.after_backward(self.plain)
        self.accelerator.clip_grad_norm_(self.clipped, 1.0)
        self.optimizer.step()
        if self.method is not None:
            self.method.after_step(self.plain, moment, self._mean)
        self.step += 1
        if self.thinning is not None:
            self.thin(self._done())

    def thin(self, share: float) -> bool:
        """Remove the weights that are to go after a ``share`` of the training; whether these were the last ones."""
        if self.thinning is None:
            return False
        before = self.thinning.done
        self.thinning.after_step(share)
        return self.thinning.done and not before

    def set_training(self, training: bool) -> None:
        """Whether the student, and what learns beside it, are to be trained or judged."""
        self.plain.train(training)
        if self.method is not None:
            self.method.train(training)

    def check(self) -> None:
        """Look at the held-out loss, and keep the weights if they are the best so far (see ``Recovered``)."""
        self.set_training(False)
        with torch.no_grad():
            found = [_outputs(self.judge, self.plain, some, self.method) for some in self._held_out()]
        self.set_training(True)
        losses = [self._held_out_loss(one, wanted) for one, wanted in zip(found, self.wanted, strict=True)]
        loss = sum(losses) / len(self.held_out)
        counts = self.thinning is None or self.thinning.done
        last = self.settings.recipe or self.method or not self.best
        if counts and (last or loss < self.best_loss):
            self.best_loss = loss
            self.best = {name: value.detach().cpu().clone() for name, value in self.plain.state_dict().items()}
        self.checks.append(Check(self.step, self.seconds, loss))

    def save(self, path: Path) -> None:
        """Write all that goes on from here, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "of": self.of,
            "step": self.step,
            "seconds": self.checks[-1].seconds,
            "checks": [tuple(check) for check in self.checks],
            "best": self.best,
            "best_loss": self.best_loss,
            "thinning": self.thinning.state_dict() if self.thinning else {},
            "student": self.plain.state_dict(),
            "second": self.objective.second.state_dict() if self.objective.second else {},
            "method": self.method.state_dict() if self.method else {},
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = path.with_name(f".tmp-{path.name}")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Go on from ``path``, unless it is of another training or cut off: then the training begins anew."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch raises whatever the damaged bytes provoke
            return
        if state.get("of") != self.of:
            return
        self.plain.load_state_dict(state["student"])
        if self.objective.second:
            self.objective.second.load_state_dict(state["second"])
        if self.method:
            self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.thinning:
            self.thinning.load_state_dict(state["thinning"])
        self.step, self.best, self.best_loss = state["step"], state["best"], state["best_loss"]
        self.begun = time.monotonic() - state["seconds"]
        self.checks = [Check(*check) for check in state["checks"]]

    def _mixed(self, batch: Batch) -> Batch:
        """The batch as a recipe mixes it, alike at the same step of the same training."""
        even = len(batch.images) // 2 * 2  # images are mixed in pairs
        if self.mix is None or not even or batch.labels is None:
            return batch
        before = np.random.get_state()  # timm draws from numpy's own generator
        np.random.seed([self.settings.seed, self.step, self.accelerator.process_index])
        images, labels = self.mix(batch.images[:even].clone(), batch.labels[:even])
        np.random.set_state(before)
        return Batch(images, None, labels)

    def _done(self) -> float:
        """Share of the training that is over, by steps or by seconds, whichever is further."""
        steps = self.step / self.settings.steps
        return max(steps, min(1.0, self.seconds / self.settings.seconds)) if self.settings.seconds else steps

    def _lr(self, group: Mapping[str, Any], done: float) -> float:
        """The learning rate of a group of the optimiser."""
        if "peak" in group:
            since = max(0.0, done - group["begins"]) / (1 - group["begins"])
            return float(group["peak"]) * learning_rate_share(since, 0.0, self.recipe.last_lr)
        return self.settings.lr * self._lr_share(done, group["own"])

    def _mean(self, value: Tensor) -> Tensor:
        """Of all processes."""
        return self.accelerator.reduce(value, "mean")

    def _lr_share(self, done: float, own: bool) -> float:
        """What the settings' learning rate is multiplied by, for the token method's ``own`` weights or the others.

        Ours is that of the model's weights, a recipe's that of the method's.
        """
        recipe = self.recipe
        share = learning_rate_share(done, recipe.warmup, recipe.last_lr)
        if recipe is OURS:
            return share * METHOD_LR if own else share
        if own:
            return share
        return 0.0 if done < recipe.backbone_from else share * recipe.backbone_lr

    def _held_out_loss(self, found: Outputs, wanted: Outputs) -> float:
        """Summed over the images."""
        if self.plain.config.classes:
            return float(divergence(found.answers, wanted.answers).sum())
        return float(F.mse_loss(found.tokens, wanted.tokens)) * len(found.answers)

    def _held_out(self) -> Iterator[Tensor]:
        return (some.to(self.accelerator.device) for some in self.held_out.split(64))


class _Teacher:
    """The teacher's outputs. Those for images that come again are kept, as far as ``KEPT_BYTES`` go."""

    def __init__(self, model: Vit, objective: Objective) -> None:
        self.model, self.objective = model.eval(), objective
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # answers and tokens
        self.bytes_left = KEPT_BYTES

    def ask(self, images: Tensor, numbers: Tensor | None = None) -> Outputs:
        """What the teacher says of ``images`` [B, C, H, W], which are ``numbers`` [B]."""
        if numbers is None:
            return self.objective.outputs(self.model, images)
        wanted = numbers.tolist()
        fresh = [place for place, number in enumerate(wanted) if number not in self.known]
        found = {number: self.known[number] for number in wanted if number in self.known}
        if fresh:
            said = self.objective.outputs(self.model, images[fresh])
            found |= {wanted[place]: (said.answers[i], said.tokens[i]) for i, place in enumerate(fresh)}
            self._keep({wanted[place]: found[wanted[place]] for place in fresh})
        rows = [found[number] for number in wanted]
        return Outputs(torch.stack([answers for answers, _ in rows]), torch.stack([tokens for _, tokens in rows]))

    def _keep(self, fresh: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        needed = sum(part.nbytes for one in fresh.values() for part in one)
        if needed <= self.bytes_left:
            self.bytes_left -= needed
            self.known |= fresh


class _WithOutputs(nn.Module):
    """A model that gives all that an objective reads, so that one forward pass serves every loss."""

    def __init__(self, model: Vit, objective: Objective, method: StructureMethod | None) -> None:
        super().__init__()
        self.model, self._objective, self.second, self.method = model, objective, objective.second, method

    def forward(self, images: Tensor, target: Target) -> Outputs:
        return _outputs(self._objective, self.model, images, self.method, target)


def _outputs(
    objective: Objective, model: Vit, images: Tensor, method: StructureMethod | None, target: Target | None = None
) -> Outputs:
    """What ``model``, as ``method`` gates it, says of ``images``; with a ``target``, also what is added to the loss."""
    if method is None:
        return objective.outputs(model, images)

    def compute() -> Outputs:
        found = objective.outputs(model, images)
        added = method.penalty(model, target) if target is not None else None
        return found if added is None else found._replace(penalty=added)  # a student that is gated reduces no tokens

    return method.computed(model, compute)


def _mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """How ``recipe`` mixes images and classes; None: it does not."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    from timm.data import Mixup

    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)


def _groups(student: Vit, second: nn.Module | None, recipe: Recipe) -> list[dict[str, Any]]:
    """The weights that learn, for an optimiser: the token method's ``own`` and others, matrices with decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in recipe.frozen)
    for name, parameter in chain(student.named_parameters(), second.named_parameters() if second else ()):
        if parameter.requires_grad:
            kind = METHOD_WEIGHT.search(name) is not None, parameter.ndim >= 2
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "own": own, "weight_decay": recipe.weight_decay if matrices else 0.0}
        for (own, matrices), parameters in groups.items()
    ]


def _method_groups(method: StructureMethod | None, lr: float) -> list[dict[str, Any]]:
    """What the optimiser trains of a method; ``lr`` is the peak learning rate of the model's weights."""
    return [
        {
            "params": list(group.parameters),
            "weight_decay": 0.0,
            "maximize": group.ascent,
            "peak": lr if group.lr is None else group.lr,
            "begins": group.begins,
        }
        for group in (method.groups() if method else ())
    ]


def learning_rate_share(done: float, warmup: float = 0.1, last: float = 0.01) -> float:
    """Share of the peak learning rate after a share ``done`` of the training: up in a line, then down as a cosine."""
    if done < warmup:
        return last + (1 - last) * done / warmup
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


_FUSED_TOO = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def endless(batches: Batches, none: str) -> Iterator[Batch]:
    """The batches of all epochs, one after the other.

    Raises:
        InputError: an epoch is empty; it says ``none``.
    """
    for epoch in count():
        empty = True
        for batch in batches(epoch):
            empty = False
            yield batch
        if empty:
            raise InputError(none)


def _has_bfloat16_units() -> bool:
    """Whether the GPU or CPU multiplies matrices of bfloat16, and so is faster with it.

    AVX512-BF16 alone is enough on AMD's CPUs only: a training step of DeiT-S took 0.6 of float32's time on an EPYC of
    the Zen 4 generation, and 1.6 times as long on a Xeon without AMX (torch 2.14).
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.is_file() else ""
    return "amx_bf16" in text or ("AuthenticAMD" in text and "avx512_bf16" in text)
