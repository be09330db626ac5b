"""One thread, the same examples every time, small blocks where a test asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings

from apollo_qn.backends import foreach

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads it when it is imported; the kernel's tests run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile(
    "apollo",
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("apollo")


@pytest.fixture
def set_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many elements the foreach back end works on at once."""

    def set_it(elements: int) -> None:
        monkeypatch.setitem(foreach.BLOCK, "cpu", elements)

    return set_it
