"""What a saved state must be, and how the authors' released optimizer's becomes one of ours."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from apollo_qn.rule import Hyperparameters
from apollo_qn.sharded import is_sharded, placed_as

TENSORS = ("exp_avg", "hessian_diag")
_SCALARS = ("previous_lr", "threshold")
# fixed in the authors' release, and in the first one, which had no ``rebound``
_RELEASED_SIGMA, _FIRST_SIGMA = 0.01, 1.0


def state_dtype(p: Tensor) -> torch.dtype:
    """Type of m and B where nothing else is asked for: the parameter's, float32 at least."""
    return torch.promote_types(p.dtype, torch.float32)


def stored_dtype(found: torch.dtype, p: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Type that m or B shall have, where it has one already: none is lost that was not asked."""
    return torch.promote_types(found, state_dtype(p)) if asked is None else asked


def _entries(
    state_dict: StateDict, groups: list[dict[str, Any]]
) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """Each parameter with its group and its part of the state, in the order of the groups."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        for key, p in zip(saved["params"], group["params"], strict=True):
            if key in state_dict["state"]:
                yield p, group, state_dict["state"][key]


def check(state_dict: StateDict, groups: list[dict[str, Any]]) -> None:
    """Raise ValueError where a state does not fit the parameters."""
    saved = state_dict["param_groups"]
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}"
        )
    for p, _, state in _entries(state_dict, groups):
        if not state:
            continue
        for name in (*TENSORS, "step"):
            if name not in state:
                raise ValueError(f"a parameter's state lacks {name!r}; it has {sorted(state)}")
        for name in (*TENSORS, "compensation"):
            if name not in state:
                continue
            if state[name].shape != p.shape:
                raise ValueError(
                    f"{name} must have its parameter's shape {tuple(p.shape)}, "
                    f"got {tuple(state[name].shape)}"
                )
            if is_sharded(state[name]) and not is_sharded(p):
                raise ValueError(
                    f"{name} must be a plain tensor as its parameter of shape {tuple(p.shape)} is, "
                    "got a DTensor; save a state of whole tensors, with get_optimizer_state_dict("
                    "..., options=StateDictOptions(full_state_dict=True)), or shard the parameter"
                )


def restore(
    state_dict: StateDict, groups: list[dict[str, Any]], state: MutableMapping[Tensor, Any]
) -> None:
    """Put the saved tensors into ``state`` in full precision.

    ``torch.optim.Optimizer.load_state_dict`` casts them to the parameter's type, which would round
    the float32 state of a bfloat16 parameter. A sharded parameter's may be saved whole.
    """
    for p, group, saved in _entries(state_dict, groups):
        home = p.device if group["capturable"] else torch.device("cpu")
        for name, value in saved.items():
            if not isinstance(value, Tensor):
                continue
            kept = value.detach().clone(memory_format=torch.preserve_format)
            if name in (*TENSORS, "compensation"):
                dtype = p.dtype
                if name in TENSORS:
                    dtype = stored_dtype(kept.dtype, p, group["state_dtype"])
                kept = kept.to(device=p.device, dtype=dtype)
                kept = placed_as(p, kept)
                layout = torch.empty_like(p, dtype=kept.dtype, memory_format=torch.preserve_format)
                kept = kept if kept.stride() == layout.stride() else layout.copy_(kept)
            elif name == "threshold":
                kept = kept.to(p.device)
            elif name in ("step", "previous_lr"):
                kept = kept.to(home)
            state[p][name] = kept


def translated(state_dict: StateDict, groups: list[dict[str, Any]]) -> StateDict:
    """A state of the released optimizer as one of ours; any other as it is.

    Raises:
        ValueError: it was trained with ``weight_decay_type="stable"``, which Apollo does not have.
    """
    states = state_dict["state"]
    if not any("approx_hessian" in s for s in states.values()):
        return state_dict
    saved_groups = [
        {**group, **_translated_group(saved), "params": saved["params"]}
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
    ]
    result: StateDict = {**state_dict, "param_groups": saved_groups, "state": dict(states)}
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, p in zip(saved["params"], group["params"], strict=True):
            if key in states and "approx_hessian" in states[key]:
                result["state"][key] = _translated_state(states[key], saved, p)
    return result


def _translated_group(saved: dict[str, Any]) -> dict[str, Any]:
    decay = saved.get("weight_decay_type", "L2")
    if decay not in ("L2", "decoupled"):
        raise ValueError(
            f"weight_decay_type must be 'L2' or 'decoupled' to be loaded here, got {decay!r}"
        )
    kept = {name: saved[name] for name in ("lr", "beta", "eps", "weight_decay")}
    return {
        **kept,
        **{k: saved[k] for k in ("initial_lr",) if k in saved},  # set by a scheduler
        "sigma": _RELEASED_SIGMA if "rebound" in saved else _FIRST_SIGMA,
        "decoupled_weight_decay": decay == "decoupled",
        "rebound": saved.get("rebound", "constant"),
        "warmup_steps": saved["warmup"],
        "warmup_init_lr": saved["init_lr"],
        "warmup_base_lr": saved["base_lr"],
    }


def _translated_state(state: dict[str, Any], group: dict[str, Any], p: Tensor) -> dict[str, Any]:
    m, B, displacement = (state[k] for k in ("exp_avg_grad", "approx_hessian", "update"))
    steps = int(state["step"])
    h = Hyperparameters(
        lr=float(group["lr"]),
        beta=group["beta"],
        eps=group["eps"],
        sigma=group["sigma"],
        weight_decay=group["weight_decay"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        rebound=group["rebound"],
        warmup_steps=group["warmup_steps"],
        warmup_start=group["warmup_init_lr"] / group["warmup_base_lr"],
        maximize=False,
    )
    result = {"step": torch.tensor(float(steps)), "exp_avg": m, "hessian_diag": B}
    previous_lr = float(h.rate(max(steps - 1, 0)))
    if h.decoupled_weight_decay:
        result["previous_lr"] = torch.tensor(previous_lr, dtype=torch.float64)
    if h.belief:
        d = displacement
        if h.decoupled:
            theta_before = p.detach().to(d) + previous_lr * d
            d = d - h.weight_decay * theta_before
        result["threshold"] = _threshold(m, B, d, float(h.offset(max(steps - 1, 0))))
    return result


def _threshold(m: Tensor, B: Tensor, d: Tensor, offset: float) -> Tensor:
    """The threshold r with d = m / (max(|B|, r) + offset), which the release does not store.

    The smallest D is max(min |B|, r) + offset, and a threshold of max(min |B|, r) gives the same D.
    """
    known = (d != 0) & (m != 0)
    if not bool(known.any()):
        return torch.zeros((), dtype=m.dtype, device=m.device)
    D = (m[known].double() / d[known].double()).abs()
    return (D.min() - offset).clamp(min=0).to(m.dtype)
