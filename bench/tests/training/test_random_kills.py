"""A small form of ``benchmarks/random_kills.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tests.helpers import PATIENCE

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "random_kills.py"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["apollo", "adam"])
def test_a_run_killed_at_random_moments_is_that_never_killed(method: str) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "8", "--seed", "7", "--method", method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.match(r"(\d+) kills with SIGKILL .* all bit-identical", done.stdout)
    assert match is not None
    assert int(match[1]) >= 8
