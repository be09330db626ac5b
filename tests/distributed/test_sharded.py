"""Many processes give the trajectory of one. The work is in ``work.py`` and ``models.py``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.distributed.ranks import on_ranks

WORK = (
    "sharded_as_unsharded float32",
    "sharded_as_unsharded float64 10",
    "sixteen_bits",
    "one_all_reduce_per_mesh",
    "compiled",
    "extreme_values",
    "gradients_placed_otherwise",
    "a_parameter_is_resharded",
    "refusals",
    "wrapped",
    "tensor_parallel",
    "batch_norm",
    "residual_network",
    "diagnostics_of_shards",
)

# started once, because starting takes longer than most of the work
_on_four_ranks = cache(lambda: on_ranks(4, *WORK))


def test_on_two_ranks() -> None:
    """The one fast test that starts processes: all modes and back ends, two steps."""
    calls = ["sharded_as_unsharded float32 2", "gradients_placed_otherwise", "gradient_release"]
    calls += ["nothing_changes_at_an_error", "indices_stay_few"]
    done, failures = on_ranks(2, *calls)
    assert done == calls, failures


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
def test_on_four_ranks(work: str) -> None:
    done, failures = _on_four_ranks()
    assert work in done, failures


@pytest.mark.slow
def test_checkpoints_of_four_ranks_on_two_and_on_one(tmp_path: Path) -> None:
    """Sharded, flattened and full checkpoints continue the trajectory without a difference."""
    assert on_ranks(4, f"save_checkpoints {tmp_path}")[1] == ""
    for world in (2, 1):
        assert on_ranks(world, f"load_checkpoints {tmp_path}")[1] == ""
