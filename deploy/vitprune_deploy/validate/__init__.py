"""What the engine is worth, through the runtime that services import: accuracy, latency, memory, and a verdict."""

from __future__ import annotations

from .accuracy import Accuracy, Paired, Parity, Share, compare_accuracy, compare_with_torch, run_models
from .cost import SESSIONS, budget_ms, compare_latency, latency_dict, memory_mb, one_batch, size_bytes
from .golden import Difference, compare_golden, write_golden
from .judge import Figures, Limits, Verdict, judge

__all__ = [
    "SESSIONS",
    "Accuracy",
    "Difference",
    "Figures",
    "Limits",
    "Paired",
    "Parity",
    "Share",
    "Verdict",
    "budget_ms",
    "compare_accuracy",
    "compare_golden",
    "compare_latency",
    "compare_with_torch",
    "judge",
    "latency_dict",
    "memory_mb",
    "one_batch",
    "run_models",
    "size_bytes",
    "write_golden",
]
