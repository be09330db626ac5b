"""Measure how long a part of every step takes, without synchronizing the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Collect times in milliseconds; on a GPU, between two events in its stream.

    Example:
        >>> timer = StepTimer(torch.device("cpu"))
        >>> with timer.measure():
        ...     total = sum(range(1000))
        >>> timer.median() >= 0.0  # milliseconds
        True

    Args:
        device: device on which the timed work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._on_gpu = device.type == "cuda"

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time the body of the with statement."""
        if self._on_gpu:
            start, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        before = time.perf_counter()
        yield
        self.times.append(1e3 * (time.perf_counter() - before))

    def collect(self) -> list[float]:
        """Return all times so far; wait for the device."""
        for start, end in self._events:
            end.synchronize()
            self.times.append(start.elapsed_time(end))
        self._events.clear()
        return self.times

    def median(self) -> float | None:
        """Return the median of all times so far, rounded to 0.001 ms; None if there are none."""
        times = self.collect()
        return round(statistics.median(times), 3) if times else None
