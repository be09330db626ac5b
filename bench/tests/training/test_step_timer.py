"""The times of optimizer steps."""

from __future__ import annotations

import time

import pytest
import torch

from apollo_bench.training.step_timer import StepTimer


def test_the_median_is_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = StepTimer(torch.device("cpu"))
    assert timer.median() is None
    clock = iter([1.0, 1.002, 2.0, 2.006, 3.0, 3.003])
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: next(clock))
        for _ in range(3):
            with timer.measure():
                pass
    assert timer.collect() == pytest.approx([2.0, 6.0, 3.0])
    assert timer.median() == 3.0
