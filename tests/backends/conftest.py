"""The fixture that runs the Triton kernel, on a GPU or interpreted."""

from __future__ import annotations

import pytest

from apollo_qn.backends import triton
from tests.backends import interpreter
from tests.backends.interpreter import SetSizes
from tests.helpers import ON_GPU


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> SetSizes:
    """Make the Triton kernel the fused back end; return a function that sets its sizes."""
    if ON_GPU and triton.why_not() is None:
        return interpreter.set_sizes(monkeypatch)
    if not interpreter.AVAILABLE:
        pytest.skip(interpreter.REASON)
    return interpreter.interpret(monkeypatch)
