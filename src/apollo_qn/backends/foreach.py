"""The foreach back end: many tensors in few calls, with little working memory.

Small tensors are copied into one padded matrix, each into its own rows. A large tensor is processed
in blocks. Both use :func:`_measure`, which takes the sums over each tensor, and :func:`_apply`. The
number of operations does not grow with the number of small tensors, and nothing waits for the
device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from apollo_qn import rounding
from apollo_qn.backends.base import Backend, Batch
from apollo_qn.backends.layout import ROW, BlockLayout, RowLayout
from apollo_qn.hyperparameters import Hyperparameters, Scalar, StepScalars
from apollo_qn.secant import Sums, arithmetic, saturate, secant_coefficient

# Elements processed at once. The bound limits temporaries; on a CPU they then fit its cache.
BLOCK = {"cpu": 1 << 18}
BLOCK_ELSEWHERE = 1 << 24
CACHED_BYTES = 4 << 20  # size of all layouts that an instance caches


class Foreach(Backend):
    """Back end that updates many tensors in few calls.

    An instance caches layouts between steps, at most ``CACHED_BYTES``. On a CPU it also keeps
    the matrices' memory, the size of a few blocks.
    """

    def __init__(self) -> None:
        self._layouts: OrderedDict[Any, RowLayout] = OrderedDict()
        self._cached_bytes = 0
        self._memory: dict[torch.dtype, Tensor] = {}

    def measure(self, batches: list[Batch]) -> list[Sums]:
        """Return the sums over each tensor of each batch; nothing is changed."""
        return [self._measured(batch) for batch in batches]

    def step(self, batches: list[Batch], sums: list[Sums] | None = None) -> bool:
        """Apply Algorithm 1 to all tensors of each batch."""
        for i, batch in enumerate(batches):
            full = None if sums is None else sums[i]
            dtype = _arithmetic(batch)
            for bucket, part, flat, limit in _parts(batch):
                given = None
                if full is not None:
                    largest = None if full.largest is None else full.largest[bucket].to(dtype)
                    scale = full.scale[bucket].to(dtype)
                    given = Sums(scale, full.q4[bucket], full.k[bucket], largest)
                if flat is None:
                    self._step_gathered(part, given)
                else:
                    _step_in_blocks(part, flat, limit, given)
        return True

    def _measured(self, batch: Batch) -> Sums:
        found = []
        for _, part, flat, limit in _parts(batch):
            s = _scalars(part)
            if flat is None:
                found.append(_measure(self._gathered(part)[0], part.h, s)[0])
            else:
                found.append(_measured_in_blocks(part, flat, s, limit))
        return Sums.concatenate(found, torch.cat)

    def _workspace(self, batch: Batch, matrices: int) -> tuple[RowLayout, Tensor]:
        """Return the layout of a batch, and zeroed matrices of that layout as one tensor."""
        params, dtype = batch.tensors.params, _arithmetic(batch)
        device = params[0].device
        key = (tuple(p.shape for p in params), device, dtype)
        layout = self._layouts.get(key)
        if layout is None:
            with torch.inference_mode(False):
                layout = self._layouts[key] = RowLayout(*key)
            self._cached_bytes += layout.nbytes
            while self._cached_bytes > CACHED_BYTES and len(self._layouts) > 1:
                self._cached_bytes -= self._layouts.popitem(last=False)[1].nbytes
        self._layouts.move_to_end(key)
        size = (matrices, layout.rows, ROW)
        numel = matrices * layout.rows * ROW
        # on other devices each step allocates, because the allocator knows of CUDA streams
        if device.type != "cpu" or layout.rows * ROW > 2 * BLOCK["cpu"]:
            return layout, torch.zeros(size, dtype=dtype, device=device)
        memory = self._memory.get(dtype)
        if memory is None or memory.numel() < numel:
            with torch.inference_mode(False):  # later steps may run outside of this mode
                memory = self._memory[dtype] = torch.empty(numel, dtype=dtype, device="cpu")
        return layout, memory[:numel].view(size).zero_()

    def _gathered(self, batch: Batch) -> tuple[_Work, list[list[Tensor]]]:
        """Return small tensors as matrices, and views of g, m, B and theta in these matrices."""
        tensors, h = batch.tensors, batch.h
        read = [tensors.grads, tensors.exp_avgs, tensors.hessian_diags]
        with_theta = h.decays or _rounds(batch)
        if with_theta:
            read.append(tensors.params)
        if tensors.compensations:
            read.append(tensors.compensations)
        layout, matrices = self._workspace(batch, len(read))
        views = [layout.views(matrix) for matrix in matrices]
        for places, column in zip(views, read, strict=True):
            torch._foreach_copy_(places, column)
        g, m, B = matrices[0], matrices[1], matrices[2]
        theta = matrices[3] if with_theta else None
        if tensors.compensations:
            matrices[3].add_(matrices[4])
        return _Work(layout, g, m, B, theta), views

    def _step_gathered(self, batch: Batch, given: Sums | None) -> None:
        tensors, h = batch.tensors, batch.h
        work, views = self._gathered(batch)
        s = _scalars(batch)
        if given is None:
            sums, u2, y = _measure(work, h, s)
        else:
            sums, u2, y = given, *_terms(work, h, s, given)
        _apply(work, h, s, sums, u2, y, out=work.g)

        random = None
        if tensors.rng_keys:
            assert isinstance(work.layout, RowLayout)
            random = work.layout.random_bits(tensors.params, *_keys(batch))
        if _rounds(batch):
            assert work.theta is not None
            theta, low = _stored(work.theta.sub_(work.g), batch, random)
            work.theta.copy_(theta)
            torch._foreach_copy_(tensors.params, views[3])
            if low is not None:
                work.g.copy_(low)
                torch._foreach_copy_(tensors.compensations, views[0])
        else:
            torch._foreach_sub_(tensors.params, views[0])
        if random is not None and tensors.hessian_diags[0].dtype in rounding.DROPPED:
            work.B.copy_(_drawn(work.B, batch, random))
        torch._foreach_copy_(tensors.exp_avgs, views[1])
        torch._foreach_copy_(tensors.hessian_diags, views[2])
        _keep_thresholds(batch, sums)


def _arithmetic(batch: Batch) -> torch.dtype:
    return arithmetic(batch.tensors.params[0].dtype, batch.tensors.exp_avgs[0].dtype)


def _parts(batch: Batch) -> Iterator[tuple[slice, Batch, list[Tensor] | None, int]]:
    """Yield slices of a batch to process together, and the vectors of a large tensor.

    Each item is (slice, its batch, vectors or None, number of elements in a block).
    """
    limit = BLOCK.get(batch.tensors.params[0].device.type, BLOCK_ELSEWHERE)
    for bucket in _buckets(batch, limit):
        part = batch.slice(bucket)
        # a small tensor is summed by rows even if it is alone, so results are bit-identical
        large = len(part.tensors) == 1 and part.tensors.params[0].numel() > limit // 4
        yield bucket, part, _flat(part) if large else None, limit


def _buckets(batch: Batch, limit: int) -> Iterator[slice]:
    """Yield runs of small tensors of at most ``limit`` padded elements, and single large ones."""
    start = size = 0
    for i, tensor in enumerate(batch.tensors.params):
        n = -(-tensor.numel() // ROW) * ROW
        alone = n > limit // 4 or (size > limit // 4 and i - start == 1)
        if size and (alone or size + n > limit):
            yield slice(start, i)
            start, size = i, 0
        size += n
    yield slice(start, len(batch.tensors))


def _flat(batch: Batch) -> list[Tensor] | None:
    """Return parameter, gradient, m, B (and compensation) of a single tensor as vectors.

    Return None if their memory layouts differ.
    """
    tensors, p = batch.tensors, batch.tensors.params[0]
    # the order of dimensions in memory, in which a channels-last tensor is contiguous too
    order = sorted(range(p.dim()), key=p.stride, reverse=True)
    columns = [*tensors.large, *([tensors.compensations] if tensors.compensations else [])]
    in_order = [column[0].permute(order) for column in columns]
    if not all(tensor.is_contiguous() for tensor in in_order):
        return None
    return [tensor.view(-1) for tensor in in_order]


@dataclass(slots=True)
class _Work:
    """Matrices of one layout. g and theta are only read; m and B are overwritten by m' and B'."""

    layout: RowLayout | BlockLayout
    g: Tensor
    m: Tensor
    B: Tensor
    theta: Tensor | None  # None if neither decay nor rounding needs it


def _rounds(batch: Batch) -> bool:
    """Return whether theta' is stored otherwise than by rounding to nearest."""
    drawn = rounding.is_drawn(batch.tensors.params[0].dtype, batch.h.rounding)
    return bool(batch.tensors.compensations) or drawn


def _stored(theta: Tensor, batch: Batch, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return theta' as it is stored, and the compensation or None."""
    dtype = batch.tensors.params[0].dtype
    if batch.tensors.compensations:
        return rounding.split(theta, dtype)
    assert random is not None
    return rounding.stochastic(theta, dtype, random), None


def _drawn(B: Tensor, batch: Batch, random: Tensor) -> Tensor:
    return rounding.stochastic(B, batch.tensors.hessian_diags[0].dtype, rounding.low_half(random))


def _keys(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the two keys of each tensor's random bits in this step."""
    device = batch.tensors.params[0].device
    t = batch.scalars.t
    step = t.to(device).long() if isinstance(t, Tensor) else int(t)
    return rounding.keys(_on_device(tuple(batch.tensors.rng_keys), device), step)


@lru_cache(maxsize=64)
def _on_device(rng_keys: tuple[int, ...], device: torch.device) -> Tensor:
    # cached, because a step that a CUDA graph captures must not copy from the host
    return torch.tensor(rng_keys, device=device)


def _pieces(flat: list[Tensor], block: int) -> Iterator[list[Tensor]]:
    """Yield the blocks of a large tensor's vectors."""
    for pieces in zip(*(torch.split(vector, block) for vector in flat), strict=True):
        yield list(pieces)


def _work(pieces: list[Tensor], batch: Batch) -> _Work:
    """Return one block, with m and B converted to the type of the arithmetic."""
    p, g, m, B, *low = pieces
    dtype = _arithmetic(batch)
    theta: Tensor | None = None
    if low:
        theta = rounding.join(p, low[0], dtype)
    elif batch.h.decays:
        theta = p
    return _Work(BlockLayout(p.device), g, m.to(dtype), B.to(dtype), theta)


def _step_in_blocks(batch: Batch, flat: list[Tensor], block: int, given: Sums | None) -> None:
    h, s = batch.h, _scalars(batch)
    one_block = given is None and flat[0].numel() <= block
    sums = given
    if given is None and not one_block:
        sums = _measured_in_blocks(batch, flat, s, block)
    keys = _keys(batch) if batch.tensors.rng_keys else None
    for i, pieces in enumerate(_pieces(flat, block)):
        work = _work(pieces, batch)
        p, _, m, B, *low = pieces
        if sums is None:
            sums, u2, y = _measure(work, h, s)
        else:
            # compute u^2 and y again instead of keeping them, to need the memory of one block only
            u2, y = _terms(work, h, s, sums)
        change = _apply(work, h, s, sums, u2, y, out=u2)
        random = None
        if keys is not None:
            positions = torch.arange(i * block, i * block + p.numel(), device=p.device)
            random = rounding.random_bits(positions, *keys)
        if _rounds(batch):
            theta = p.to(_arithmetic(batch)) if work.theta is None else work.theta
            new, rest = _stored(theta - change, batch, random)
            p.copy_(new)
            if rest is not None:
                low[0].copy_(rest)
        else:
            p.sub_(change)
        if m is not work.m:
            m.copy_(work.m)
            B.copy_(work.B if random is None else _drawn(work.B, batch, random))
    assert sums is not None
    _keep_thresholds(batch, sums)


def _terms(work: _Work, h: Hyperparameters, s: StepScalars, sums: Sums) -> tuple[Tensor, Tensor]:
    """Return u^2 and y = m' - m, where u is the displacement divided by ``sums.scale``."""
    spread = work.layout.spread
    scale = torch.where(sums.scale == 0, 1, sums.scale)
    u2 = _displacement(work, h, s).div_(spread(scale)).square_()
    return u2, _difference(work, h).mul_(spread(s.alpha))


def _scalars(batch: Batch) -> StepScalars:
    if not batch.tensors.thresholds:
        return batch.scalars
    return batch.scalars.with_threshold(torch.stack(batch.tensors.thresholds))


def _keep_thresholds(batch: Batch, sums: Sums) -> None:
    if batch.tensors.thresholds:
        assert sums.largest is not None
        torch._foreach_copy_(batch.tensors.thresholds, list(sums.largest.unbind()))


def _measured_in_blocks(batch: Batch, flat: list[Tensor], s: StepScalars, block: int) -> Sums:
    parts = [_measure(_work(pieces, batch), batch.h, s)[0] for pieces in _pieces(flat, block)]
    return parts[0] if len(parts) == 1 else Sums.concatenate(parts, torch.stack).merged()


def _number(x: Scalar) -> float:
    assert not isinstance(
        x, Tensor
    )  # only differentiable allows a tensor, and the reference serves it
    return x


def _rectify_(D: Tensor, threshold: Scalar, offset: Scalar) -> Tensor:
    D = D.clamp_(min=threshold)
    return D if isinstance(offset, float) and offset == 0 else D.add_(offset)


def _displacement(work: _Work, h: Hyperparameters, s: StepScalars) -> Tensor:
    """Return d, the displacement of the step before."""
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
    """Return g - m, where g includes the sign of maximize and L2 decay."""
    y = torch.add(work.m, work.g).neg_() if h.maximize else torch.sub(work.g, work.m)
    if h.l2:
        assert work.theta is not None
        y.add_(work.theta, alpha=_number(h.weight_decay))
    return y


def _measure(work: _Work, h: Hyperparameters, s: StepScalars) -> tuple[Sums, Tensor, Tensor]:
    """Return the sums, u^2 (with the scale of these sums) and y = m' - m."""
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
    """Overwrite m and B with m' and B'; return theta - theta' in ``out``."""
    spread = work.layout.spread
    work.m.add_(y)
    scale = sums.scale.to(sums.k.dtype)
    c = secant_coefficient(scale, sums.q4, sums.k, h.secant_eps())
    c = saturate(c, work.B.dtype)
    work.B.sub_(u2.mul_(spread(c)))

    threshold = h.sigma if sums.largest is None else sums.largest
    d = _rectify_(torch.abs(work.B, out=u2), spread(threshold), spread(s.offset))
    torch.div(work.m, d, out=d)
    if h.decoupled:
        assert work.theta is not None
        d.add_(work.theta, alpha=_number(h.weight_decay))
    return torch.mul(d, spread(s.rate), out=out)
