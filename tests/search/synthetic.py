"""A device that exists only here: DeiT-S half blocks as measured at batch 1, two token methods, seeded losses."""

from __future__ import annotations

import numpy as np

from vitprune.search.counts import Counts, Sizes, TokenMethod
from vitprune.search.latency import Circumstances, LatencyTable, Levels, Pieces
from vitprune.search.losses import LossTable
from vitprune.search.problem import Problem, ladder, multiples

CIRCUMSTANCES = Circumstances(
    device={"cpu": "synthetic"},
    runtime="onnxruntime",
    precision="fp32",
    batch=1,
    threads=2,
    image_size=(224, 224),
    shape="384/16",
)
TOKENS, HEADS, MLP = (196, 137, 96, 67), (6, 5, 4, 3, 2), (1536, 1152, 768, 384)
ATTN_MS = [
    [1.885, 1.670, 1.320, 1.042, 0.766],
    [1.265, 1.078, 0.915, 0.729, 0.586],
    [0.919, 0.757, 0.637, 0.493, 0.362],
    [0.651, 0.539, 0.457, 0.347, 0.286],
]
MLP_MS = [
    [2.712, 1.964, 1.368, 0.758],
    [1.754, 1.422, 0.940, 0.527],
    [1.302, 1.006, 0.681, 0.379],
    [0.915, 0.720, 0.497, 0.285],
]
REDUCE_MS = {(196, 137): 0.21, (196, 96): 0.19, (196, 67): 0.16, (137, 96): 0.15, (137, 67): 0.13, (96, 67): 0.11}
EVIT = TokenMethod("evit", "after", False, True, lambda n, prefix: 1, lambda n, k, prefix: 1 <= k < n, "evit")
TOME = TokenMethod(
    "tome", "after", True, False, lambda n, prefix: n - n // 2, lambda n, k, prefix: n - n // 2 <= k < n, "tome"
)


def levels() -> Levels:
    """DeiT-S: head size 64, width 384, fp32."""
    return Levels(1, TOKENS, HEADS, MLP, head_bytes=4 * 4 * 64 * 384, unit_bytes=4 * 2 * 384)


def pieces(**changes) -> Pieces:
    """Every entry of the grid as measured."""
    attn = {(n, h): ATTN_MS[i][j] for i, n in enumerate(TOKENS) for j, h in enumerate(HEADS)}
    mlp = {(n, m): MLP_MS[i][j] for i, n in enumerate(TOKENS) for j, m in enumerate(MLP)}
    parts = {
        "attn": attn,
        "mlp": mlp,
        "stem_ms": 0.753,
        "head": dict.fromkeys(TOKENS, 0.071),
        "attn_sized": {key: 1.1 * ms for key, ms in attn.items()},
        "reduce": {"evit": REDUCE_MS, "tome": REDUCE_MS},
    }
    return Pieces(**(parts | changes))


def table() -> LatencyTable:
    """The whole grid, measured."""
    return LatencyTable.fill(CIRCUMSTANCES, levels(), pieces())


def ending_early() -> LatencyTable:
    """The same with a last block for the prefix alone: a quarter of the attention, 0.005 ms of MLP, 0.02 ms of head."""
    more = {"mlp": pieces().mlp | {(0, m): 0.005 for m in MLP}, "head": pieces().head | {0: 0.02}}
    quarter = {key: ms / 4 for key, ms in pieces().attn.items()}
    return LatencyTable.fill(CIRCUMSTANCES, levels(), pieces(attn_prefix=quarter, **more))


def dense(depth: int = 12) -> Counts:
    return Counts.dense([HEADS[0]] * depth, [MLP[0]] * depth, TOKENS[0])


def random_counts(rng: np.random.Generator, depth: int = 12) -> Counts:
    """Any plan on the grid; halves are removed now and then, and where attention is gone no token leaves."""
    heads = [int(h) for h in rng.choice([0, *HEADS], depth)]
    mlp = tuple(int(m) for m in rng.choice([0, *MLP], depth))
    level, patches = 0, []
    for h in heads:
        level = max(level, int(rng.integers(0, 4)) if h and rng.random() < 0.25 else 0)
        patches.append(TOKENS[level])
    return Counts(tuple(heads), mlp, tuple(patches))


def losses(seed: int, depth: int = 12, token_method: str | None = "evit") -> LossTable:
    """Losses that rise with what is gone; early blocks mind the loss of tokens most, and block 0 never reduces."""
    rng = np.random.default_rng(seed)

    def curve(sizes: tuple[int, ...], scale: float) -> dict[int, float]:
        steps = rng.exponential(scale, len(sizes)) * rng.uniform(0.3, 1.7)
        return dict(zip((*sizes, 0), [0.0, *np.cumsum(steps).tolist()], strict=True))

    tokens: list[dict[int, float]] = []
    for block in range(depth):
        rises = np.cumsum(rng.exponential(0.15, 3) * np.exp(-block / 3)).tolist()
        tokens.append(dict(zip(TOKENS, [0.0, *rises], strict=True)) if token_method and block else {})
    return LossTable(
        [curve(HEADS, 0.03) for _ in range(depth)], [curve(MLP, 0.05) for _ in range(depth)], tokens, token_method
    )


def problem(
    seed: int, depth: int = 12, method: TokenMethod | None = EVIT, latency: LatencyTable | None = None
) -> Problem:
    """The whole search on the synthetic device."""
    sizes = Sizes((*HEADS, 0), (*MLP, 0), TOKENS)
    return Problem(latency or table(), losses(seed, depth, method.name if method else None), method, sizes)


def fine_problem(seed: int, depth: int = 12) -> Problem:
    """As ``problem``, on 12 token levels and widths in steps of 128: frontiers as dense as those of a real search."""
    tokens, mlp = ladder(196, 12, 49), multiples(1536, 128, 128)
    attn_ms = {(n, h): 0.1 + 1.2e-3 * n * h + 1e-6 * n * n * h + 5e-4 * n for n in tokens for h in range(6, 0, -1)}
    mlp_ms = {(n, m): 0.05 + 8.5e-6 * n * m + 2e-4 * n for n in tokens for m in mlp}
    steps = {(n, left): 0.05 + 8e-4 * n for n in tokens for left in tokens if left < n}
    grid = Levels(1, tokens, (6, 5, 4, 3, 2, 1), mlp, head_bytes=4 * 4 * 64 * 384, unit_bytes=4 * 2 * 384)
    parts = Pieces(attn_ms, mlp_ms, 0.753, dict.fromkeys(tokens, 0.071), {}, {"evit": steps})
    rng = np.random.default_rng(seed)

    def curve(sizes: tuple[int, ...], scale: float) -> dict[int, float]:
        gone = 1 - np.array(sizes) / sizes[0]
        return dict(zip(sizes, (scale * rng.exponential() * gone ** rng.uniform(1, 3)).tolist(), strict=True))

    found = LossTable(
        heads=[curve((6, 5, 4, 3, 2, 1, 0), 0.3) for _ in range(depth)],
        mlp=[curve((*mlp, 0), 0.4) for _ in range(depth)],
        tokens=[curve(tokens, 1.5 * float(np.exp(-block / 3))) for block in range(depth)],
        token_method="evit",
    )
    sizes = Sizes((5, 4, 3, 2, 1, 0), (*mlp, 0), tokens)
    return Problem(LatencyTable.fill(CIRCUMSTANCES, grid, parts), found, EVIT, sizes)
