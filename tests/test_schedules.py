"""The schedules that the paper uses and torch does not have."""

from __future__ import annotations

import pytest

from apollo_qn.schedules import inverse_square_root


def test_inverse_square_root() -> None:
    """The factor rises linearly to 1 at step 4, the last of the warmup, and then falls."""
    factor = inverse_square_root(4)
    assert [factor(step) for step in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert factor(15) == pytest.approx(0.5)
    assert factor(4 * 4**2 - 1) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="warmup_steps is 0, allowed are 1 and more"):
        inverse_square_root(0)
