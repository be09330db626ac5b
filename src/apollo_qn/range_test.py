"""A range test: short training runs from the same weights, which propose a learning rate."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apollo_qn import advice
from apollo_qn.optimizer import Apollo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEAR = 0.02  # share of the best run's progress within which a rate is good; docs/choosing.md
_FEWEST_STEPS = 10
RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)


class RangeTest(NamedTuple):
    """Result of :func:`lr_range_test`.

    Attributes:
        rates: learning rates that were tried, in ascending order.
        losses: mean training loss at the end of the run at each rate; infinite where a loss was not
            finite.
        proposal: proposed learning rate; NaN if no run lowered the loss.
        curves: training loss of each step of each run. A run ends early where a loss is not finite.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    proposal: float
    curves: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        lines = [
            f"{rate:10g}  {loss:.4g}" for rate, loss in zip(self.rates, self.losses, strict=True)
        ]
        return "\n".join(["   lr       loss", *lines, f"proposal: lr={self.proposal:g}"])

    def plot(self) -> Figure:
        """Draw the losses over the rates, with a line at the proposal.

        Returns:
            A matplotlib figure, to be saved with ``savefig``; no window is opened.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                "plot needs the package matplotlib, which is not installed; pip install matplotlib"
            ) from None
        figure = Figure(figsize=(5.0, 3.2), dpi=144, layout="constrained")
        axes = figure.subplots()
        shown = [(r, x) for r, x in zip(self.rates, self.losses, strict=True) if x < math.inf]
        axes.plot([r for r, _ in shown], [x for _, x in shown], marker="o", color="#D55E00")
        if math.isfinite(self.proposal):
            axes.axvline(self.proposal, color="#555555", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlim(self.rates[0] / 1.3, self.rates[-1] * 1.3)
        axes.set_xlabel("lr")
        axes.set_ylabel("loss at the end of the run")
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def lr_range_test(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    rates: Sequence[float] = RATES,
    *,
    steps: int = 100,
    warmup_steps: int | None = None,
    clip_norm: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = Apollo,
    callback: Callable[[float, float], object] | None = None,
) -> RangeTest:
    """Propose a learning rate from short training runs, one per rate.

    All runs start from the model's present weights and see the same batches and random numbers. In
    each run the rate rises linearly over the warmup and then falls linearly to 0. The model's
    weights, buffers, gradients and modes, and the states of the random number generators, are
    restored at the end, also after an exception or an interrupt.

    The losses at the end of the runs are compared. The proposal is the geometric mean of all rates
    whose loss is within 2 % of the best, where 100 % is how far the best run lowered the loss.

    Args:
        model: model to train. It is put into training mode.
        loss: function of the model and a batch that returns the loss to minimize. It also moves the
            batch to the model's device.
        batches: batches of training data. They must be iterable more than once, as a list or a
            DataLoader is, and are repeated if there are fewer than ``steps``.
        rates: learning rates to try, > 0.
        steps: number of steps of each run, >= 10. More steps give a better proposal.
        warmup_steps: number of steps of the warmup. None means a fifth of ``steps``.
        clip_norm: largest norm of the gradient. None means that it is not clipped.
        optimizer: function that makes the optimizer. It is called as
            ``optimizer(params, lr=..., warmup_steps=...)``, with the parameters that require a
            gradient. To fix other settings use ``functools.partial``; for an optimizer without
            ``warmup_steps`` give a function that leaves them out.
        callback: function that is called with rate and loss after each run, such as ``print``.

    Returns:
        A :class:`RangeTest` with rates, losses and the proposal.

    Raises:
        TypeError: ``batches`` can be iterated only once.
        ValueError: an argument is out of its range; there are no batches or nothing to train.
        RuntimeError: there are several processes, whose runs would differ.

    Warns:
        ApolloWarning: no run lowered the loss, or none by more than it varies from batch to batch,
            or the best rate is the first or the last one.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> batches = [torch.randn(8, 4) for _ in range(20)]
        >>> result = lr_range_test(
        ...     model, lambda m, x: (m(x) - 1).square().mean(), batches, [0.05, 0.5, 5], steps=20
        ... )
        >>> optimizer = Apollo(model.parameters(), lr=result.proposal, warmup_steps=100)
    """
    rates = sorted(float(rate) for rate in rates)
    warmup_steps = steps // 5 if warmup_steps is None else warmup_steps
    _check(rates, steps, warmup_steps, clip_norm)
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches must be iterable more than once, got {type(batches).__name__}: give a list "
            "or a DataLoader"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"lr_range_test must run in one process, got {dist.get_world_size()}: each would see "
            "other batches and propose another rate"
        )
    snapshot = _Snapshot(model, batches)
    curves = []
    try:
        for rate in rates:
            snapshot.restore()
            model.train()
            with warnings.catch_warnings():
                # small rates are tried on purpose
                warnings.simplefilter("ignore", advice.LearningRateWarning)
                params = [p for p in model.parameters() if p.requires_grad]
                made = optimizer(params, lr=rate, warmup_steps=warmup_steps)
            data = itertools.islice(_repeated(batches), steps)
            curves.append(_train(model, loss, data, made, steps, warmup_steps, clip_norm))
            if callback is not None:
                callback(rate, _final(curves[-1], steps))
    finally:
        snapshot.restore()
    losses = [_final(curve, steps) for curve in curves]
    proposal = propose(rates, losses, curves[0][0])
    _warn(rates, losses, proposal, curves)
    return RangeTest(tuple(rates), tuple(losses), proposal, tuple(map(tuple, curves)))


def propose(rates: Sequence[float], losses: Sequence[float], start: float) -> float:
    """Return the geometric mean of the rates whose loss is near the best, to three digits.

    Args:
        rates: learning rates.
        losses: loss of each rate at the end of its run.
        start: loss before the first step.

    Returns:
        The proposal, or NaN if no loss is below ``start``.
    """
    best = min(losses)
    if not best < start < math.inf:
        return math.nan
    near = [r for r, x in zip(rates, losses, strict=True) if x <= best + _NEAR * (start - best)]
    mean = math.exp(sum(map(math.log, near)) / len(near))
    return float(f"{mean:.3g}")  # 5, not 4.999999999999999


def _check(rates: Sequence[float], steps: int, warmup_steps: int, clip_norm: float | None) -> None:
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates must be finite numbers > 0, at least one, got {rates!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < _FEWEST_STEPS:
        raise ValueError(f"steps must be a whole number >= {_FEWEST_STEPS}, got {steps!r}")
    if not isinstance(warmup_steps, int) or not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps must be in [0, {steps}), got {warmup_steps!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be None or > 0, got {clip_norm!r}")


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise ValueError("batches must have at least one batch, got none")


def _train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    steps: int,
    warmup_steps: int,
    clip_norm: float | None,
) -> list[float]:
    """Train, and return the loss of each step; stop after a loss that is not finite."""
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (steps - t) / (steps - warmup_steps))
    )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    curve = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss must return a tensor of one element, got {value!r}")
        curve.append(value.item())
        if not math.isfinite(curve[-1]):
            break
        value.backward()  # type: ignore[no-untyped-call]
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(params, clip_norm)
        optimizer.step()
        decay.step()
    return curve


def _final(curve: Sequence[float], steps: int) -> float:
    """Return the mean loss of the last quarter of a run, or infinity if the run was stopped."""
    if not math.isfinite(curve[-1]):
        return math.inf
    last = curve[-max(1, steps // 4) :]
    return sum(last) / len(last)


def _warn(
    rates: Sequence[float],
    losses: Sequence[float],
    proposal: float,
    curves: Sequence[Sequence[float]],
) -> None:
    best = losses.index(min(losses))
    progress = curves[best][0] - losses[best]
    last = curves[best][-max(2, len(curves[best]) // 4) :]
    if math.isnan(proposal):
        message = (
            f"no rate of {rates[0]:g} to {rates[-1]:g} lowered the loss: try smaller rates, more "
            "steps, or clip_norm=1"
        )
    elif progress < statistics.stdev(last):
        message = (
            f"the best run lowered the loss by {progress:.2g} only, less than the loss varies from "
            "batch to batch, so that the proposal may be chance: give the runs more steps"
        )
    elif len(rates) > 1 and best in (0, len(rates) - 1):
        message = (
            f"the best rate is the {'first' if best == 0 else 'last'} that was tried, "
            f"{rates[best]:g}: try rates beyond it too"
        )
    else:
        return
    advice.warn(message, advice.ApolloWarning)


class _Snapshot:
    """Copy of everything that a training run changes."""

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        params = list(model.parameters())
        if not any(p.requires_grad for p in params):
            raise ValueError("model must have parameters that require a gradient, got none")
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in params):
            raise ValueError("model has lazy parameters: run it once on a batch before the test")
        self._values = [(x, x.detach().clone()) for x in [*params, *model.buffers()]]
        self._grads = [(p, p.grad) for p in params]
        modules = list(model.modules())
        self._buffers = [(module, dict(module._buffers)) for module in modules]
        self._modes = [(module, module.training) for module in modules]
        self._random = _random_states(batches)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, in place."""
        for module, buffers in self._buffers:
            module._buffers.update(buffers)
        for x, value in self._values:
            x.copy_(value)
        for p, grad in self._grads:
            p.grad = grad
        for module, training in self._modes:
            module.training = training
        for set_state, state in self._random:
            set_state(state)


def _random_states(batches: Iterable[Any]) -> list[tuple[Callable[[Any], object], Any]]:
    """Return the state of each random number generator, with the function that sets it."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    if (numpy := sys.modules.get("numpy")) is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    for owner in (batches, getattr(batches, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            states.append((generator.set_state, generator.get_state()))
    return states
