"""Gradient release: the step of a parameter in the backward pass, and its gradient freed there."""

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
    """Take the step of each parameter in the backward pass and free its gradient there.

    The gradients of a model are then never all in memory at once. Apollo's step of a tensor needs
    no other tensor, so that the result is, bit by bit, that of the ordinary step. The training loop
    stays as it is::

        release = GradientRelease(optimizer)
        for x, y in data:
            loss_of(model(x), y).backward()  # steps, and frees the gradients
            optimizer.step()                 # ends the step: see below
            scheduler.step()
            optimizer.zero_grad()

    ``optimizer.step()`` remains the end of a step: it runs its hooks, lets schedulers see it, and
    does the ordinary step for parameters that have a gradient still. A closure's backward pass
    releases too. The state is the optimizer's own, to be saved and loaded as ever.

    To accumulate gradients, do all backward passes but the last under :meth:`accumulate`. They are
    summed in ``p.grad`` as without release, so that this costs the memory again.

    Between ``backward()`` and ``optimizer.step()`` a released ``p.grad`` is a tensor without memory
    that raises RuntimeError where it is read, since clipping over the whole model and
    ``torch.amp.GradScaler`` would silently do nothing; after it, it is None. They raise only after
    the steps of that backward pass. Frameworks that look at the gradients' norm to log it raise
    too, as the Hugging Face Trainer does. To clip tensor by tensor, register a hook of the
    parameter's own (``p.register_hook``, or ``p.register_post_accumulate_grad_hook`` before this).

    As with ``zero_grad(set_to_none=True)``, a parameter that has no gradient takes no step. A
    compiled model hands over all gradients of a graph together: then nothing is saved.

    Use it as a context manager to have it removed at the end.

    Args:
        optimizer: whose parameters are to be released, those of groups that are added later too
            (from the next ``optimizer.step()`` on).

    Raises:
        TypeError: ``optimizer`` is not an :class:`apollo_qn.Apollo`.
        RuntimeError: it has a release already; a group has ``differentiable=True``; a parameter is
            a DTensor, whose sums would be an all-reduce a tensor; there are several processes. In
            the backward pass: a second gradient of a parameter in one step; a sparse gradient
            (other parameters have taken their steps by then).
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
        self._released: set[Tensor] = set()  # since the last optimizer.step()
        self._handles: dict[Tensor, Any] = {}  # of the parameters' hooks
        self._groups: list[dict[str, Any]] = []
        self._place: dict[Tensor, tuple[dict[str, Any], int]] = {}  # group and position
        self._watch()
        self._step_handle = optimizer.register_step_pre_hook(self._before_step)
        _released_optimizers.add(optimizer)

    @contextmanager
    def accumulate(self, enabled: bool = True) -> Iterator[None]:
        """Within it backward passes only add to ``p.grad``.

        Args:
            enabled: False: they release, as outside.
        """
        before, self._accumulating = self._accumulating, enabled
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Return to the ordinary step; gradients that have been accumulated remain. Idempotent."""
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
        """End the step: what was released has no gradient for the ordinary step.

        A closure's backward pass releases too, so that the closure itself ends the step.
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
        """Register hooks for parameters that have none yet: added or unfrozen ones."""
        groups = self._optimizer.param_groups
        for group in groups:
            _check_group(group)
        self._groups = list(groups)
        every = [(p, group) for group in groups for p in group["params"]]
        self._place = {p: (group, position) for position, (p, group) in enumerate(every)}
        for p in self._handles.keys() - self._place.keys():
            self._handles.pop(p).remove()
        # a hook lives in autograd, where the garbage collector does not see a reference to self
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


# those that have a release; an optimizer's own attributes do not tell
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
    """Stands where a gradient was: of its shape and type, without memory, and refuses every use."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, p: Tensor) -> _Released:
        made: _Released = Tensor._make_wrapper_subclass(
            cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device
        )
        return made

    def __init__(self, p: Tensor) -> None:
        """Of the parameter ``p``."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<released gradient of shape {tuple(self.shape)}>"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        found = next(x for x in leaves if isinstance(x, cls))
        raise RuntimeError(_RELEASED.format(tuple(found.shape)))
