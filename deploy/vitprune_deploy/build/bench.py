"""What the stages of one build share: the profile, the outputs of earlier stages, the dense model and the images."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from vitprune import parts
from vitprune.errors import InputError, VitpruneError

from ..data import Preprocess, Split, batches, open_split
from ..profile import Profile

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.model.config import VitConfig
    from vitprune.model.vit import Vit
    from vitprune.plan import Plan
    from vitprune.search.counts import TokenMethod

    from ..export.islands import Island

RANKINGS = "rankings"  # in the folder of the stage that measures losses
METHOD_WEIGHTS = "-weights.safetensors"  # behind a token method's name: in the stage that found them
RANGE_IMAGES = 64  # that tell which operations fp16 cannot hold
CHANNELS = "channels.json"  # in the folder of the stage that chooses token methods: those that stay
INT8 = "int8.json"  # in the folder of the stage that tries it, as is the next
INT8_MODEL = "model.int8.onnx"
METHODS = "methods.json"  # in the folder of the stage that chooses token methods
OWN_COUNTS = "counts.json"  # there too, where a method's own search was asked for


class Shows(Protocol):
    """Whoever shows a person how far a build is; see ``console.Console``."""

    def progress(self, done: float, total: float, what: str) -> None:
        """``done`` of ``total`` of the current stage's work is finished."""

    def say(self, text: str) -> None:
        """A line for the person."""


@dataclass
class Bench:
    """What stages read. Models and images are loaded when first asked for, and kept.

    Attributes:
        profile: what to build.
        shows: where progress goes.
        work: folder for what a stage leaves for its own next try.
        folders: the outputs of the stages that are done, by their names.
        others: further devices that its plan must suit as well, measured already.
        lead: the device that the plan was found with; None: it is searched here.
    """

    profile: Profile
    shows: Shows
    work: Path
    folders: dict[str, Path] = field(default_factory=dict)
    others: tuple[Bench, ...] = ()
    lead: Bench | None = None
    sparse_kernels: dict[str, Any] | None = field(default=None, init=False, repr=False)  # see ``sparse.search_kernels``
    _dense_islands: Sequence[Island] | None = field(default=None, init=False, repr=False)

    @property
    def devices(self) -> tuple[Bench, ...]:
        """All that the plan must suit, this one first."""
        return (self, *self.others)

    def json(self, stage: str, name: str) -> Any:
        """What a finished stage wrote to the JSON file ``name``."""
        return json.loads((self.folders[stage] / name).read_bytes())

    @cached_property
    def dense(self) -> Vit:
        """The model to prune, in eval mode."""
        return load_vit(self.folders["model"], "dense")

    @cached_property
    def base(self) -> Vit:
        """The model that the search works on: the dense one, or what fewer channels of the residual stream leave."""
        from vitprune.surgery import dense_plan, prune

        if self.channels is None:
            return self.dense
        return prune(self.dense, replace(dense_plan(self.dense), embed=self.channels))

    @property
    def channels(self) -> tuple[int, ...] | None:
        """The channels of the residual stream that stay, known once the stage ``methods`` is done; None: all."""
        return None if self.profile.prune.embedding is None else tuple(self.json("methods", CHANNELS))

    @property
    def base_config(self) -> VitConfig:
        """The architecture of ``base``, known before it is.

        Raises:
            InputError: the model has fewer channels.
            NotSupported: none can leave it.
        """
        from vitprune.surgery import narrowed

        count = self.profile.prune.embedding
        try:
            return self.dense.config if count is None else narrowed(self.dense.config, tuple(range(count)))
        except VitpruneError as error:
            raise type(error)(f"prune.embedding: {error}") from error

    @cached_property
    def pruned(self) -> Vit:
        """The model that is shipped, in eval mode, once the stage ``recover`` is done."""
        return load_vit(self.folders["recover"], "model")

    @property
    def plan(self) -> Plan:
        """What the stage ``search`` found."""
        from vitprune.plan import Plan

        return Plan.from_dict(yaml.safe_load((self.folders["search"] / "plan.yaml").read_bytes()))

    def method_weights(self, method: str | None) -> dict[str, Tensor]:
        """A token method's own weights, as they came with the model or were found out from images; else none."""
        from safetensors.torch import load_file

        came = method == self.profile.model.checkpoint_format
        folder = self.folders.get("model" if came else "methods")
        path = folder / f"{method}{METHOD_WEIGHTS}" if folder else None
        return load_file(path) if path and path.is_file() else {}

    def token_blocks(self) -> Collection[int] | None:
        """The blocks that may reduce tokens: those of the profile, or that weights came for; None: all."""
        asked, came = self.profile.prune.tokens.blocks, self.profile.model.checkpoint_format
        if asked is None and came is not None:
            return {int(name.split(".")[1]) for name in self.method_weights(came)} or None
        return asked

    @cached_property
    def preprocess(self) -> Preprocess:
        """How the model wants its images."""
        return Preprocess.from_dict(self.json("model", "preprocess.json"))

    @cached_property
    def class_names(self) -> list[str] | None:
        """The classes in the order of the model's outputs; None: not known."""
        return self.json("model", "classes.json")

    @cached_property
    def images(self) -> Split:
        """The three parts of the images.

        Raises:
            InputError: as ``open_split``; or the profile has a floor of top-1, and the test images carry no classes.
        """
        classes = self.json("model", "dense.json")["classes"]
        found = open_split(
            self.profile.data,
            class_names=self.class_names,
            num_classes=classes or None,
            seed=self.profile.seed,
        )
        floors = [key for key in ("max_drop", "min_top1") if getattr(self.profile.accuracy, key) is not None]
        if floors and found.test.labels is None:
            stray = next(entry.name for entry in found.test.store.source.entries if entry.folder is None)
            raise InputError(
                f"accuracy.{floors[0]} needs classes, and the images of {found.test.where} carry none: {stray} lies in "
                "no class folder; move what does, or use accuracy.min_agreement"
            )
        return found

    @cached_property
    def calibration(self) -> Tensor:
        """The calibration images as the model wants them, [M, channels, height, width]."""
        import torch

        found = [pixels for pixels, _ in batches(self.images.calibration, self.preprocess, 64)]
        return torch.cat([torch.from_numpy(pixels) for pixels in found])

    @property
    def search_images(self) -> Tensor:
        """Calibration images that losses are measured on."""
        return self.calibration[: -self.profile.search.holdout_images]

    @property
    def holdout_images(self) -> Tensor:
        """Calibration images that only choose between the last candidates."""
        return self.calibration[-self.profile.search.holdout_images :]

    def int8_file(self) -> Path | None:
        """The pruned model in int8 if it is shipped, which is known once the stage ``int8`` is done."""
        found = self.json("int8", INT8) if "int8" in self.folders else {}
        return self.folders["int8"] / found["file"] if found.get("kept") else None

    def islands(self, model: Vit, precision: str) -> Sequence[Island]:
        """Operations of ``model`` that fp16 cannot hold, by calibration images; none in another precision."""
        if precision != "fp16":
            return ()
        from ..export.islands import find_islands

        if model is not self.dense:
            return find_islands(model, self.calibration[:RANGE_IMAGES])
        if self._dense_islands is None:
            self._dense_islands = find_islands(model, self.calibration[:RANGE_IMAGES])
        return self._dense_islands

    def token_methods(self) -> list[TokenMethod]:
        """The token methods that are searched: those of the stage ``methods``; before it, all candidates.

        Raises:
            NotSupported: as ``candidates``.
        """
        found = self.candidates()
        if "methods" not in self.folders:
            return found
        kept = self.json("methods", METHODS)["searched"]
        return [method for method in found if method.name in kept]

    def candidates(self) -> list[TokenMethod]:
        """The token methods that the profile asks for: none, those, or each that can act on the model.

        Of all methods those are left out that need training first, and those that cannot leave any number of tokens.

        Raises:
            NotSupported: the one asked for cannot.
            InputError: it must be trained first, and will not be.
        """
        from vitprune.errors import NotSupported
        from vitprune.search.counts import TokenMethod
        from vitprune.surgery import check_method
        from vitprune.tokens.base import Reducer

        asked, kind = self.profile.prune.tokens.method, Reducer
        if asked == "none":
            return []
        found, named = [], [asked] if isinstance(asked, str) else asked
        for name in parts.names("vitprune.tokens") if asked == "auto" else named:
            trained = name == self.profile.model.checkpoint_format
            method = TokenMethod.of(name, parts.load("vitprune.tokens", name, kind), trained)
            if asked == "auto" and (method.judged_as != name or method.grid):
                continue
            if method.judged_as != name and not self.profile.recover.enabled:
                raise InputError(f"prune.tokens.method {name} must be trained, and recover.enabled is false")
            try:
                for one in (name, method.judged_as):
                    check_method(one, self.dense.config)
            except NotSupported as error:
                if asked == "auto":
                    continue
                raise NotSupported(f"prune.tokens.method: {error}") from error
            found.append(method)
        return found

    def schedule(self) -> tuple[int, ...] | None:
        """Patch tokens that leave each block, where the profile gives them; None: they are searched.

        Those of a method's own search are known from the stage ``methods`` on; None before it.

        Raises:
            InputError: the schedule does not fit the method or the model.
        """
        from vitprune.schedules import counts
        from vitprune.search.own import check_own, own_number

        wanted, config = self.profile.prune.tokens.schedule, self.dense.config
        if wanted is None:
            return None
        method, number = self.candidates()[0].name, own_number(wanted)
        try:
            if number is not None:
                check_own(method, number)
                if "methods" not in self.folders:
                    return None
                wanted = self.json("methods", OWN_COUNTS)
            return counts(method, wanted, len(config.blocks), config.patches, config.prefix)
        except InputError as error:
            raise InputError(f"prune.tokens.schedule: {error}") from error


def load_vit(folder: Path, name: str) -> Vit:
    """The model that ``save_vit`` left in ``folder``."""
    from safetensors.torch import load_file

    from vitprune.model.config import VitConfig
    from vitprune.surgery import build

    config = VitConfig.from_dict(json.loads((folder / f"{name}.json").read_bytes()))
    return build(config, load_file(folder / f"{name}.safetensors"))


def save_vit(model: Vit, folder: Path, name: str) -> None:
    """Write ``name``.json and ``name``.safetensors."""
    write_json(folder / f"{name}.json", model.config.to_dict())
    save_weights(model.state_dict(), folder / f"{name}.safetensors")


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write ``weights`` as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, path)


def write_json(path: Path, value: Mapping[str, Any] | list[Any] | None) -> None:
    """Write plain data so that a person can read it too."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
