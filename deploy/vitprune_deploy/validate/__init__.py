"""What the engine is worth, through the runtime that services import: accuracy, latency, memory, and a verdict."""

from __future__ import annotations

from .accuracy import Accuracy, Paired, Parity, Share, compare_accuracy, compare_with_torch, run_models
from .consistency import Consistency, Served, arithmetic
from .cost import SESSIONS, budget_ms, compare_latency, latency_dict, one_batch, size_bytes
from .examine import FEW, Subject, check_consistency
from .golden import Difference, compare_golden, write_golden
from .judge import Figures, Limits, Verdict, judge, missed_floors
from .subjects import subject

__all__ = [
    "FEW",
    "SESSIONS",
    "Accuracy",
    "Consistency",
    "Difference",
    "Figures",
    "Limits",
    "Paired",
    "Parity",
    "Served",
    "Share",
    "Subject",
    "Verdict",
    "arithmetic",
    "budget_ms",
    "check_consistency",
    "compare_accuracy",
    "compare_golden",
    "compare_latency",
    "compare_with_torch",
    "judge",
    "latency_dict",
    "missed_floors",
    "one_batch",
    "run_models",
    "size_bytes",
    "subject",
    "write_golden",
]
