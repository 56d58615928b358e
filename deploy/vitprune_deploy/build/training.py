"""Training: in this process, or in one process for each GPU where there are several.

With several, torchrun starts this file once for each, and accelerate shares the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from vitprune.errors import InputError, VitpruneError

from ..console import Console
from ..data import Augmented
from ..profile import load_profile
from .bench import Bench, load_vit, save_vit, write_json
from .sparse import thinning

if TYPE_CHECKING:
    from vitprune.model.vit import Vit
    from vitprune.recover import Batch
    from vitprune.tokens.base import Recipe

LR = 1e-4  # peak learning rate of our own distillation
IN_THE_PROCESS = 50_000  # more images than this are decoded by processes of their own


def train(bench: Bench, slim: Vit, folder: Path) -> None:
    """Train ``slim`` as the profile says, and write it with the losses on the way into ``folder``."""
    from accelerate import PartialState

    from vitprune.recover import RecoverSettings, recover

    wanted, recipe = bench.profile.recover, published_recipe(bench, slim)
    lr = wanted.lr or (recipe.lr if recipe else LR)
    found = recover(
        slim,
        bench.dense,
        lambda epoch: batches(bench, epoch),
        bench.calibration,  # all of them: the more, the better they choose among the checks
        RecoverSettings(wanted.max_steps, wanted.max_seconds, lr, seed=bench.profile.seed, recipe=recipe),
        progress=bench.shows.progress,
        checkpoint=bench.work / "recovery.pt",
        thinning=thinning(bench, slim),
    )
    if PartialState().is_main_process:
        save_vit(found.model, folder, "model")
        write_json(folder / "recovery.json", [check._asdict() for check in found.checks])


def published_recipe(bench: Bench, slim: Vit) -> Recipe | None:
    """What the authors of the model's token method train with, where the profile asks for it.

    Raises:
        InputError: the profile asks for it, and the plan reduces no tokens; or the images carry no classes.
    """
    from vitprune import parts
    from vitprune.tokens.base import Reducer

    if bench.profile.recover.recipe == "distil":
        return None
    if slim.config.reducer is None:
        raise InputError("recover.recipe is published, and the plan that was found reduces no tokens; use distil")
    recipe = parts.load("vitprune.tokens", slim.config.reducer, Reducer).recipe  # type: ignore[type-abstract]
    if recipe.labels and bench.images.recovery.labels is None:
        raise InputError("recover.recipe is published, which learns classes, and the images for it carry none")
    return recipe


def train_on(processes: int, bench: Bench, slim: Vit, folder: Path) -> None:
    """The same, shared by as many processes as there are devices. Raises what ``share`` does."""
    save_vit(slim, folder, "slim")
    try:
        share(processes, bench, folder, "recover")
    finally:
        for name in ("slim.json", "slim.safetensors"):
            (folder / name).unlink()


def share(processes: int, bench: Bench, folder: Path, stage: Literal["learn", "recover"]) -> None:
    """Have the training of a stage done by several processes, which leave in ``folder`` what one would.

    Raises:
        VitpruneError: a process failed; its own words are on stderr.
    """
    (folder / "profile.yaml").write_text(bench.profile.to_yaml(), encoding="utf-8")
    folders = {name: str(path.absolute()) for name, path in bench.folders.items()}
    write_json(folder / "request.json", {"stage": stage, "work": str(bench.work.absolute()), "folders": folders})
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launch, "-m", "vitprune_deploy.build.training", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment)
    for name in ("profile.yaml", "request.json"):
        (folder / name).unlink()
    if done.returncode:
        raise VitpruneError(
            f"training on {processes} devices failed with exit code {done.returncode}; see its words above"
        )


def batches(bench: Bench, epoch: int) -> Iterator[Batch]:
    """One pass over the recovery images, in an order that depends on the seed and the epoch.

    Which images they are is told where the same ones come again in the next pass.
    """
    import torch

    from vitprune.recover import Batch

    wanted, labels = bench.profile.recover, bench.images.recovery.labels
    images = Augmented(bench.images.recovery, bench.preprocess, seed=bench.profile.seed, augment=wanted.augment)
    images.set_epoch(epoch)
    loader: Any = torch.utils.data.DataLoader(
        cast(Any, images),
        batch_size=min(wanted.batch, len(images)),
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(bench.profile.seed + epoch),
        num_workers=0 if len(images) < IN_THE_PROCESS else bench.profile.data.workers,
    )
    for pixels, numbers in loader:
        known = None if labels is None else torch.as_tensor(labels)[numbers]
        yield Batch(pixels, None if wanted.augment else numbers, known)


def main(folder: Path) -> None:
    """What each of several processes does."""
    request = json.loads((folder / "request.json").read_bytes())
    folders = {name: Path(path) for name, path in request["folders"].items()}
    bench = Bench(load_profile(folder / "profile.yaml"), Console(quiet=True), Path(request["work"]), folders)
    if request["stage"] == "recover":
        train(bench, load_vit(folder, "slim"), folder)
        return
    from .learned import train as learn  # which takes its batches from here

    learn(bench, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
