"""Does the exported file compute what the torch model does? Asked at several batch and image sizes, ties told apart.

A file in bf16, for which ONNX Runtime has no kernels on a CPU, is run as ``in_fp32`` writes it out: first without the
rounding of results, compared with a model of the same weights, which shows that the graph is right; then with it.

Outputs alone cannot be compared where tokens are selected: two scores that differ in the last bit may change places,
and then other tokens stay. So an image whose outputs differ is judged a second time: torch follows, at every top-k
and sort, the order that ONNX Runtime chose. That image is a tie if this order is one of torch's own scores too, up to
``score_tolerance`` of their range, and the outputs then agree. Anything else is a difference, and an error.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitprune.errors import InputError, NotSupported
from vitprune.model.vit import Vit

from .in_fp32 import write_in_fp32


class Tolerance(NamedTuple):
    """How far two computations of the same may lie apart.

    Attributes:
        output: largest difference of outputs, as a share of the largest of these (at least 1).
        score: how far two scores may be out of order and still count as tied, as a share of the range of scores.
    """

    output: float
    score: float


# fp32: sums of some thousand products in another order, through a dozen layers; a wrong token is off by 1e-2 and more.
# fp16: 11 bits instead of 24 at every step; bf16: 8.
TOLERANCES = {"fp32": Tolerance(1e-4, 1e-4), "fp16": Tolerance(2e-2, 2e-2), "bf16": Tolerance(1.6e-1, 1.6e-1)}
UNROUNDED = Tolerance(1e-2, 1e-2)  # of a bf16 graph in fp32: the scale of attention is a number in bf16
UNROUNDED_IMAGES = 16


class Case(NamedTuple):
    """What was compared at one batch size and image size."""

    batch: int
    image_size: tuple[int, int]
    images: int
    max_abs: float
    ties: int


@dataclass(frozen=True)
class Parity:
    """Agreement of an ONNX file in ONNX Runtime (CPU) with the torch model in fp32.

    Attributes:
        max_abs: largest absolute difference of outputs; for ties, with torch following ONNX Runtime's order.
        top1_agreement: percent of images with the same largest logit, ties included; None: the output is no logits.
        ties: images in which equal scores were told apart differently.
        images: how many were compared.
        cases: the same for each batch size and image size.
    """

    max_abs: float
    top1_agreement: float | None
    ties: int
    images: int
    cases: tuple[Case, ...]


def check_parity(
    model: Vit,
    path: Path,
    images: Tensor | None = None,
    *,
    batches: Sequence[int] = (1, 3),
    image_sizes: Sequence[tuple[int, int]] | None = None,
    precision: str = "fp32",
    tolerance: Tolerance | None = None,
) -> Parity:
    """Compare the ONNX file at ``path`` with ``model``, a ``Vit`` in fp32, in ONNX Runtime on the CPU.

    Args:
        images: normalised, [M, channels, height, width], each compared once, dealt out to the cases in turn and
            resized to theirs; None: random ones, one batch for each case.
        batches: batch sizes; a file with a fixed batch is compared at that.
        image_sizes: heights and widths in pixels; None: the model's own, and where the file's are symbolic a second.
        precision: of the file; decides on the tolerance where none is given, and on how the file is run.

    Raises:
        NotSupported: an output differs by more than the tolerance, and not by a tie; the message has the figures.
        InputError: there are no images, or the file fails to run at one of the sizes.
    """
    if precision == "bf16":
        _check_unrounded(model, path, images, batches, image_sizes)
    limit = tolerance or TOLERANCES[precision]
    cases = _cases(model, path, batches, image_sizes)
    found: dict[tuple[int, tuple[int, int]], list[_Compared]] = {case: [] for case in cases}
    with _Ranked(path, precision) as session:
        for (batch, size), part in _deal(model, images, cases):
            found[batch, size].append(_compare(model, session, part, limit))
    results = [_case(*case, compared) for case, compared in found.items()]
    everything = list(itertools.chain.from_iterable(found.values()))
    total = sum(case.images for case in results)
    agreed = sum(compared.agreed for compared in everything)
    return Parity(
        max_abs=max(case.max_abs for case in results),
        top1_agreement=100 * agreed / total if model.config.classes else None,
        ties=sum(case.ties for case in results),
        images=total,
        cases=tuple(results),
    )


def _check_unrounded(
    model: Vit,
    path: Path,
    images: Tensor | None,
    batches: Sequence[int],
    image_sizes: Sequence[tuple[int, int]] | None,
) -> None:
    """NotSupported if a bf16 graph computes something else than ``model``; the tolerance of bf16 might hide it."""
    same_weights = copy.deepcopy(model).bfloat16().float()
    few = None if images is None else images[:UNROUNDED_IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        plain = write_in_fp32(path, Path(folder), rounded=False)
        try:
            check_parity(same_weights, plain, few, batches=batches, image_sizes=image_sizes, tolerance=UNROUNDED)
        except NotSupported as error:
            raise NotSupported(f"{path}, computed in fp32: {str(error).removeprefix(f'{plain}: ')}") from error


class _Compared(NamedTuple):
    images: int
    max_abs: float
    agreed: int
    ties: int


def _case(batch: int, size: tuple[int, int], compared: list[_Compared]) -> Case:
    images, ties = sum(c.images for c in compared), sum(c.ties for c in compared)
    return Case(batch, size, images, max(c.max_abs for c in compared), ties)


def _cases(
    model: Vit, path: Path, batches: Sequence[int], image_sizes: Sequence[tuple[int, int]] | None
) -> list[tuple[int, tuple[int, int]]]:
    """Batch sizes and image sizes to compare at, as far as the file's input leaves them free."""
    import onnx

    value = onnx.load(path, load_external_data=False).graph.input[0]
    fixed = [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
    if image_sizes is None:
        own, patch = model.config.image_size, model.config.patch_size
        smaller = tuple(max(2, s * 3 // 4 // p) * p for s, p in zip(own, patch, strict=True))
        # heights and widths that differ, so that a mix-up of the two shows
        image_sizes = [own, (fixed[2] or smaller[0], fixed[3] or own[1] + patch[1])]
    sizes = dict.fromkeys((fixed[2] or height, fixed[3] or width) for height, width in image_sizes)
    return list(itertools.product(dict.fromkeys(fixed[0] or batch for batch in batches), sizes))


def _deal(
    model: Vit, images: Tensor | None, cases: list[tuple[int, tuple[int, int]]]
) -> Iterator[tuple[tuple[int, tuple[int, int]], Tensor]]:
    """Batches for the cases in turn, until each image and each case has been served."""
    if images is None:
        count = sum(batch for batch, _ in cases)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, model.config.channels, *model.config.image_size, generator=generator)
    if not len(images):
        raise InputError("parity needs at least one image, got none")
    used = 0
    for number, (batch, size) in enumerate(itertools.cycle(cases)):
        if number >= len(cases) and used >= len(images):
            return
        part = images[torch.arange(used, used + batch) % len(images)]
        used += batch
        if tuple(part.shape[-2:]) != size:
            part = F.interpolate(part, size, mode="bilinear", antialias=True)
        yield (batch, size), part.contiguous()


def _compare(model: Vit, session: _Ranked, images: Tensor, limit: Tolerance) -> _Compared:
    """One batch through both; NotSupported if they differ."""
    reference = _torch(model, images)
    output = session.run(images)
    if output.shape != reference.shape:
        raise NotSupported(
            f"{session.path}: for images {list(images.shape)} torch gives {list(reference.shape)}, "
            f"ONNX Runtime {list(output.shape)}; the exporter has fixed a size that should be free"
        )
    agreed = int((reference.argmax(-1) == output.argmax(-1)).sum())
    scale = max(1.0, float(reference.abs().max()))
    difference = _per_image(reference, output)
    apart = ~(difference <= limit.output * scale)  # a NaN is apart
    ties = int(apart.sum())
    if ties:
        replayed = _replay(model, session, images, limit.score)
        followed = difference if replayed is None else _per_image(replayed[0], output)
        tied = torch.zeros_like(apart) if replayed is None else replayed[1]
        wrong = apart & ~(tied & (followed <= limit.output * scale))
        if wrong.any():
            worst = float(difference[wrong].nan_to_num(nan=float("inf")).max())
            raise NotSupported(
                f"{session.path}: {int(wrong.sum())} of {len(images)} images [{', '.join(map(str, images.shape))}] "
                f"differ from torch by up to {worst:.3g} where {limit.output * scale:.3g} is allowed, "
                f"and not because scores are tied{session.hint(output)}; do not use this file"
            )
        difference = torch.where(apart, followed, difference)
    return _Compared(len(images), float(difference.max()), agreed, ties)


def _torch(model: Vit, images: Tensor) -> Tensor:
    """The reference's output on the CPU."""
    weights = next(model.parameters())
    with torch.no_grad():
        return model(images.to(weights)).float().cpu()


def _per_image(a: Tensor, b: Tensor) -> Tensor:
    """Largest absolute difference for each image, [B]."""
    return (a - b).abs().flatten(1).amax(1)


def _replay(model: Vit, session: _Ranked, images: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """The reference's output when it follows ONNX Runtime's order, and for which images that is an order of its own.

    None if the two do not rank alike often, so that their rankings cannot be matched.
    """
    follow = _Follow(session.rankings(images), tolerance, len(images))
    with follow:
        output = _torch(model, images)
    return (output, follow.tied) if follow.complete() else None


class _Follow(TorchFunctionMode):
    """While active, rankings of floats take the order that is given, and it is noted whether scores allow it.

    Attributes:
        tied: [B] whether the given order was, for that image, everywhere an order of the scores up to the tolerance.
    """

    RANKINGS = (torch.topk, Tensor.topk, torch.sort, Tensor.sort)

    def __init__(self, orders: list[Tensor], tolerance: float, batch: int) -> None:
        super().__init__()
        self._orders, self._tolerance, self._next = orders, tolerance, 0
        self.tied = torch.ones(batch, dtype=torch.bool)

    def complete(self) -> bool:
        """Whether as many rankings were asked for as are given."""
        return self._next == len(self._orders)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in self.RANKINGS or not args[0].is_floating_point():
            return result
        self._next += 1
        order = self._orders[self._next - 1] if self._next <= len(self._orders) else result.indices
        if order.shape != result.indices.shape:
            self._next = len(self._orders) + 1  # not the same ranking: nothing can be said
            return result
        dim = _dim(func, args, kwargs or {})
        order = order.to(result.indices.device)
        values = args[0].gather(dim, order)
        spread = args[0].amax(dim, keepdim=True) - args[0].amin(dim, keepdim=True)
        # as good as its own order: at each rank, the score that is there is the score that belongs there
        good = (values - result.values).abs() <= self._tolerance * spread
        self.tied &= good.flatten(1).all(1).cpu() if good.ndim > 1 else good.all().cpu()  # one ranking for all images
        return type(result)((values, order))


def _dim(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The axis along which a ranking ranks."""
    place = 2 if func in (torch.topk, Tensor.topk) else 1
    return kwargs["dim"] if "dim" in kwargs else args[place] if len(args) > place else -1


class _Ranked:
    """An ONNX file in ONNX Runtime on the CPU, and a second form of it that also tells how it ranked."""

    def __init__(self, path: Path, precision: str) -> None:
        self.path, self._precision = path, precision
        self._folder = tempfile.TemporaryDirectory()
        bf16 = precision == "bf16"
        self._file = write_in_fp32(path, Path(self._folder.name), rounded=True) if bf16 else path
        self._session = _open(self._file)
        self._telling: Any = None

    def __enter__(self) -> _Ranked:
        return self

    def __exit__(self, *error: object) -> None:
        self._session = self._telling = None
        self._folder.cleanup()

    def hint(self, output: Tensor) -> str:
        """What may lie behind an ``output`` in fp16 that is no number."""
        if self._precision != "fp16" or output.isfinite().all():
            return ""
        return "; they are no numbers, so something left the range of fp16, which ends at 65504: bf16 would hold it"

    def run(self, images: Tensor) -> Tensor:
        """The first output for ``images``."""
        return torch.from_numpy(
            _run(self._session, [self._session.get_outputs()[0].name], images, self.path)[0]
        ).float()

    def rankings(self, images: Tensor) -> list[Tensor]:
        """Indices of each ranking of floats, in the order of the graph."""
        names = _top_k(self._file)
        if not names:
            return []
        if self._telling is None:
            self._telling = _open_with_outputs(self._file, [name for pair in names for name in pair])
        outputs = _run(self._telling, [name for pair in names for name in pair], images, self.path)
        pairs = zip(outputs[::2], outputs[1::2], strict=True)
        return [torch.from_numpy(order) for values, order in pairs if np.issubdtype(values.dtype, np.floating)]


def _top_k(path: Path) -> list[tuple[str, str]]:
    """Names of the values and the indices of each TopK node."""
    import onnx

    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "TopK"]
    return [(node.output[0] or f"{node.output[1]}_values", node.output[1]) for node in nodes]


def _open_with_outputs(path: Path, names: list[str]) -> Any:
    """A session of the file whose inner values ``names`` are outputs too."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "TopK" and not node.output[0]:
            node.output[0] = f"{node.output[1]}_values"
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".ranked-", suffix=".onnx") as file:  # beside its weights
        file.write(model.SerializeToString())
        file.flush()
        return _open(Path(file.name))


def _open(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, names: list[str], images: Tensor, path: Path) -> list[np.ndarray]:
    """Outputs ``names``; InputError if the file cannot take images of this shape."""
    try:
        return session.run(names, {session.get_inputs()[0].name: images.numpy()})
    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not run for images {list(images.shape)}: {text}") from error
