"""Schedules of the learning rate that the paper uses and torch does not have."""

from __future__ import annotations

import math
from collections.abc import Callable


def inverse_square_root(warmup_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at step 0, 1, ..., for ``torch.optim.lr_scheduler.LambdaLR``.

    It rises linearly to 1 over ``warmup_steps`` and then falls with the square root of the step
    (Vaswani et al., 2017, section 5.3, whose constant is the learning rate here). For Adam: Apollo
    has a warmup of its own.

    Raises:
        ValueError: ``warmup_steps`` is not positive.
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps is {warmup_steps}, allowed are 1 and more")
    return lambda step: min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))
