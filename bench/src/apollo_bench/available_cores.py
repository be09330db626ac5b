"""The CPU cores that this process may use, and the most processes that a user may ask for."""

from __future__ import annotations

import os

MAX_PROCESSES = (
    512  # largest number that a user may ask for; beyond it torch may fail without a message
)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux
