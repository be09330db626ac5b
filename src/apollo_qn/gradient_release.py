"""Gradient release: update each parameter in the backward pass and free its gradient at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_qn.distributed import is_sharded
from apollo_qn.optimizer import Apollo

_RELEASED = (
    "this gradient has been released: apollo_qn.GradientRelease took the step of the parameter of "
    "shape {} in the backward pass and freed its gradient. What reads or changes gradients between "
    "backward() and optimizer.step() cannot be used with it: clip_grad_norm_, clip_grad_value_, "
    "torch.amp.GradScaler, an all-reduce (DistributedDataParallel). A second backward pass needs "
    "the first one under release.accumulate(). Leave that out, or call release.remove()"
)
_TWICE = (
    "the parameter of shape {} got a second gradient since the last optimizer.step(), and the step "
    "with the first one has been taken: do all backward passes of a step but the last under "
    "release.accumulate(), and call optimizer.step() at its end (reentrant activation "
    "checkpointing of shared weights cannot be used: set use_reentrant=False)"
)
_SEVERAL = (
    "gradient release cannot be used with {} processes: the step would be taken with a process's "
    "own gradient, before DistributedDataParallel has averaged it; use the ordinary step"
)


class GradientRelease:
    """Update each parameter in the backward pass and free its gradient at once.

    The gradients of a model are then never all in memory together. Apollo updates a tensor without
    looking at other tensors, so the result is bit-identical to the ordinary step. The training loop
    does not change::

        release = GradientRelease(optimizer)
        for x, y in data:
            loss_of(model(x), y).backward()  # updates parameters and frees gradients
            optimizer.step()                 # ends the step: see below
            scheduler.step()
            optimizer.zero_grad()

    ``optimizer.step()`` still ends a step. It runs the optimizer's hooks, counts for schedulers,
    and updates parameters that still have a gradient. A closure's backward pass releases gradients
    too. The state stays in the optimizer, which is saved and loaded as usual.

    To accumulate gradients, run all backward passes except the last under :meth:`accumulate`. The
    sum in ``p.grad`` then takes as much memory as without gradient release.

    After ``backward()`` a released ``p.grad`` is a tensor without memory. Reading it raises
    RuntimeError, because clipping the model's norm and ``torch.amp.GradScaler`` would silently have
    no effect. By then the parameters have been updated. Frameworks that log the gradient norm, such
    as the Hugging Face Trainer, raise too. ``optimizer.step()`` sets a released ``p.grad`` to None.

    To clip each tensor by itself, register a hook on the parameter: ``p.register_hook``, or
    ``p.register_post_accumulate_grad_hook`` before the release is made.

    A parameter without a gradient is not updated, as after ``zero_grad(set_to_none=True)``. A
    compiled model returns all gradients of a graph at once, so gradient release saves no memory
    there.

    As a context manager, the release is removed on exit.

    Args:
        optimizer: the Apollo whose gradients are released. Groups that are added later are released
            from the next ``optimizer.step()`` on.

    Raises:
        TypeError: ``optimizer`` is not an :class:`apollo_qn.Apollo`.
        RuntimeError: the optimizer already has a release; a group has ``differentiable=True``; a
            parameter is a DTensor, which would take one all-reduce per tensor; there are several
            processes. In the backward pass: a parameter gets a second gradient in one step, or a
            sparse one. Other parameters may have been updated by then.
    """

    def __init__(self, optimizer: Apollo) -> None:
        if not isinstance(optimizer, Apollo):
            raise TypeError(f"optimizer must be an Apollo, got {type(optimizer).__name__}")
        if optimizer in _released_optimizers:
            raise RuntimeError("the optimizer has a GradientRelease already: call its remove()")
        _check_processes()
        for group in optimizer.param_groups:
            _check_group(group)
        self._optimizer = optimizer
        self._accumulating = False
        self._released: set[Tensor] = set()  # parameters updated since the last optimizer.step()
        self._handles: dict[Tensor, Any] = {}  # handles of the parameters' hooks
        self._groups: list[dict[str, Any]] = []
        self._place: dict[Tensor, tuple[dict[str, Any], int]] = {}  # group and position
        self._watch()
        self._step_handle = optimizer.register_step_pre_hook(self._before_step)
        _released_optimizers.add(optimizer)

    @contextmanager
    def accumulate(self, enabled: bool = True) -> Iterator[None]:
        """Return a context in which backward passes only add to ``p.grad``.

        Args:
            enabled: whether to accumulate. False releases gradients, as outside of the context.
        """
        before, self._accumulating = self._accumulating, enabled
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Return to the ordinary step and keep accumulated gradients. Further calls do nothing."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._clear_released()
        self._step_handle.remove()
        _released_optimizers.discard(self._optimizer)

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_step(
        self, optimizer: Apollo, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """End the step, so that the ordinary step does not see released gradients.

        A closure's backward pass releases gradients too. The closure is therefore wrapped in one
        that ends the step again.
        """
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        closure: Callable[[], Any] | None = given
        if closure is None:
            self._end_step()
            return None

        def ending() -> Any:
            loss = closure()
            self._end_step()
            return loss

        return (optimizer, ending), {}

    def _end_step(self) -> None:
        self._clear_released()
        self._watch()

    def _clear_released(self) -> None:
        for p in self._released:
            if is_released(p.grad):
                p.grad = None
        self._released.clear()

    def _watch(self) -> None:
        """Register hooks for parameters without one, which were added or unfrozen."""
        groups = self._optimizer.param_groups
        for group in groups:
            _check_group(group)
        self._groups = list(groups)
        every = [(p, group) for group in groups for p in group["params"]]
        self._place = {p: (group, position) for position, (p, group) in enumerate(every)}
        for p in self._handles.keys() - self._place.keys():
            self._handles.pop(p).remove()
        # autograd keeps the hook, and the garbage collector cannot see a reference from there
        this = weakref.ref(self)

        def hook(p: Tensor) -> None:
            release = this()
            if release is not None:
                release._step(p)

        for p in self._place.keys() - self._handles.keys():
            if p.requires_grad:
                register: Any = p.register_post_accumulate_grad_hook
                self._handles[p] = register(hook)

    def _step(self, p: Tensor) -> None:
        if self._accumulating or p.grad is None:
            return
        if p in self._released:
            raise RuntimeError(_TWICE.format(tuple(p.shape)))
        _check_processes()
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups) or any(map(_differ, groups, self._groups)):
            self._watch()  # a state was loaded, or a group added
        self._optimizer.step_parameter(p, *self._place[p])
        self._released.add(p)
        p.grad = _Released(p)


# Optimizers that have a release. They are kept here because Apollo does not know of releases.
_released_optimizers: weakref.WeakSet[Apollo] = weakref.WeakSet()


def is_released(gradient: Tensor | None) -> bool:
    """Return whether a gradient has been freed by :class:`GradientRelease`."""
    return isinstance(gradient, _Released)


def _differ(a: object, b: object) -> bool:
    return a is not b


def _check_processes() -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(_SEVERAL.format(dist.get_world_size()))


def _check_group(group: dict[str, Any]) -> None:
    if group["differentiable"]:
        raise RuntimeError(
            "gradient release does not support differentiable=True: autograd cannot run through a "
            "step that is taken in the backward pass; use differentiable=False"
        )
    for p in group["params"]:
        if is_sharded(p):
            raise RuntimeError(
                f"gradient release does not support sharded parameters (DTensor), got one of shape "
                f"{tuple(p.shape)}: each tensor's sums would be an all-reduce of their own; use "
                f"the ordinary step, which does one for all"
            )


class _Released(Tensor):
    """Placeholder of a freed gradient: shape and type without memory. Every use raises."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, p: Tensor) -> _Released:
        made: _Released = Tensor._make_wrapper_subclass(
            cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device
        )
        return made

    def __init__(self, p: Tensor) -> None:
        """Take shape, strides, type and device from the parameter ``p``."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(_RELEASED.format(tuple(self.shape)))

    # these would read the missing memory without a dispatch
    data_ptr = storage = untyped_storage = share_memory_ = _refuse

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<released gradient of shape {tuple(self.shape)}>"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        found = next(x for x in leaves if isinstance(x, cls))
        raise RuntimeError(_RELEASED.format(tuple(found.shape)))
