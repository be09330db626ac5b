"""Learning rate schedules that the paper uses and torch does not have."""

from __future__ import annotations

import math
from collections.abc import Callable


def inverse_square_root(warmup_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step (0 first).

    The function is an argument of ``torch.optim.lr_scheduler.LambdaLR``. The factor rises linearly
    to 1 over ``warmup_steps`` steps. It then falls with the inverse square root of the step
    (Vaswani et al., 2017, section 5.3). The schedule is meant for Adam, because Apollo has its own
    warmup.

    Args:
        warmup_steps: number of steps over which the factor rises, >= 1.

    Raises:
        ValueError: ``warmup_steps`` is not positive.

    Example:
        >>> optimizer = torch.optim.Adam(torch.nn.Linear(4, 2).parameters(), lr=1e-3)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, inverse_square_root(4000))
        >>> scheduler.step()
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps is {warmup_steps}, allowed are 1 and more")
    return lambda step: min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))
