"""Derive the seed of every part of a run from the run's seed."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int) -> int:
    """Return a seed for (seed, epoch, step) that is unrelated to the seeds of its neighbors.

    Example:
        >>> derived_seed(1, 0, 7) == derived_seed(1, 0, 7)
        True
        >>> derived_seed(1, 0, 7) == derived_seed(1, 0, 8)
        False
    """
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
