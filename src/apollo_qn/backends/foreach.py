"""Many tensors in few calls, in working memory that stays small.

Small tensors are gathered into one padded matrix, each in rows of its own; a large one is walked
through in blocks. Either way the arithmetic is :func:`_measure`, which takes the sums over each
tensor, and :func:`_apply`, and the number of operations does not grow with the number of small
tensors. Nothing waits for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from apollo_qn.backends import Batch
from apollo_qn.rule import Hyperparameters, Scalar, StepScalars, Sums, accumulator, finite
from apollo_qn.rule import secant_coefficient as coefficient

ROW = 256
# Elements worked on at once: temporaries stay bounded, and on a CPU in its cache.
BLOCK = {"cpu": 1 << 18}
BLOCK_ELSEWHERE = 1 << 24
KEPT_LAYOUTS = 4096


def step(batch: Batch, h: Hyperparameters, sums: Sums | None = None) -> None:
    """Apply Algorithm 1 to all tensors of ``batch``; ``sums`` as of :func:`measure`."""
    dtype = batch.exp_avgs[0].dtype
    for bucket, part, flat, limit in _parts(batch):
        given = None
        if sums is not None:
            largest = None if sums.largest is None else sums.largest[bucket].to(dtype)
            scale = sums.scale[bucket].to(dtype)
            given = Sums(scale, sums.q4[bucket], sums.k[bucket], largest)
        if flat is None:
            _step_gathered(part, h, given)
        else:
            _step_in_blocks(part, flat, h, limit, given)


def measure(batch: Batch, h: Hyperparameters) -> Sums:
    """The sums over each tensor, which here are parts of others; nothing is changed."""
    found = []
    for _, part, flat, limit in _parts(batch):
        s = _scalars(part, h)
        if flat is None:
            found.append(_measure(_gathered(part, h)[0], h, s)[0])
        else:
            found.append(_measured_in_blocks([work for _, work in _works(flat, h, limit)], h, s))
    return Sums.joined(found, torch.cat)


def _parts(batch: Batch) -> Iterator[tuple[slice, Batch, list[Tensor] | None, int]]:
    """What is worked on together: where it lies in the batch, and a large tensor's vectors."""
    limit = BLOCK.get(batch.params[0].device.type, BLOCK_ELSEWHERE)
    for bucket in _buckets(batch, limit):
        part = batch.part(bucket)
        large = len(part.params) == 1 and part.params[0].numel() > limit // 4
        yield bucket, part, _flat(part) if large else None, limit


def _buckets(batch: Batch, limit: int) -> Iterator[slice]:
    """Runs of small tensors whose rows hold ``limit`` elements; a larger tensor is alone."""
    start = size = 0
    for i, tensor in enumerate(batch.params):
        n = -(-tensor.numel() // ROW) * ROW
        alone = n > limit // 4 or (size > limit // 4 and i - start == 1)
        if size and (alone or size + n > limit):
            yield slice(start, i)
            start, size = i, 0
        size += n
    yield slice(start, len(batch.params))


def _flat(batch: Batch) -> list[Tensor] | None:
    """Parameter, gradient, m and B of a single tensor as vectors, where all lie alike in memory."""
    p = batch.params[0]
    order = sorted(
        range(p.dim()), key=p.stride, reverse=True
    )  # of channels-last: its channels last
    tensors = (p, batch.grads[0], batch.exp_avgs[0], batch.hessian_diags[0])
    in_order = [tensor.permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in in_order):
        return None
    return [tensor.view(-1) for tensor in in_order]


class _Layout:
    """Where tensors of given shapes lie in a matrix: each in rows of its own, then zeros."""

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

    def views(self, matrix: Tensor) -> list[Tensor]:
        """Each tensor's place in ``matrix``, in its shape."""
        pieces = matrix.view(-1).split_with_sizes(self.sizes)[::2]
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

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


class _Workspace(threading.local):
    """Layouts, and on the CPU the memory of the matrices, kept from step to step in each thread.

    All layouts share that memory, at most four matrices of a block. Elsewhere an allocator that
    knows of streams gives it anew for each step, as it is for a large tensor in strange strides.
    """

    def __init__(self) -> None:
        self.layouts: dict[Any, _Layout] = {}
        self.memory: dict[torch.dtype, Tensor] = {}
        self.kept: dict[Any, tuple[Tensor, list[list[Tensor]]]] = {}

    def get(
        self, params: list[Tensor], dtype: torch.dtype, matrices: int
    ) -> tuple[_Layout, Tensor, list[list[Tensor]]]:
        """A layout, that many zero matrices as one tensor, and the tensors' places in each."""
        device = params[0].device
        key = (tuple(p.shape for p in params), device, dtype)
        layout = self.layouts.get(key)
        if layout is None:
            if len(self.layouts) >= KEPT_LAYOUTS:
                self.layouts.clear()
                self.kept.clear()
            layout = self.layouts[key] = _Layout(*key)
        size = (matrices, layout.rows, ROW)
        if device.type != "cpu" or layout.rows * ROW > 2 * BLOCK["cpu"]:
            zeros = torch.zeros(size, dtype=dtype, device=device)
            return layout, zeros, [layout.views(matrix) for matrix in zeros]
        kept = self.kept.get((key, matrices))
        if kept is None:
            numel = matrices * layout.rows * ROW
            memory = self.memory.get(dtype)
            if memory is None or memory.numel() < numel:
                memory = self.memory[dtype] = torch.empty(numel, dtype=dtype, device="cpu")
                self.kept.clear()  # views of the memory before
            both = memory[:numel].view(size)
            kept = self.kept[key, matrices] = both, [layout.views(matrix) for matrix in both]
        return layout, kept[0].zero_(), kept[1]


_workspace = _Workspace()


@dataclass(slots=True)
class _Work:
    """Matrices of one layout: g and theta are only read, m and B become m' and B'."""

    layout: _Layout | _Block
    g: Tensor
    m: Tensor
    B: Tensor
    theta: Tensor | None  # where there is weight decay


def _gathered(batch: Batch, h: Hyperparameters) -> tuple[_Work, list[list[Tensor]]]:
    """Small tensors in matrices, and the places of g, m and B there."""
    read = [batch.grads, batch.exp_avgs, batch.hessian_diags]
    if h.weight_decay != 0:
        read.append(batch.params)
    dtype = batch.exp_avgs[0].dtype
    layout, matrices, views = _workspace.get(batch.params, dtype, len(read))
    for places, tensors in zip(views, read, strict=True):
        torch._foreach_copy_(places, tensors)
    g, m, B = matrices[0], matrices[1], matrices[2]
    return _Work(layout, g, m, B, matrices[3] if h.weight_decay != 0 else None), views


def _step_gathered(batch: Batch, h: Hyperparameters, given: Sums | None) -> None:
    work, views = _gathered(batch, h)
    s = _scalars(batch, h)
    if given is None:
        sums, u2, y = _measure(work, h, s)
    else:
        sums, u2, y = given, *_terms(work, h, s, given)
    _apply(work, h, s, sums, u2, y, out=work.g)

    torch._foreach_sub_(batch.params, views[0])
    torch._foreach_copy_(batch.exp_avgs, views[1])
    torch._foreach_copy_(batch.hessian_diags, views[2])
    _keep_thresholds(batch, sums)


def _works(flat: list[Tensor], h: Hyperparameters, block: int) -> list[tuple[Tensor, _Work]]:
    """The blocks of a large tensor's vectors, each with its piece of the parameter."""
    layout = _Block(flat[0].device)
    return [
        (p, _Work(layout, g, m, B, p if h.weight_decay != 0 else None))
        for p, g, m, B in zip(*(torch.split(vector, block) for vector in flat), strict=True)
    ]


def _step_in_blocks(
    batch: Batch, flat: list[Tensor], h: Hyperparameters, block: int, given: Sums | None
) -> None:
    s = _scalars(batch, h)
    works = _works(flat, h, block)
    # a block's u^2 and y are taken anew rather than kept: memory stays that of a block
    sums = _measured_in_blocks([work for _, work in works], h, s) if given is None else given
    for p, work in works:
        u2, y = _terms(work, h, s, sums)
        p.sub_(_apply(work, h, s, sums, u2, y, out=u2))
    _keep_thresholds(batch, sums)


def _terms(work: _Work, h: Hyperparameters, s: StepScalars, sums: Sums) -> tuple[Tensor, Tensor]:
    """u^2, with the scale of ``sums``, and y = m' - m."""
    spread = work.layout.spread
    scale = torch.where(sums.scale == 0, 1, sums.scale)
    u2 = _displacement(work, h, s).div_(spread(scale)).square_()
    return u2, _difference(work, h).mul_(spread(s.alpha))


def _scalars(batch: Batch, h: Hyperparameters) -> StepScalars:
    device = batch.params[0].device

    def vector(scalars: float | list[Tensor] | None) -> Scalar | None:
        return torch.stack(scalars).to(device) if isinstance(scalars, list) else scalars

    t = vector(batch.t)
    assert t is not None
    return StepScalars.at(t, h, vector(batch.previous_lr), vector(batch.thresholds))


def _keep_thresholds(batch: Batch, sums: Sums) -> None:
    if batch.thresholds is not None:
        assert sums.largest is not None
        torch._foreach_copy_(batch.thresholds, list(sums.largest.unbind()))


def _measured_in_blocks(works: list[_Work], h: Hyperparameters, s: StepScalars) -> Sums:
    parts = [_measure(work, h, s)[0] for work in works]
    return parts[0] if len(parts) == 1 else Sums.joined(parts, torch.stack).merged()


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
        omega = spread(s.omega)
        d.mul_(spread(s.kappa))
        if isinstance(omega, Tensor):
            d.addcmul_(work.theta, omega)
        else:
            d.add_(work.theta, alpha=omega)
    return d


def _difference(work: _Work, h: Hyperparameters) -> Tensor:
    """g - m, with what maximize and L2 decay make of g."""
    y = torch.add(work.m, work.g).neg_() if h.maximize else torch.sub(work.g, work.m)
    if h.l2:
        assert work.theta is not None
        y.add_(work.theta, alpha=h.weight_decay)
    return y


def _measure(work: _Work, h: Hyperparameters, s: StepScalars) -> tuple[Sums, Tensor, Tensor]:
    """The sums, with u^2 (of this work's own scale) and y = m' - m for :func:`_apply`."""
    layout = work.layout
    d = _displacement(work, h, s)
    y = _difference(work, h)
    largest = layout.max(y.abs()) if h.belief else None
    y.mul_(layout.spread(s.alpha))
    v = torch.abs(d)
    scale = layout.max(v)
    torch.addcmul(y, work.B, d, out=v)
    u = d.div_(layout.spread(torch.where(scale == 0, 1, scale)))
    k = layout.sum(v.mul_(u))
    u2 = u.mul_(u)
    q4 = layout.sum(torch.mul(u2, u2, out=v))
    return Sums(scale, q4, k, largest), u2, y


def _apply(
    work: _Work,
    h: Hyperparameters,
    s: StepScalars,
    sums: Sums,
    u2: Tensor,
    y: Tensor,
    out: Tensor,
) -> Tensor:
    """m' and B' in place of m and B, and in ``out`` what is to be subtracted from theta."""
    spread = work.layout.spread
    work.m.add_(y)
    scale = sums.scale.to(sums.k.dtype)
    c = finite(coefficient(scale, sums.q4, sums.k, h.secant_eps), work.B.dtype)
    work.B.sub_(u2.mul_(spread(c)))

    threshold = h.sigma if sums.largest is None else sums.largest
    d = _rectify_(torch.abs(work.B, out=u2), spread(threshold), spread(s.offset))
    torch.div(work.m, d, out=d)
    if h.decoupled:
        assert work.theta is not None
        d.add_(work.theta, alpha=h.weight_decay)
    return torch.mul(d, spread(s.rate), out=out)
