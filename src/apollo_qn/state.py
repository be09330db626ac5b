"""Per-parameter state: creation, removal, and conversion to another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apollo_qn import rounding as storage
from apollo_qn.hyperparameters import Hyperparameters, warmup_start

TENSORS = ("exp_avg", "hessian_diag")
SCALARS = ("step", "previous_lr", "threshold")
_UNROUNDED = {torch.float32, torch.float64, torch.complex64, torch.complex128}
STATE_TYPES = {torch.bfloat16, *_UNROUNDED}  # of m and B


def state_dtype(p: Tensor) -> torch.dtype:
    """Return the default type of m and B: the parameter's type, float32 or wider."""
    return torch.promote_types(p.dtype, torch.float32)


def scalar_types(p: Tensor, capturable: bool) -> dict[str, dict[str, Any]]:
    """Return the device and the type of each scalar of a parameter's state."""
    # on the host even under torch.set_default_device, because the step reads them there
    device = p.device if capturable else torch.device("cpu")
    rate = torch.float64 if device.type == "cpu" else torch.float32
    return {
        "step": {"device": device, "dtype": torch.float32},
        "previous_lr": {"device": device, "dtype": rate},
        "threshold": {"device": p.device, "dtype": state_dtype(p).to_real()},
    }


def stored_dtype(found: torch.dtype, p: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Return the type to store m or B in; precision is only reduced if ``asked`` says so."""
    return torch.promote_types(found, state_dtype(p)) if asked is None else asked


def hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    """Return the settings of a parameter group for its next step."""
    lr, steps = group["lr"], group["warmup_steps"]
    return Hyperparameters(
        lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr,
        group["beta"],
        group["eps"],
        group["sigma"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        group["rebound"],
        steps,
        warmup_start(group["warmup_init_lr"], group["warmup_base_lr"]) if steps else 1.0,
        group["maximize"],
        group["rounding"] or storage.DEFAULT,
        group["foreach"],
        group["fused"],
        group["capturable"],
        group["differentiable"],
    )


def rate_of_next_step(group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> float:
    """Return the rate of a group's next step, for the parameters with the most steps done."""
    h, done = hyperparameters(group), 0.0
    if h.warmup_steps:  # otherwise no counter is needed, and none is waited for
        states = [state[p] for p in group["params"] if p in state]  # state may be a defaultdict
        steps = [each["step"] for each in states if "step" in each]
        done = max((float(step.max()) for step in _stacked(steps)), default=0.0)
    rate = h.rate(done)
    return float(rate.detach()) if isinstance(rate, Tensor) else float(rate)


def _stacked(scalars: list[Tensor]) -> list[Tensor]:
    """Return the scalars of each device as one tensor, so that each device is waited for once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for scalar in scalars:
        by_device.setdefault(scalar.device, []).append(scalar)
    return [torch.stack(each) for each in by_device.values()]


class NewState:
    """Record of the state that a step created or converted, so that a refused step can undo it."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []  # parameters that had no state before
        self.entries: list[tuple[dict[str, Any], str]] = []
        self.replaced: list[tuple[dict[str, Any], str, Tensor]] = []  # with the tensor from before

    def undo(self, state: Any) -> None:
        """Remove the created entries from ``state``, and put the replaced ones back."""
        for entries, name in self.entries:
            entries.pop(name, None)
        for entries, name, before in reversed(self.replaced):
            entries[name] = before
        for p in self.parameters:
            state.pop(p, None)


def add_missing_state(
    state: dict[str, Any], p: Tensor, group: dict[str, Any], new: NewState | None
) -> None:
    """Add the missing entries to a parameter's state; leave the others unchanged."""
    before, types = set(state), scalar_types(p, group["capturable"])
    if not before.issuperset(("step", *TENSORS)):
        if new is not None:
            new.replaced += [(state, n, state[n]) for n in ("step", *TENSORS) if n in before]
        state["step"] = torch.zeros((), **types["step"])
        dtype = _dtype(group["state_dtype"]) or state_dtype(p)
        for name in TENSORS:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if group["decoupled_weight_decay"] and "previous_lr" not in state:
        # the mode was turned on during training: assume that the rate has not changed
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        state["previous_lr"] = torch.zeros((), **types["previous_lr"])
        state["previous_lr"] += lr
    if group["rebound"] == "belief" and "threshold" not in state:
        state["threshold"] = torch.full((), group["sigma"], **types["threshold"])
    if new is not None:
        new.entries += [(state, name) for name in state.keys() - before]


def compensations_of(
    params: list[Tensor], states: list[dict[str, Any]], new: NewState | None
) -> list[Tensor | None]:
    """Return the compensation of each 16-bit parameter, None for others; create missing ones."""
    for p, state in zip(params, states, strict=True):
        low = state.get("compensation")
        if low is not None and low.dtype is not p.dtype:
            _remove_compensation(state, new)  # the parameter's type has changed
        if "compensation" not in state and p.dtype in storage.NARROW:
            with torch.inference_mode(False):
                state["compensation"] = torch.zeros_like(p)
            if new is not None:
                new.entries.append((state, "compensation"))
    return [state.get("compensation") for state in states]


def drop_compensation(state: dict[str, Any], new: NewState | None) -> None:
    """Remove the compensation of a parameter that has one.

    While a step is compiled (``new`` is None) set it to 0 instead, because the compiler has already
    made its guards on the entry.
    """
    if new is None:
        state["compensation"].zero_()
    else:
        _remove_compensation(state, new)


def _remove_compensation(state: dict[str, Any], new: NewState | None) -> None:
    before = state.pop("compensation")
    if new is not None:
        new.replaced.append((state, "compensation", before))


def follow_state_dtype(
    group: dict[str, Any],
    params: list[Tensor],
    states: list[dict[str, Any]],
    exp_avgs: list[Tensor],
    hessian_diags: list[Tensor],
    new: NewState | None,
) -> None:
    """Convert m and B where the group's ``state_dtype`` has changed since they were made."""
    asked = _dtype(group["state_dtype"])
    if {m.dtype for m in exp_avgs} <= (_UNROUNDED if asked is None else {asked}):
        return
    for p, state in zip(params, states, strict=True):
        for name in TENSORS:
            before = state[name]
            with torch.inference_mode(False):  # later steps may run outside of this mode
                state[name] = before.to(stored_dtype(before.dtype, p, asked))
            if new is not None and state[name] is not before:
                new.replaced.append((state, name, before))
    exp_avgs[:] = [state["exp_avg"] for state in states]
    hessian_diags[:] = [state["hessian_diag"] for state in states]


def dtype_name(dtype: Any) -> Any:
    """Return a state's type as a group stores it: a saved group holds no torch.dtype."""
    return "bfloat16" if dtype is torch.bfloat16 else dtype


def _dtype(name: str | None) -> torch.dtype | None:
    return torch.bfloat16 if name == "bfloat16" else None
