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
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import InputError
from .model.state import TokenState
from .model.vit import Vit, fingerprint

# epoch -> batches of normalised images [B, C, H, W], the same each time; and which they are, [B], where each image
# comes again as it was, so that the teacher need not be asked about it again, or None
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor | None]]]
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what to say
Outputs = tuple[Tensor, Tensor]  # answers and tokens of a batch

KEPT_BYTES = 512 * 2**20  # of the teacher's outputs


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
    """

    steps: int = 300
    seconds: float | None = None
    lr: float = 2e-4
    token_weight: float = 4.0
    checks: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checks < 1 or not self.lr > 0 or self.token_weight < 0:
            raise InputError(f"recovery needs steps, checks and lr above 0 and token_weight from 0 on, got {self}")


class Check(NamedTuple):
    """The held-out loss after some steps, in nats per image (without a classifier: token error)."""

    step: int
    seconds: float
    loss: float


class Recovered(NamedTuple):
    """A trained model.

    Attributes:
        model: the student with the least held-out loss of all checks, the untrained one included; in eval mode.
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
) -> Recovered:
    """Train ``student`` to answer as ``teacher`` does; the student itself is changed, and both stay on their devices.

    Args:
        batches: training images; with several processes, each takes every so many-th batch.
        held_out: images that the training does not see, [M, C, H, W]: they choose among the checks.
        checkpoint: file that lets an interrupted training of the same models and settings go on; removed at the end.

    Raises:
        InputError: there are no training images, or the loss is no number (the learning rate is too high).
    """
    homes = [(model, next(model.parameters()).device) for model in (student, teacher)]
    run = _Run(student, teacher, held_out, settings)
    if checkpoint is not None and checkpoint.is_file():
        run.load(checkpoint)
    if not run.checks:
        run.check()
    student.train()
    checked = run.checks_due()
    for images, numbers in run.left_of(batches):
        run.train(images, numbers)
        if progress is not None:
            progress(run.step, settings.steps, f"held-out loss {run.checks[-1].loss:.4f}")
        if run.checks_due() > checked:
            checked = run.checks_due()
            run.check()
            if checkpoint is not None:
                run.save(checkpoint)
    if run.checks[-1].step != run.step:
        run.check()
    student.load_state_dict(run.best)
    for model, device in homes:
        model.to(device)
    if checkpoint is not None and run.accelerator.is_main_process:
        checkpoint.unlink(missing_ok=True)
    return Recovered(student.eval(), tuple(run.checks))


class _Run:
    """The state of a training."""

    def __init__(self, student: Vit, teacher: Vit, held_out: Tensor, settings: RecoverSettings) -> None:
        from accelerate import Accelerator

        torch.manual_seed(settings.seed)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # unasked, processes on CPUs would each train on their own
            mixed_precision="bf16" if _has_bfloat16_units() else "no",
        )
        self.settings, self.plain = settings, student
        self.with_patches = all(block.patches is None for block in student.config.blocks)
        self.teacher = _Teacher(teacher.to(self.accelerator.device), self.with_patches)
        decayed = [p for p in student.parameters() if p.ndim >= 2]
        others = [p for p in student.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        self.student, self.optimizer = self.accelerator.prepare(_Pair(student, self.with_patches), optimizer)
        self.of = f"{fingerprint(student)} {fingerprint(teacher)} {settings}"
        self.held_out = held_out
        with torch.no_grad():
            self.wanted = [self.teacher.ask(some) for some in self._held_out()]
        self.step, self.begun = 0, time.monotonic()
        self.checks: list[Check] = []
        self.best: dict[str, Tensor] = {}

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

    def left_of(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches of the steps that are left, until steps or seconds run out."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for images, numbers in islice(_endless(batches), self.step * processes + rank, None, processes):
            if self._done() >= 1.0:
                return
            yield images.to(self.accelerator.device), numbers

    def train(self, images: Tensor, numbers: Tensor | None) -> None:
        """One optimiser step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * learning_rate_share(self._done())
        # on a CPU the fused attention's backward pass takes twice as long as the plain one (torch 2.14)
        plain_attention = [SDPBackend.MATH] if images.device.type == "cpu" else list(_FUSED_TOO)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher.ask(images, numbers)
        with sdpa_kernel(plain_attention), self.accelerator.autocast():
            answers, tokens = self.student(images)
            loss = self._loss(answers, tokens, *wanted)
        if not torch.isfinite(loss):
            raise InputError(f"recovery: the loss is {loss.item()} after {self.step} steps; lower recover.lr")
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1

    def check(self) -> None:
        """Look at the held-out loss, and keep the weights if they are the best so far."""
        self.plain.eval()
        with torch.no_grad():
            found = [_outputs(self.plain, some, self.with_patches) for some in self._held_out()]
        self.plain.train()
        losses = [self._held_out_loss(*one, *wanted) for one, wanted in zip(found, self.wanted, strict=True)]
        loss = sum(losses) / len(self.held_out)
        if not self.checks or loss < min(check.loss for check in self.checks):
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
            "student": self.plain.state_dict(),
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
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]
        self.begun = time.monotonic() - state["seconds"]
        self.checks = [Check(*check) for check in state["checks"]]

    def _done(self) -> float:
        """Share of the training that is over, by steps or by seconds, whichever is further."""
        steps = self.step / self.settings.steps
        return max(steps, min(1.0, self.seconds / self.settings.seconds)) if self.settings.seconds else steps

    def _loss(self, answers: Tensor, tokens: Tensor, wanted_answers: Tensor, wanted_tokens: Tensor) -> Tensor:
        error = F.mse_loss(tokens.float(), wanted_tokens.float())
        if not self.plain.config.classes:
            return error
        return _divergence(answers.float(), wanted_answers.float()).mean() + self.settings.token_weight * error

    def _held_out_loss(self, answers: Tensor, tokens: Tensor, wanted_answers: Tensor, wanted_tokens: Tensor) -> float:
        """Summed over the images."""
        if self.plain.config.classes:
            return float(_divergence(answers, wanted_answers).sum())
        return float(F.mse_loss(tokens, wanted_tokens)) * len(answers)

    def _held_out(self) -> Iterator[Tensor]:
        return (some.to(self.accelerator.device) for some in self.held_out.split(64))


class _Teacher:
    """The teacher's outputs. Those for images that come again are kept, as far as ``KEPT_BYTES`` go."""

    def __init__(self, model: Vit, with_patches: bool) -> None:
        self.model, self.with_patches = model.eval(), with_patches
        self.known: dict[int, Outputs] = {}
        self.bytes_left = KEPT_BYTES

    def ask(self, images: Tensor, numbers: Tensor | None = None) -> Outputs:
        """What the teacher says of ``images`` [B, C, H, W], which are ``numbers`` [B]."""
        if numbers is None:
            return _outputs(self.model, images, self.with_patches)
        wanted = numbers.tolist()
        fresh = [place for place, number in enumerate(wanted) if number not in self.known]
        found = {number: self.known[number] for number in wanted if number in self.known}
        if fresh:
            answers, tokens = _outputs(self.model, images[fresh], self.with_patches)
            found |= {wanted[place]: (answers[i], tokens[i]) for i, place in enumerate(fresh)}
            self._keep({wanted[place]: found[wanted[place]] for place in fresh})
        rows = [found[number] for number in wanted]
        return torch.stack([answers for answers, _ in rows]), torch.stack([tokens for _, tokens in rows])

    def _keep(self, fresh: Mapping[int, Outputs]) -> None:
        needed = sum(part.nbytes for one in fresh.values() for part in one)
        if needed <= self.bytes_left:
            self.bytes_left -= needed
            self.known |= fresh


class _Pair(nn.Module):
    """A model that gives its tokens behind the last block as well, so that one forward pass serves every loss."""

    def __init__(self, model: Vit, with_patches: bool) -> None:
        super().__init__()
        self.model, self.with_patches = model, with_patches

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return _outputs(self.model, images, self.with_patches)


def _outputs(model: Vit, images: Tensor, with_patches: bool) -> Outputs:
    """Answers [B, classes], and tokens [B, N, C] behind the last block that a model with fewer patches has as well.

    These are all of them, or the prefix, or where there is none the mean. Each is normalised: single channels and
    tokens of large models are hundreds of times the others, and would be all that is learned.
    """
    state: TokenState = model.embed(images)
    for block in model.blocks:
        state = block(state)
    tokens = state.x
    if not with_patches and state.prefix:
        tokens = tokens[:, : state.prefix]
    elif not with_patches:
        size = torch.ones_like(tokens[..., :1]) if state.size is None else state.size
        tokens = (tokens * size).sum(1, keepdim=True) / size.sum(1, keepdim=True)
    return model.classify(state), F.layer_norm(tokens, tokens.shape[-1:])


def learning_rate_share(done: float) -> float:
    """Share of the peak learning rate after a share ``done`` of the training."""
    if done < 0.1:
        return 0.01 + 0.99 * done / 0.1
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


_FUSED_TOO = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def _divergence(answers: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || answers) in nats, one for each image."""
    return F.kl_div(answers.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
    for epoch in count():
        empty = True
        for batch in batches(epoch):
            empty = False
            yield batch
        if empty:
            raise InputError("recovery: there are no training images")


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
