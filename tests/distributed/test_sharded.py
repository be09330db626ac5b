"""One process or many: the same trajectory. The work itself is in ``work.py``."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import on_ranks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trajectories_of_shards_are_those_of_whole_tensors(dtype: str) -> None:
    on_ranks(4, "sharded_as_whole", dtype)


@pytest.mark.parametrize(
    "work", ["one_all_reduce_a_mesh", "extreme_values", "refusals", "wrapped", "tensor_parallel"]
)
def test_on_four_ranks(work: str) -> None:
    on_ranks(4, work)
