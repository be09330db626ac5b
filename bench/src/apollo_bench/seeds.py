"""Seeds for every part of a run, from the run's own."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int) -> int:
    """A seed for each (seed, epoch, step), unrelated to its neighbours'."""
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
