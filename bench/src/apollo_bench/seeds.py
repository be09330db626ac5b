"""Seeds of runs, and the seed of every part of a run that is derived from them."""

from __future__ import annotations

import hashlib

MAX_SEED = 2**63 - 1  # what torch's generators take


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
