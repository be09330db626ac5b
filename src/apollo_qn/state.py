"""The state of a parameter: made where it is missing, converted where its type was changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apollo_qn import checkpoint
from apollo_qn import rounding as storage


class NewState:
    """The state that a step has made, to be removed where the step is refused."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []  # without any state before
        self.entries: list[tuple[dict[str, Any], str]] = []

    def remove(self, state: Any) -> None:
        """Remove all of it again."""
        for its, name in self.entries:
            its.pop(name, None)
        for p in self.parameters:
            state.pop(p, None)


def complete(state: dict[str, Any], p: Tensor, group: dict[str, Any], new: NewState | None) -> None:
    """Add to a parameter's state what is missing of it; other entries stay as they are."""
    before = set(state)
    if not before.issuperset(("step", *checkpoint.TENSORS)):
        state["step"] = _scalar(p, group["capturable"])
        dtype = _dtype(group["state_dtype"]) or checkpoint.state_dtype(p)
        for name in checkpoint.TENSORS:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if group["decoupled_weight_decay"] and "previous_lr" not in state:
        # the mode was chosen in mid-run: the rate of the step before is that of now
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        state["previous_lr"] = _scalar(p, group["capturable"], torch.float64)
        state["previous_lr"] += lr
    if group["rebound"] == "belief" and "threshold" not in state:
        real = checkpoint.state_dtype(p).to_real()
        state["threshold"] = torch.full((), group["sigma"], dtype=real, device=p.device)
    if new is not None:
        new.entries += [(state, name) for name in state.keys() - before]


def compensations_of(
    params: list[Tensor], states: list[dict[str, Any]], new: NewState | None
) -> list[Tensor | None]:
    """Return the compensation of each 16-bit parameter, made where it is missing; else None."""
    for p, state in zip(params, states, strict=True):
        low = state.get("compensation")
        if low is not None and low.dtype is not p.dtype:
            del state["compensation"]  # of what the parameter was before
        if "compensation" not in state and p.dtype in storage.NARROW:
            with torch.inference_mode(False):
                state["compensation"] = torch.zeros_like(p)
            if new is not None:
                new.entries.append((state, "compensation"))
    return [state.get("compensation") for state in states]


def follow_state_dtype(
    group: dict[str, Any],
    params: list[Tensor],
    states: list[dict[str, Any]],
    exp_avgs: list[Tensor],
    hessian_diags: list[Tensor],
) -> None:
    """Convert m and B where the group's ``state_dtype`` has changed since they were made."""
    asked = _dtype(group["state_dtype"])
    found = {m.dtype for m in exp_avgs}
    if all(dtype is asked or (asked is None and dtype.itemsize >= 4) for dtype in found):
        return
    for p, state in zip(params, states, strict=True):
        for name in checkpoint.TENSORS:
            dtype = checkpoint.stored_dtype(state[name].dtype, p, asked)
            state[name] = state[name].to(dtype)
    exp_avgs[:] = [state["exp_avg"] for state in states]
    hessian_diags[:] = [state["hessian_diag"] for state in states]


def _scalar(p: Tensor, capturable: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    if capturable and not p.is_cpu:
        return torch.zeros((), dtype=torch.float32, device=p.device)
    # whatever torch.set_default_device says: it is read on the host
    return torch.zeros((), dtype=dtype, device="cpu")


def _dtype(name: str | None) -> torch.dtype | None:
    return torch.bfloat16 if name == "bfloat16" else None
