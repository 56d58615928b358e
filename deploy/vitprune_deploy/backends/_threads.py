"""The threads of this process, which a measurement looks at."""

from __future__ import annotations

from pathlib import Path


def task_ids() -> set[int]:
    """Kernel ids of this process's threads; empty on systems without /proc."""
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir()} if tasks.is_dir() else set()
