"""Every pair of options is in the table of rows, and the table is small."""

from __future__ import annotations

import itertools

import pytest

from tests.modes import covering_rows


@pytest.mark.parametrize(
    ("sizes", "most"), [((3, 4, 2, 2, 2, 8), 40), ((3, 8, 2, 8), 72), ((5,), 5), ((2, 2), 4)]
)
def test_every_pair_is_covered(sizes: tuple[int, ...], most: int) -> None:
    columns = [[f"{i}{chr(97 + j)}" for j in range(size)] for i, size in enumerate(sizes)]
    rows = covering_rows(columns)
    assert len(rows) == len(set(rows)) <= most
    for one, other in itertools.combinations(columns, 2):
        for pair in itertools.product(one, other):
            assert any(set(pair) <= set(row) for row in rows), pair
