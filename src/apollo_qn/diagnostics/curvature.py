"""Measurements of each tensor's curvature, from the state after a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from apollo_qn import algorithm, rounding
from apollo_qn.backends.base import TensorLists
from apollo_qn.distributed import Reduction, localize
from apollo_qn.gradient_release import is_released
from apollo_qn.hyperparameters import Hyperparameters, Scalar, StepScalars
from apollo_qn.optimizer import Apollo
from apollo_qn.secant import Sums, accumulator, arithmetic, correction
from apollo_qn.state import hyperparameters

Names: TypeAlias = Iterable[tuple[str, Tensor]]
Corrections: TypeAlias = dict[Tensor, Tensor]  # a 0-dim tensor per parameter, on its device


@dataclass(frozen=True, slots=True)
class TensorDiagnostics:
    r"""Measurements of one parameter tensor after a step.

    B, D, d and sigma are those of :class:`apollo_qn.Apollo`. B has the size of learning rate times
    curvature (section 3.2 of the paper). Divide B by ``lr`` to get the curvature of the loss. The
    real and imaginary parts of a complex tensor count as separate elements.

    Attributes:
        name: name of the parameter.
        numel: number of elements, of all ranks together for a sharded parameter.
        step: number of steps that the tensor has taken.
        lr: rate of the last step, warmup included.
        threshold: bound of \|B\| in the last step: sigma, or max\|g - m\| with belief.
        negative: share of elements with B < 0, in [0, 1].
        rectified: share of elements with \|B\| < threshold, in [0, 1]. These elements take the step
            of SGD with momentum at the rate lr / threshold.
        curvature_mean: mean of B.
        curvature_rms: root mean square of B.
        curvature_min, curvature_max: smallest and largest B.
        secant_correction: root mean square of B' - B in the last step. Its sign is that of
            B' - B = -a d^2, which all elements share. None if it was not measured (see
            :func:`coming_corrections`).
        parameter_norm: \|\|theta\|\|_2.
        step_norm: length of the last step, including decoupled weight decay, before the step was
            rounded to the parameter's type.
        step_ratio: step_norm / parameter_norm; infinite if the parameter is 0.
        rate_min, rate_max: smallest and largest effective rate, lr / D.
    """

    name: str
    numel: int
    step: int
    lr: float
    threshold: float
    negative: float
    rectified: float
    curvature_mean: float
    curvature_rms: float
    curvature_min: float
    curvature_max: float
    secant_correction: float | None
    parameter_norm: float
    step_norm: float
    step_ratio: float
    rate_min: float
    rate_max: float


@dataclass(frozen=True, slots=True)
class _LocalTensors:
    """Local tensors of one parameter, as real tensors; shards if the parameter is sharded."""

    p: Tensor
    name: str
    h: Hyperparameters
    t: Scalar  # number of steps done
    s: StepScalars  # scalars of the next step, which include those of the last step's D and d
    last_rate: Scalar  # learning rate of the last step
    theta: Tensor
    g: Tensor
    m: Tensor
    B: Tensor
    row: int  # row in the reduction's table, or -1 for a full tensor

    @property
    def numel(self) -> int:
        """Return the number of real elements of the full tensor."""
        return self.p.numel() * (2 if self.p.is_complex() else 1)

    @property
    def empty(self) -> bool:
        """Return whether this rank holds no element."""
        return self.B.numel() == 0


@torch.no_grad()
def measure(
    optimizer: Apollo, corrections: Corrections | None = None, names: Names | None = None
) -> list[TensorDiagnostics]:
    """Measure every tensor that has taken a step; nothing is changed.

    A call makes about ten passes over parameters and state. It waits for the device once and needs
    working memory of two tensors. For sharded parameters the numbers are those of the full tensors.
    All ranks must then call the function, for two small all-reduces per mesh.

    Args:
        optimizer: an Apollo after a step, before a scheduler changes the learning rate. The rate of
            the last step is computed from the group's present ``lr``.
        corrections: result of :func:`coming_corrections` before that step. Without it
            ``secant_correction`` is None.
        names: (name, parameter) pairs, for example ``model.named_parameters()``. By default the
            names that the optimizer was given, or ``"0.3"`` for the fourth parameter of the first
            group.

    Returns:
        One entry per tensor in the order of the groups. Parameters without state or without
        elements are left out.

    Raises:
        TypeError: the optimizer is not an Apollo.

    Example::

        optimizer.step()
        for tensor in measure(optimizer, names=model.named_parameters()):
            print(tensor.name, tensor.negative, tensor.rectified, tensor.step_ratio)
    """
    parts, reduction = _parts(optimizer, names, coming=False)
    sums = [_sums(part) for part in parts]
    if reduction is not None:
        _complete(parts, sums, reduction)
    rows: list[list[Scalar]] = []
    for part, (added, largest) in zip(parts, sums, strict=True):
        s = part.s
        sizes = torch.stack([largest[2], -largest[3]])  # largest and smallest |B|
        D = algorithm.rectify(sizes, s.previous_threshold, s.previous_offset)
        change: Scalar = 0.0  # no correction in the first step, or without a gradient
        if corrections is not None:
            change = corrections.get(part.p, 0.0)
        numbers = [part.t, part.last_rate, s.previous_threshold, change]
        rows.append([*numbers, *added.unbind(), *largest[:2].unbind(), *D.unbind()])
    return [
        _diagnostics(part, row, corrections is not None)
        for part, row in zip(parts, _on_host(rows), strict=True)
    ]


@torch.no_grad()
def coming_corrections(optimizer: Apollo) -> Corrections:
    """Measure how the next step will change B; nothing is changed.

    Call the function after ``backward``, and after gradients are unscaled and clipped, but before
    ``step``. :class:`Recorder` calls it automatically. A call costs the sums of a step and does not
    wait for the device. For sharded parameters all ranks must call it, for one small all-reduce per
    mesh.

    Returns:
        A 0-dim tensor per parameter that has a gradient, a state and elements: the
        ``secant_correction`` of the next step (see :class:`TensorDiagnostics`).

    Raises:
        TypeError: the optimizer is not an Apollo.

    Example::

        loss.backward()
        corrections = coming_corrections(optimizer)
        optimizer.step()
        tensors = measure(optimizer, corrections)  # with secant_correction
    """
    parts, reduction = _parts(optimizer, None, coming=True)
    table = None if reduction is None else reduction.table()
    found: list[Sums | None] = []
    for part in parts:
        sums = None
        if not part.empty:
            sums = algorithm.measure(part.theta, part.g, part.m, part.B, part.h, part.s)
        if reduction is not None and table is not None and part.row >= 0 and sums is not None:
            reduction.put(table, [part.row], Sums.concatenate([sums], torch.stack))
        found.append(sums)
    if reduction is not None and table is not None:
        reduction.reduce_(table)
    result: Corrections = {}
    for part, sums in zip(parts, found, strict=True):
        if reduction is not None and table is not None and part.row >= 0:
            sums = reduction.take(table, [part.row])
        assert sums is not None
        # B' - B = -c u^2 with sum u^4 = q4
        c = correction(sums, part.h.secant_eps(), part.m.dtype)
        size = sums.q4.to(accumulator(c.device)).sqrt() / math.sqrt(part.numel)
        result[part.p] = (-c * size).reshape(())
    return result


def overall(tensors: Sequence[TensorDiagnostics], name: str = "all") -> TensorDiagnostics:
    """Combine the measurements of several tensors as if they were one tensor.

    ``secant_correction`` is >= 0 here. ``lr`` and ``threshold`` are NaN if the tensors differ in
    them. ``step`` is the largest.

    Args:
        tensors: result of :func:`measure`, or a part of it.
        name: name of the combined tensor.

    Raises:
        ValueError: ``tensors`` is empty.

    Example::

        total = overall(measure(optimizer))
        print(f"{total.negative:.0%} of all elements have negative curvature")
    """
    if not tensors:
        raise ValueError("tensors must be at least one, got none")
    numel = sum(tensor.numel for tensor in tensors)

    def mean(field: str) -> float:
        return float(sum(tensor.numel * getattr(tensor, field) for tensor in tensors) / numel)

    def root(field: str) -> float:
        return math.sqrt(sum(t.numel * getattr(t, field) ** 2 for t in tensors) / numel)

    def common(field: str) -> float:
        values = {getattr(tensor, field) for tensor in tensors}
        return float(values.pop()) if len(values) == 1 else math.nan

    known = all(tensor.secant_correction is not None for tensor in tensors)
    parameter_norm = math.sqrt(sum(tensor.parameter_norm**2 for tensor in tensors))
    step_norm = math.sqrt(sum(tensor.step_norm**2 for tensor in tensors))
    return TensorDiagnostics(
        name=name,
        numel=numel,
        step=max(tensor.step for tensor in tensors),
        lr=common("lr"),
        threshold=common("threshold"),
        negative=mean("negative"),
        rectified=mean("rectified"),
        curvature_mean=mean("curvature_mean"),
        curvature_rms=root("curvature_rms"),
        curvature_min=min(tensor.curvature_min for tensor in tensors),
        curvature_max=max(tensor.curvature_max for tensor in tensors),
        secant_correction=root("secant_correction") if known else None,
        parameter_norm=parameter_norm,
        step_norm=step_norm,
        step_ratio=_ratio(step_norm, parameter_norm),
        rate_min=min(tensor.rate_min for tensor in tensors),
        rate_max=max(tensor.rate_max for tensor in tensors),
    )


def check_apollo(optimizer: Any) -> None:
    """Raise TypeError unless the optimizer is an Apollo."""
    if not isinstance(optimizer, Apollo):
        raise TypeError(
            f"optimizer must be an Apollo, got {type(optimizer).__name__}; of one that wraps it "
            "give the Apollo inside"
        )


def named(
    optimizer: Apollo, names: Names | None
) -> Iterator[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
    """Yield every group with its parameters and their names."""
    given = {p: name for name, p in names or ()}
    for i, group in enumerate(optimizer.param_groups):
        own = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
        pairs = zip(own, group["params"], strict=True)
        yield group, [(given.get(p, name), p) for name, p in pairs]


def last_rate(optimizer: Apollo, p: Tensor, group: dict[str, Any]) -> float:
    """Return the learning rate of the last step of a parameter that has taken one."""
    return float(_last_rate(optimizer.state[p], hyperparameters(group)))


def _last_rate(state: dict[str, Any], h: Hyperparameters) -> Scalar:
    if h.decoupled_weight_decay and "previous_lr" in state:
        return _number(state["previous_lr"])
    t = _number(state["step"])
    return h.rate((t - 1).clamp(min=0) if isinstance(t, Tensor) else max(t - 1, 0))


def _coming_scalars(state: dict[str, Any], h: Hyperparameters) -> StepScalars:
    # a mode that was turned on during training has no scalar of its own yet
    previous_lr = _number(state.get("previous_lr", h.lr))
    threshold = state.get("threshold", h.sigma) if h.belief else None
    return StepScalars.at(_number(state["step"]), h, previous_lr, threshold)


def _number(x: Scalar) -> Scalar:
    """Return a CPU tensor as a Python number, which needs no wait; return others unchanged."""
    return x.item() if isinstance(x, Tensor) and x.is_cpu else x


def _parts(
    optimizer: Apollo, names: Names | None, coming: bool
) -> tuple[list[_LocalTensors], Reduction | None]:
    check_apollo(optimizer)
    groups, members = [], []
    for settings, named_params in named(optimizer, names):
        mine = [(name, p) for name, p in named_params if p.numel() and optimizer.state.get(p)]
        if coming:
            # skip released gradients, already applied, and sparse ones, for which the step raises
            mine = [(name, p) for name, p in mine if p.grad is not None and _is_readable(p.grad)]
        states = [optimizer.state[p] for _, p in mine]
        lists = TensorLists(
            [p for _, p in mine],
            # a parameter without a gradient takes its place, with the same placements
            [p.grad if coming and p.grad is not None else p for _, p in mine],
            [state["exp_avg"] for state in states],
            [state["hessian_diag"] for state in states],
            [state["step"] for state in states],
            compensations=[state.get("compensation") for state in states],
        )
        groups.append((lists, hyperparameters(settings)))
        members.append(mine)
    local, reduction = localize(groups, None)
    parts = []
    for (lists, h), mine in zip(local, members, strict=True):
        for i, (name, p) in enumerate(mine):
            row = lists.rows[i] if lists.rows else -1
            low = lists.compensations[i]
            dtype = arithmetic(p.dtype, lists.exp_avgs[i].dtype).to_real()
            theta, g, m, B = (_real(column[i]).to(dtype) for column in lists.large)
            if low is not None:
                theta = rounding.join(theta, low, dtype)
            if B.numel() == 0 and row < 0:
                continue  # all of the parameter lies on ranks of another mesh
            state = optimizer.state[p]
            parts.append(
                _LocalTensors(
                    p, name, h, _number(state["step"]), _coming_scalars(state, h),
                    _last_rate(state, h), theta, g, m, B, row,
                )
            )  # fmt: skip
    return parts, reduction


def _is_readable(gradient: Tensor) -> bool:
    return not gradient.is_sparse and not is_released(gradient)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


_ADDED, _LARGEST = 6, 4


def _sums(part: _LocalTensors) -> tuple[Tensor, Tensor]:
    """Return the values to add up over the shards of a tensor, and those to take the maximum of."""
    B, s = part.B, part.s
    wide = accumulator(B.device)
    if part.empty:
        return B.new_zeros(_ADDED, dtype=wide), B.new_full((_LARGEST,), -math.inf, dtype=wide)
    size = B.abs()
    d = algorithm.displacement(part.theta, part.m, B, part.h, s)
    added = [
        (B < 0).sum(),
        (size < s.previous_threshold).sum(),
        B.sum(dtype=wide),
        *(torch.linalg.vector_norm(x, dtype=wide) ** 2 for x in (B, part.theta, d)),
    ]
    (low, high), (near, far) = torch.aminmax(B), torch.aminmax(size)
    largest = [high, -low, far, -near]
    return torch.stack([x.to(wide) for x in added]), torch.stack(largest).to(wide)


def _complete(
    parts: list[_LocalTensors], sums: list[tuple[Tensor, Tensor]], reduction: Reduction
) -> None:
    """Replace the sums over shards in ``sums`` by those of the full tensors."""
    rows = [i for i, part in enumerate(parts) if part.row >= 0]
    ordered = sorted(rows, key=lambda i: parts[i].row)
    added, largest = (torch.stack([sums[i][k] for i in ordered]) for k in range(2))
    reduction.totals_(added, largest)
    for i in rows:
        sums[i] = (added[parts[i].row], largest[parts[i].row])


def _on_host(rows: list[list[Scalar]]) -> list[list[float]]:
    """Convert tensors to Python numbers, with one wait per device."""
    waiting: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
    result = [[x if not isinstance(x, Tensor) else math.nan for x in row] for row in rows]
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            if isinstance(x, Tensor):
                waiting.setdefault(x.device, []).append((i, j, x))
    for device, found in waiting.items():
        wide = accumulator(device)
        values = torch.stack([x.to(wide).reshape(()) for _, _, x in found]).tolist()
        for (i, j, _), value in zip(found, values, strict=True):
            result[i][j] = value
    return result


def _diagnostics(part: _LocalTensors, row: list[float], corrected: bool) -> TensorDiagnostics:
    t, rate, threshold, change, negative, rectified, total, *squares, high, low, far, near = row
    curvature, parameter, step = (math.sqrt(x) for x in squares)
    step *= abs(rate)
    return TensorDiagnostics(
        name=part.name,
        numel=part.numel,
        step=int(t),
        lr=rate,
        threshold=threshold,
        negative=negative / part.numel,
        rectified=rectified / part.numel,
        curvature_mean=total / part.numel,
        curvature_rms=curvature / math.sqrt(part.numel),
        curvature_min=-low,
        curvature_max=high,
        secant_correction=change if corrected else None,
        parameter_norm=parameter,
        step_norm=step,
        step_ratio=_ratio(step, parameter),
        rate_min=rate / far if far else math.inf,
        rate_max=rate / near if near else math.inf,
    )


def _ratio(step: float, parameter: float) -> float:
    if parameter:
        return step / parameter
    return math.inf if step else math.nan
