"""How long a part of every step takes, without making the device wait."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Collects times in milliseconds; on a GPU between two events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._on_gpu = device.type == "cuda"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done inside."""
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
        """All times so far; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self.times.append(start.elapsed_time(end))
        self._events.clear()
        return self.times

    def median(self) -> float | None:
        """Of all times so far; None where there are none."""
        times = self.collect()
        return statistics.median(times) if times else None
