"""Validation of settings, lists and tensors before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from apollo_qn import rounding as storage
from apollo_qn.backends import cpu, triton
from apollo_qn.backends.base import Describe, TensorLists
from apollo_qn.distributed import Group, is_sharded
from apollo_qn.hyperparameters import Hyperparameters, check_ranges, number
from apollo_qn.state import STATE_TYPES, dtype_name


def required_list(
    name: str, tensors: list[Tensor] | None, params: list[Tensor], needed: bool, mode: str
) -> list[Tensor]:
    """Return a list that only some modes need, or raise ValueError if it is missing."""
    if not needed:
        return []
    if tensors is None:
        raise ValueError(f"{name} must be a list of 0-dim tensors with {mode}, got None")
    check_length(name, tensors, params)
    return list(tensors)


def check_lists(lists: TensorLists) -> None:
    """Raise ValueError for tensors that a caller's lists must not hold."""
    for name in ("params", "grads", "exp_avgs", "hessian_diags"):
        for x in getattr(lists, name):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name} must hold tensors, got {x!r}")
            if name == "params" and not (x.is_floating_point() or x.is_complex()):
                raise ValueError(f"params must be floating or complex, got {x.dtype}")
            if name in ("exp_avgs", "hessian_diags") and x.dtype not in STATE_TYPES:
                raise ValueError(f"{name} must be bfloat16, float32 or float64, got {x.dtype}")
    for name in ("state_steps", "previous_lrs", "thresholds"):
        for x in getattr(lists, name):
            if not isinstance(x, Tensor) or x.dim() or not x.is_floating_point():
                got = f"shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else repr(x)
                raise ValueError(f"{name} must be floating 0-dim tensors, got {got}")
    for p, x in zip(lists.params, lists.thresholds, strict=bool(lists.thresholds)):
        if x.device != p.device:
            raise ValueError(
                f"thresholds must lie on their parameters' devices, got {x.device} for {p.device}"
            )


@lru_cache(maxsize=512)
def _check_once(**given: Any) -> None:
    """Call ``check_ranges``, but for settings that were found valid before; a step is fast."""
    check_ranges({name: value for name, value in given.items() if value is not _TENSOR})


_TENSOR = object()  # stands for a tensor, which a cache must not keep alive


def checked_group(
    lists: TensorLists, h: Hyperparameters, traced: bool, describe: Describe
) -> Group:
    """Validate a group; return it with the learning rate as a number if possible."""
    check_back_end_choice(h.foreach, h.fused, h.differentiable)
    if not torch.compiler.is_compiling():
        given_tensor = isinstance(h.beta, Tensor) or isinstance(h.weight_decay, Tensor)
        if given_tensor and not h.differentiable:
            h = h._replace(beta=number(h.beta), weight_decay=number(h.weight_decay))
        beta = _TENSOR if isinstance(h.beta, Tensor) else h.beta
        decay = _TENSOR if isinstance(h.weight_decay, Tensor) else h.weight_decay
        _check_once(
            beta=beta,
            eps=h.eps,
            sigma=h.sigma,
            weight_decay=decay,
            rebound=h.rebound,
            warmup_steps=h.warmup_steps,
        )
    if h.rounding == "kahan":
        lists = replace(lists, compensations=_compensations(lists, describe))
    if torch.compiler.is_compiling():
        return lists, h
    if traced:
        for p, g in zip(lists.params, lists.grads, strict=True):
            if torch._is_functional_tensor(g) and not torch._is_functional_tensor(p):
                raise RuntimeError(
                    "torch.func.functionalize traces the gradient but not its parameter: give "
                    "parameters and state to the function as arguments, for apollo_qn.apollo"
                )
    if not h.capturable:
        if _is_captured(lists):
            raise RuntimeError(
                "capturable must be True where a step is captured in a CUDA graph: a replay "
                "repeats its numbers, got False"
            )
        key = torch._C._TorchDispatchModeKey
        modes = (key.PROXY, key.FAKE) if traced else ()
        if any(torch._C._get_dispatch_mode(mode) is not None for mode in modes):
            raise RuntimeError(
                "capturable must be True where a step is traced (make_fx, FakeTensorMode): its "
                "counters cannot be read on the host then, got False"
            )
        if isinstance(h.lr, Tensor):
            if h.lr.device.type != "cpu":
                raise ValueError(f"lr as a tensor on {h.lr.device} needs capturable=True")
            if not h.differentiable:
                h = h._replace(lr=h.lr.item())
    return lists, h


def check_length(
    name: str, column: Sequence[Any], params: Sequence[Any], what: str = "tensor"
) -> None:
    """Raise ValueError unless a list has one entry per parameter."""
    if len(column) != len(params):
        raise ValueError(
            f"{name} must have one {what} for each of the {len(params)} in params, "
            f"got {len(column)}"
        )


def _compensations(lists: TensorLists, describe: Describe) -> list[Tensor | None]:
    """Return the compensations of 16-bit parameters, None for others; empty if none is 16-bit."""
    narrow = [p.dtype in storage.NARROW for p in lists.params]
    if not any(narrow):
        return []
    check_length("compensations", lists.compensations, lists.params)
    found = [low if on else None for low, on in zip(lists.compensations, narrow, strict=True)]
    for p, low, on in zip(lists.params, found, narrow, strict=True):
        if on and (low is None or low.shape != p.shape or low.dtype is not p.dtype):
            what = None if low is None else f"shape {tuple(low.shape)} and {low.dtype}"
            raise ValueError(
                f"compensations must have, for {describe(p)}, this shape and the type {p.dtype}, "
                f"got {what}"
            )
    return found


def check_tensors(lists: TensorLists, describe: Describe) -> None:
    """Raise RuntimeError for gradients and shapes that no back end takes."""
    for p, g in zip(lists.params, lists.grads, strict=True):
        if g.device != p.device or g.is_complex() != p.is_complex():
            raise RuntimeError(
                f"a gradient is of type {g.dtype} on {g.device}, but belongs to {describe(p)} of "
                f"type {p.dtype} on {p.device}"
            )
        if is_sharded(g) and not is_sharded(p):
            raise RuntimeError(
                f"a gradient is a DTensor, but belongs to {describe(p)}, which is a plain tensor: "
                "distribute the parameter too, or give it the full gradient"
            )
        if 0 in p.stride() and any(
            s == 0 and n > 1 for s, n in zip(p.stride(), p.shape, strict=True)
        ):
            raise RuntimeError(
                f"Apollo cannot update {describe(p)}, whose elements share memory (it was made by "
                "expand()): give it memory of its own with clone()"
            )
        if g.is_sparse:
            raise RuntimeError(
                f"Apollo needs dense gradients, got a sparse one for {describe(p)}; build its "
                "embedding with sparse=False"
            )
    for p, step in zip(lists.params, lists.state_steps, strict=True):
        if not step.is_floating_point():
            raise RuntimeError(
                f"the step counter of {describe(p)} must be a floating tensor, got one of type "
                f"{step.dtype}; load_state_dict converts saved counters"
            )
    check_shapes(lists, describe)


def check_shapes(lists: TensorLists, describe: Describe) -> None:
    """Raise RuntimeError if a gradient or state tensor lacks its parameter's shape or device."""
    named = {"gradient": lists.grads, "exp_avg": lists.exp_avgs}
    for name, column in {**named, "hessian_diag": lists.hessian_diags}.items():
        for p, x in zip(lists.params, column, strict=True):
            if x.shape == p.shape and x.device == p.device:
                continue
            message = f"{name} has the shape {tuple(x.shape)}, but belongs to {describe(p)}"
            if x.shape == p.shape:
                message = f"{name} lies on {x.device}, but belongs to {describe(p)} on {p.device}"
            if name != "gradient":
                message += (
                    ": the parameter was moved, replaced, flattened or resharded after its state "
                    "had been made. Move the state by load_state_dict(state_dict()), make a new "
                    "optimizer, or put a state of the new shape in its place"
                )
            raise RuntimeError(message)


def _is_captured(lists: TensorLists) -> bool:
    return (
        bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        and any(p.is_cuda for p in lists.params)
        and torch.cuda.is_current_stream_capturing()
    )


def check_back_end_choice(foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Raise RuntimeError for combinations that no back end serves."""
    if foreach and fused:
        raise RuntimeError("foreach and fused cannot both be True: choose one, or None for both")
    if fused and differentiable:
        raise RuntimeError(
            "fused=True does not support differentiable=True; use fused=None or fused=False"
        )
    if fused and (reason := cpu.why_not()) is not None and not triton.available():
        raise RuntimeError(
            f"fused=True: {reason}; use fused=None for the fastest back end that there is"
        )
    if foreach and differentiable:
        raise RuntimeError(
            "foreach=True does not support differentiable=True; use foreach=None or foreach=False"
        )


def check_settings(given: dict[str, Any]) -> None:
    """Raise ValueError for the first invalid setting of a group."""
    numbers = dict(given)
    for name in ("lr", "beta", "weight_decay"):
        value = given[name]
        if not isinstance(value, Tensor):
            continue
        if name != "lr" and not given["differentiable"]:
            raise ValueError(f"{name} must be a number unless differentiable=True, got a tensor")
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{name} must be a tensor of one real element, got shape {tuple(value.shape)}"
            )
        numbers[name] = number(value)
    check_ranges(numbers)
    check_storage(given)
    check_back_end_choice(given["foreach"], given["fused"], given["differentiable"])


def check_storage(given: dict[str, Any], params: Iterable[Any] = ()) -> None:
    """Raise ValueError for a rounding, seed or state_dtype that is unknown or does not fit."""
    _check_once(rounding=given["rounding"], seed=given["seed"])
    chosen = dtype_name(given["state_dtype"])
    if chosen not in (None, "bfloat16"):
        raise ValueError(
            f"state_dtype must be None (float32 at least) or torch.bfloat16, got {chosen!r}"
        )
    if chosen is not None and any(isinstance(p, Tensor) and p.is_complex() for p in params):
        raise ValueError(f"state_dtype must be None for complex parameters, got {chosen}")
