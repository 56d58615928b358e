"""Writes vitprune/tokens/README.md: what each token method is and does, read off its file and its exported graph.

python tools/token_methods.py
"""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from vitprune import parts
from vitprune.model.config import BlockConfig, VitConfig
from vitprune.surgery import build
from vitprune.tokens.base import Reducer
from vitprune_deploy.export.onnx import export_onnx

PAGE = Path(__file__).parent.parent / "vitprune" / "tokens" / "README.md"
ABOVE = """# Token methods

Each file of this folder is one method; its name is what a profile calls `prune.tokens.method`. Written by
`tools/token_methods.py`. A model has one token method, beside any pruning of heads, MLP width and depth: each is a
family of its own, and a plan with two of them is refused. Blocks whose heads were pruned score by those that are left.
All have static counts in the exported graph, with a free batch. [Compared](COMPARISON.md) on the quickstart's model.

- *acts*: `after` between attention and MLP; `before` in front of the block; `q_rows` inside attention, where the
  patches that are left ask and all are read.
- *trained*: the method has weights that choose at random until they are trained. A search measures losses with the
  method that is named there in its place, and recovery trains the weights: by distillation, or with
  `recover.recipe: published` as the authors do. The others work as they come, and in any training.
- `model.checkpoint_format` reads the authors' checkpoints of `dynamicvit`, `evit`, `evovit`, `spvit` and `diffrate`.

```python
from vitprune.model.timm import from_timm
from vitprune.surgery import reduce_tokens

slim = reduce_tokens(from_timm("deit_small_patch16_224").model, "evit", "published-0.7")  # or {3: 139, 6: 99, 9: 71}
```

- Where the authors find counts by a search of their own, a profile asks for it: `schedule: own-0.65` leaves 65% of the
  operations (`diffrate`), `schedule: own-0.01` lets each block be wrong by 1% (`psvit`). As functions with all settings
  they are `vitprune.search.diffrate.search_counts` and `vitprune.search.psvit.search_counts`; what these return goes
  into `reduce_tokens`.
- Where the authors let each image have its own count (`ats_fixed`, `ia_red2`), `vitprune.tokens.base.count_per_image`
  makes a model decide so, for studies of accuracy. Graphs have the counts that they are told.

"""
HEAD = (
    "method", "what it does", "source", "acts", "trained", "class token", "order kept", "sizes in attention",
    "schedules", "adds",
)  # fmt: skip


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    """The whole page."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(name) for name in parts.names("vitprune.tokens"))]
    return ABOVE + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def row(name: str) -> tuple[str, ...]:
    kind = parts.load("vitprune.tokens", name, Reducer)
    title, source = (
        " ".join(part.split()) for part in (inspect.getdoc(sys.modules[kind.__module__]) or "").split("\n\n")[:2]
    )
    what = title.partition(": ")[2].rstrip(".") or title.rstrip(".")
    found = re.match(r"(.+?), (https://\S+?)[.,](\s|$)", source)
    assert found, f"{name}: its docstring names no source"
    return (
        f"`{name}`",
        what,
        f"[{found[1]}]({found[2]})",
        kind.where,
        f"needed; until then `{kind.stand_in}`" if kind.stand_in else "not needed",
        "needed" if kind.needs_class_token else "not needed",
        "yes" if kind.keeps_order else "no",
        "yes" if kind.proportional else "no",
        ", ".join(f"`{schedule}`" for schedule in kind.schedules),
        ", ".join(f"{node} {count}" for node, count in sorted(added(name).items())),
    )


def added(name: str) -> Counter[str]:
    """Nodes that one application adds to an exported model, more than it had."""
    return nodes(name) - nodes(None)


@cache
def nodes(method: str | None) -> Counter[str]:
    """Nodes of a small exported model, with the method in it or without any."""
    with tempfile.TemporaryDirectory() as folder:
        return Counter(export_onnx(build(config(method)), Path(folder) / "model.onnx", batch=(1, 8)).nodes)


def config(method: str | None) -> VitConfig:
    blocks = tuple(BlockConfig(2, 8, 8, 8**-0.5, 16, 28 if method and i == 1 else None) for i in range(2))
    return VitConfig(
        image_size=(28, 28), patch_size=(4, 4), channels=3, dim=16, classes=3, blocks=blocks, reducer=method
    )


if __name__ == "__main__":
    main()
