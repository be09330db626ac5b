"""Many tensors in few calls, in working memory that stays small.

Small tensors are gathered into one padded matrix, each in rows of its own; a large one is walked
through in blocks. Either way the arithmetic is :func:`_measure`, which takes the sums over each
tensor, and :func:`_apply`, and the number of operations does not grow with the number of small
tensors. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import cast

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from apollo_qn.backends import Batch
from apollo_qn.rule import Hyperparameters, Scalar, StepScalars, accumulator, finite
from apollo_qn.rule import secant_coefficient as coefficient

ROW = 256
# Elements worked on at once: temporaries stay bounded, and on a CPU in its cache.
BLOCK = {"cpu": 1 << 18}
BLOCK_ELSEWHERE = 1 << 26


def step(batch: Batch, h: Hyperparameters) -> None:
    """Apply Algorithm 1 to all tensors of ``batch``."""
    limit = BLOCK.get(batch.params[0].device.type, BLOCK_ELSEWHERE)
    for bucket in _buckets(batch, limit):
        part = batch.part(bucket)
        if len(part.params) == 1 and part.params[0].numel() > limit // 4 and _dense(part):
            _step_in_blocks(part, h, limit)
        else:
            _step_gathered(part, h)


def _buckets(batch: Batch, limit: int) -> Iterator[slice]:
    """Runs of small tensors of at most ``limit`` elements together; a larger tensor is alone."""
    start = size = 0
    for i, tensor in enumerate(batch.params):
        n = tensor.numel()
        if size and (n > limit // 4 or size > limit // 4 and i - start == 1 or size + n > limit):
            yield slice(start, i)
            start, size = i, 0
        size += n
    yield slice(start, len(batch.params))


def _dense(batch: Batch) -> bool:
    lists = (batch.params, batch.grads, batch.exp_avgs, batch.hessian_diags)
    return all(tensors[0].is_contiguous() for tensors in lists)


class _Layout:
    """Where each tensor lies in the matrix."""

    def __init__(
        self, numels: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        rows = [-(-n // ROW) for n in numels]
        self.padding = [r * ROW - n for r, n in zip(rows, numels, strict=True)]
        self.rows_of_tensor = torch.tensor(rows, device=device)
        self.tensor_of_row = torch.arange(len(rows), device=device).repeat_interleave(
            self.rows_of_tensor, output_size=sum(rows)
        )
        self.dtype = dtype
        self.wide = accumulator(device)

    def padded(self, tensors: list[Tensor]) -> list[Tensor]:
        """``tensors``, each followed by the zeros that fill its last row."""
        zeros = tensors[0].new_zeros(sum(self.padding)).split(self.padding)
        return list(chain.from_iterable(zip(tensors, zeros, strict=True)))

    def gather(self, padded: list[Tensor]) -> Tensor:
        """A copy of the tensors as a matrix."""
        return cast(Tensor, _flatten_dense_tensors(padded)).view(-1, ROW).to(self.dtype)

    def scatter(self, matrix: Tensor, padded: list[Tensor]) -> list[Tensor]:
        """Views of ``matrix`` with the shapes of the tensors."""
        return list(_unflatten_dense_tensors(matrix.view(-1), padded)[::2])

    def sum(self, matrix: Tensor) -> Tensor:
        """Sum over each tensor, shape (tensors,)."""
        return self._reduce(matrix.sum(1).to(self.wide), "sum")

    def max(self, matrix: Tensor) -> Tensor:
        """Maximum over each tensor of what is not negative, shape (tensors,)."""
        return self._reduce(matrix.amax(1), "max")

    def _reduce(self, of_rows: Tensor, how: str) -> Tensor:
        # rows of one tensor in their order: deterministic, and no tensor reaches another
        return torch.segment_reduce(of_rows, how, lengths=self.rows_of_tensor, unsafe=True)

    def spread(self, scalar: Scalar) -> Scalar:
        """A number for each tensor as a column for the rows; a number for all as it is."""
        if isinstance(scalar, Tensor) and scalar.dim() == 1:
            return scalar.to(self.dtype)[self.tensor_of_row].unsqueeze(1)
        return scalar


class _Block:
    """Stands for a :class:`_Layout` where one tensor is all there is."""

    def __init__(self, device: torch.device) -> None:
        self.wide = accumulator(device)

    def sum(self, x: Tensor) -> Tensor:
        return x.sum().to(self.wide).reshape(1)

    def max(self, x: Tensor) -> Tensor:
        return x.amax().reshape(1)

    def spread(self, scalar: Scalar) -> Scalar:
        return scalar


@lru_cache(maxsize=4096)
def _layout(numels: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> _Layout:
    return _Layout(numels, device, dtype)


@dataclass(slots=True)
class _Work:
    """Matrices of one layout: g and theta are only read, m and B become m' and B'."""

    layout: _Layout | _Block
    g: Tensor
    m: Tensor
    B: Tensor
    theta: Tensor | None  # where there is weight decay


@dataclass(slots=True)
class _Sums:
    """Over each tensor, with u = d / scale: max |d|, sum u^4, <u, y + B d>, max |g - m|."""

    scale: Tensor
    q4: Tensor
    k: Tensor
    threshold: Tensor | None


def _step_gathered(batch: Batch, h: Hyperparameters) -> None:
    device = batch.params[0].device
    layout = _layout(
        tuple(p.numel() for p in batch.params), device, batch.exp_avgs[0].dtype
    )
    s = _scalars(batch, h, device)
    params = layout.padded(batch.params)
    work = _Work(
        layout,
        layout.gather(layout.padded(batch.grads)),
        layout.gather(layout.padded(batch.exp_avgs)),
        layout.gather(layout.padded(batch.hessian_diags)),
        layout.gather(params) if h.weight_decay != 0 else None,
    )
    sums = _measure(work, h, s)
    change = _apply(work, h, s, sums)
    torch._foreach_sub_(batch.params, layout.scatter(change, params))
    torch._foreach_copy_(batch.exp_avgs, layout.scatter(work.m, params))
    torch._foreach_copy_(batch.hessian_diags, layout.scatter(work.B, params))
    _keep_thresholds(batch, sums)


def _step_in_blocks(batch: Batch, h: Hyperparameters, block: int) -> None:
    device = batch.params[0].device
    s = _scalars(batch, h, device)
    p = batch.params[0].view(-1)
    layout = _Block(device)
    works = [
        (p_block, _Work(layout, g, m, B, p_block if h.weight_decay != 0 else None))
        for p_block, g, m, B in zip(
            p.split(block),
            batch.grads[0].view(-1).split(block),
            batch.exp_avgs[0].view(-1).split(block),
            batch.hessian_diags[0].view(-1).split(block),
            strict=True,
        )
    ]
    sums = _merged([_measure(work, h, s) for _, work in works])
    for p_block, work in works:
        p_block.sub_(_apply(work, h, s, sums))
    _keep_thresholds(batch, sums)


def _scalars(batch: Batch, h: Hyperparameters, device: torch.device) -> StepScalars:
    def vector(scalars: float | list[Tensor] | None) -> Scalar | None:
        return torch.stack(scalars).to(device) if isinstance(scalars, list) else scalars

    t = vector(batch.t)
    assert t is not None
    return StepScalars.at(t, h, vector(batch.previous_lr), vector(batch.thresholds))


def _keep_thresholds(batch: Batch, sums: _Sums) -> None:
    if batch.thresholds is not None:
        assert sums.threshold is not None
        torch._foreach_copy_(batch.thresholds, list(sums.threshold.unbind()))


def _merged(parts: list[_Sums]) -> _Sums:
    """The sums of a tensor from those of its blocks."""
    if len(parts) == 1:
        return parts[0]
    scales = torch.stack([part.scale for part in parts])
    scale = scales.amax(0)
    wide = parts[0].k.dtype
    share = (scales / torch.where(scale == 0, 1, scale)).to(wide)
    q4 = torch.stack([part.q4 for part in parts])
    k = torch.stack([part.k for part in parts])
    thresholds = [part.threshold for part in parts if part.threshold is not None]
    return _Sums(
        scale,
        (q4 * share**4).sum(0),
        (k * share).sum(0),
        torch.stack(thresholds).amax(0) if thresholds else None,
    )


def _rectify_(D: Tensor, threshold: Scalar, offset: Scalar) -> Tensor:
    D = D.clamp_(min=threshold)
    return D if isinstance(offset, float) and offset == 0 else D.add_(offset)


def _displacement(work: _Work, h: Hyperparameters, s: StepScalars) -> Tensor:
    """d, the displacement of the step before."""
    spread = work.layout.spread
    d = _rectify_(work.B.abs(), spread(s.previous_threshold), spread(s.previous_offset))
    torch.div(work.m, d, out=d)
    if h.decoupled:
        assert work.theta is not None
        d.mul_(spread(s.kappa)).add_(work.theta * spread(s.omega))
    return d


def _difference(work: _Work, h: Hyperparameters) -> Tensor:
    """g - m, with what maximize and L2 decay make of g."""
    if h.maximize:
        y = torch.add(work.m, work.g).neg_()
    else:
        y = torch.sub(work.g, work.m)
    if h.l2:
        assert work.theta is not None
        y.add_(work.theta, alpha=h.weight_decay)
    return y


def _measure(work: _Work, h: Hyperparameters, s: StepScalars) -> _Sums:
    layout = work.layout
    d = _displacement(work, h, s)
    y = _difference(work, h)
    threshold = layout.max(y.abs()) if h.belief else None
    y.mul_(layout.spread(s.alpha)).addcmul_(work.B, d)
    scale = layout.max(d.abs())
    u = d.div_(layout.spread(torch.where(scale == 0, 1, scale)))
    k = layout.sum(y.mul_(u))
    u2 = u.mul_(u)
    q4 = layout.sum(torch.mul(u2, u2, out=y))
    return _Sums(scale, q4, k, threshold)


def _apply(work: _Work, h: Hyperparameters, s: StepScalars, sums: _Sums) -> Tensor:
    """m' and B' in place of m and B; returns what is to be subtracted from theta."""
    spread = work.layout.spread
    u = _displacement(work, h, s)
    y = _difference(work, h).mul_(spread(s.alpha))
    work.m.add_(y)

    u.div_(spread(torch.where(sums.scale == 0, 1, sums.scale)))
    c = finite(
        coefficient(sums.scale.to(sums.k.dtype), sums.q4, sums.k, h.secant_eps), work.B.dtype
    )
    work.B.sub_(u.mul_(u).mul_(spread(c)))

    threshold = h.sigma if sums.threshold is None else sums.threshold
    d = _rectify_(torch.abs(work.B, out=u), spread(threshold), spread(s.offset))
    torch.div(work.m, d, out=d)
    if h.decoupled:
        assert work.theta is not None
        d.add_(work.theta, alpha=h.weight_decay)
    return d.mul_(spread(s.rate))
