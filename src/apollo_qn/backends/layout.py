"""Layouts of the foreach back end: where tensors lie in a matrix, and sums over each tensor."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from apollo_qn import rounding
from apollo_qn.hyperparameters import Scalar
from apollo_qn.secant import accumulator

ROW = 256  # elements in a row of a matrix


class RowLayout:
    """Positions of tensors in a matrix, where each has its own rows, padded with zeros."""

    def __init__(
        self, shapes: tuple[torch.Size, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        numels = [shape.numel() for shape in shapes]
        rows = [-(-n // ROW) for n in numels]
        self.rows = sum(rows)
        self.rows_of_tensor = torch.tensor(rows, device=device)
        self.tensor_of_row = torch.arange(len(rows), device=device).repeat_interleave(
            self.rows_of_tensor, output_size=self.rows
        )
        self.shapes = shapes
        self.sizes = list(
            chain.from_iterable((n, r * ROW - n) for n, r in zip(numels, rows, strict=True))
        )
        self.dtype = dtype
        self.wide = accumulator(device)
        firsts = self.rows_of_tensor.cumsum(0) - self.rows_of_tensor
        # position of each row's first element in its tensor
        self.positions = (torch.arange(self.rows, device=device) - firsts[self.tensor_of_row]) * ROW

    @property
    def nbytes(self) -> int:
        """Return about how much memory the layout takes, with its shapes and Python objects."""
        return 16 * self.rows + 256 * len(self.shapes) + 4096

    def views(self, matrix: Tensor) -> list[Tensor]:
        """Return a view of each tensor in ``matrix``, in the tensor's shape."""
        pieces = matrix.view(-1).split_with_sizes(self.sizes)[::2]
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def sum(self, matrix: Tensor) -> Tensor:
        """Return the sum over each tensor, shape (tensors,)."""
        return self._reduce(matrix.sum(1).to(self.wide), "sum")

    def max(self, matrix: Tensor) -> Tensor:
        """Return the maximum over each tensor, shape (tensors,); no element may be negative."""
        return self._reduce(matrix.amax(1), "max")

    def _reduce(self, row_values: Tensor, how: str) -> Tensor:
        # reduces a tensor's rows in order, so results are deterministic and tensors independent
        return torch.segment_reduce(row_values, how, lengths=self.rows_of_tensor, unsafe=True)

    def spread(self, scalar: Scalar) -> Scalar:
        """Return one number per tensor as a column with one entry per row; keep single numbers."""
        if isinstance(scalar, Tensor) and scalar.dim() == 1:
            return self.column(scalar.to(self.dtype))
        return scalar

    def column(self, per_tensor: Tensor) -> Tensor:
        """Return one value per tensor as a column with one entry per row."""
        return per_tensor[self.tensor_of_row].unsqueeze(1)

    def random_bits(self, params: list[Tensor], first: Tensor, second: Tensor) -> Tensor:
        """Return 32 random bits for each element, from the two keys of its tensor."""
        positions = self.positions.unsqueeze(1) + torch.arange(ROW, device=self.positions.device)
        if not all(p.is_contiguous() for p in params):
            for p, view in zip(params, self.views(positions), strict=True):
                view.copy_(rounding.memory_offsets(p))
        return rounding.random_bits(positions, self.column(first), self.column(second))


class BlockLayout:
    """Replacement of :class:`RowLayout` for a block of one large tensor."""

    def __init__(self, device: torch.device) -> None:
        self.wide = accumulator(device)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the block, shape (1,)."""
        return x.sum().to(self.wide).reshape(1)

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum over the block, shape (1,)."""
        return x.amax().reshape(1)

    def spread(self, scalar: Scalar) -> Scalar:
        """Return the number as it is."""
        return scalar
