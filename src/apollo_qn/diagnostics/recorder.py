"""Recording of an optimizer's curvature every n steps, through its hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from torch.optim import Optimizer

from apollo_qn.diagnostics.curvature import (
    Corrections,
    Names,
    TensorDiagnostics,
    check_apollo,
    coming_corrections,
    measure,
    overall,
)
from apollo_qn.optimizer import Apollo

SHOWN = (
    *("negative", "rectified", "curvature_rms", "curvature_mean"),
    *("secant_correction", "step_ratio", "rate_max"),
)


class Writer(Protocol):
    """Interface of a ``torch.utils.tensorboard.SummaryWriter`` that a recorder needs."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write a number."""


Sink: TypeAlias = Callable[[int, list[TensorDiagnostics]], object]


class Recorder:
    """Measure an Apollo in every n-th step, until :meth:`detach`.

    A recorder is a hook before the step and a hook after the step. It does not change what the
    optimizer computes. ::

        with Recorder(optimizer, SummaryWriter(), every=100):
            train()

    If parameters are sharded, all ranks need a recorder with the same ``every``; those that do not
    write pass ``to=None``. A step that is replayed from a CUDA graph calls no hooks and is not
    recorded.

    Args:
        optimizer: the Apollo to measure.
        to: destination of the measurements: a TensorBoard writer (see :func:`to_tensorboard`), a
            function of the step's number and the list of :func:`measure`, or None.
        every: number n of steps, >= 1. Steps whose number is a multiple of n are recorded.
        names: as in :func:`measure`.
        step: number of steps that were done before, for a training run that is resumed.

    Raises:
        TypeError: the optimizer is not an Apollo, or ``to`` cannot be written to.
        ValueError: ``every`` or ``step`` is out of its range.
    """

    def __init__(
        self,
        optimizer: Apollo,
        to: Writer | Sink | None,
        every: int = 100,
        *,
        names: Names | None = None,
        step: int = 0,
    ) -> None:
        check_apollo(optimizer)
        for name, value, smallest in (("every", every, 1), ("step", step, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} must be a whole number >= {smallest}, got {value!r}")
        add_scalar = getattr(to, "add_scalar", None)
        if to is not None and add_scalar is None and not callable(to):
            raise TypeError(
                "to must be a writer with add_scalar, or be callable with a step and a list, or "
                f"None, got {to!r}"
            )
        self.every, self.step = every, step
        self._names = None if names is None else list(names)
        writer: Any = to
        self._write: Sink | None = writer if add_scalar is None else partial(to_tensorboard, writer)
        self._coming: Corrections = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def due(self) -> bool:
        """Return whether the next step will be recorded."""
        return bool(self._handles) and (self.step + 1) % self.every == 0

    def detach(self) -> None:
        """Remove both hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.due:
            return None
        assert isinstance(optimizer, Apollo)
        # the first argument is the optimizer
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._coming = coming_corrections(optimizer)
            return None

        def measured() -> Any:  # gradients exist only after the closure has been called
            loss = closure()
            self._coming = coming_corrections(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": measured}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        due = self.due
        self.step += 1
        if not due:
            return
        assert isinstance(optimizer, Apollo)
        coming, self._coming = self._coming, {}
        measured = measure(optimizer, coming, self._names)
        if self._write is not None:
            self._write(self.step, measured)


def to_tensorboard(writer: Writer, step: int, tensors: Sequence[TensorDiagnostics]) -> None:
    """Write measurements as scalars of TensorBoard.

    The tags are ``"curvature.negative/layer1.weight"`` and so on, and ``"curvature.negative/all"``.

    Args:
        writer: a ``SummaryWriter``, or any object with its ``add_scalar``.
        step: number of the training step.
        tensors: result of :func:`measure`.

    Example::

        writer = torch.utils.tensorboard.SummaryWriter()
        to_tensorboard(writer, step, measure(optimizer))
    """
    for tensor in (*tensors, *([overall(tensors)] if tensors else [])):
        numbers = asdict(tensor)
        for field in SHOWN:
            if numbers[field] is not None:
                writer.add_scalar(f"curvature.{field}/{tensor.name}", numbers[field], step)
