"""Settings of all tests: one thread, fixed examples of hypothesis; a fixture for small blocks."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

from apollo_qn.backends import cpu, foreach

# The optimizer's tests run there; tests.helpers reads it too.
_DEVICE = os.environ.get("APOLLO_QN_TEST_DEVICE", "cpu")
# their models, processes and files stay on the CPU
collect_ignore = [] if _DEVICE == "cpu" else ["distributed"]
if find_spec("apollo_bench") is None:  # their models and data are the evaluation's
    collect_ignore.append("integrations")


def pytest_configure(config: pytest.Config) -> None:
    """Raise one error, instead of one per test, if the device is missing."""
    if cpu.why_not() is not None:  # as with a torch that is too old for the kernel
        config.addinivalue_line("filterwarnings", "ignore:Apollo. the fused CPU kernel")
    kind, _, number = _DEVICE.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise pytest.UsageError(
            f"APOLLO_QN_TEST_DEVICE must be cpu, cuda or cuda:1 and so on, got {_DEVICE!r}"
        )
    if kind == "cuda" and torch.cuda.device_count() <= int(number or 0):
        built = torch.version.cuda or torch.version.hip or "the CPU alone"
        raise pytest.UsageError(
            f"APOLLO_QN_TEST_DEVICE is {_DEVICE!r}, but torch {torch.__version__} (built for "
            f"{built}) sees {torch.cuda.device_count()} GPUs; CONTRIBUTING.md says how a machine's "
            "own torch is used"
        )


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
    """Return a function that sets how many elements foreach processes at once."""

    def set_it(elements: int) -> None:
        monkeypatch.setitem(foreach.BLOCK, _DEVICE.partition(":")[0], elements)

    return set_it
