"""The seeds of the parts of a run."""

from __future__ import annotations

from apollo_bench.seeds import derived_seed


def test_every_part_has_its_own_seed() -> None:
    parts = [(seed, epoch, step) for seed in range(3) for epoch in range(12) for step in range(12)]
    assert len({derived_seed(*part) for part in parts}) == len(parts)
    assert derived_seed(1, 23) != derived_seed(12, 3)


def test_a_seed_stays_the_same() -> None:
    """A changed seed would change the results of every recorded run."""
    assert derived_seed(1, 2, 3) == 59908562675693186
