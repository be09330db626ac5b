"""Conversion of states of the authors' released optimizer.

There are three releases. The first (September 2020) has no key ``rebound``, the second (December
2020) has it; both fix sigma = 1. The third (August 2021, the main branch since) fixes sigma = 0.01.
The keys of the second and the third are equal, so sigma is computed from the stored direction.
A state that was saved before the first step is recognized by the keys of its groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from apollo_qn.hyperparameters import Hyperparameters

_SIGMAS = (1.0, 0.01)  # sigma of the first two releases, and of the third
_KEYS = ("lr", "beta", "eps", "weight_decay", "warmup", "init_lr", "base_lr")
_FOREIGN = {"warmup", "init_lr", "base_lr"}  # keys that no version of Apollo has
_CLOSE = 1e-3  # tolerance for the rounding of m / D, and of the decayed parameter in it
_Member = tuple[Any, dict[str, Any], Tensor]  # key, saved state and parameter


def translate(state_dict: StateDict, groups: list[dict[str, Any]]) -> StateDict:
    """Convert a state of the released optimizer to one of Apollo; return any other unchanged.

    Raises:
        ValueError: the state was trained with ``weight_decay_type="stable"``, which Apollo does not
            have, or its groups lack a key that the releases have; or it was saved before the first
            step and does not tell sigma.
    """
    states, saved_groups = state_dict["state"], state_dict["param_groups"]
    if not any("approx_hessian" in state for state in states.values()) and not any(
        _FOREIGN & set(saved) and "warmup_init_lr" not in saved for saved in saved_groups
    ):
        return state_dict
    settings = [_settings(saved) for saved in saved_groups]
    members = [
        [
            (key, states[key], p)
            for key, p in zip(saved["params"], group["params"], strict=True)
            if "approx_hessian" in states.get(key, {})
        ]
        for saved, group in zip(saved_groups, groups, strict=True)
    ]
    sigma = _sigma(settings, members, first="rebound" not in saved_groups[0])
    result: StateDict = {**state_dict, "param_groups": [], "state": dict(states)}
    for saved, group, own, found in zip(saved_groups, groups, settings, members, strict=True):
        own["sigma"] = sigma
        result["param_groups"].append({**group, **own, "params": saved["params"]})
        for key, state, p in found:
            result["state"][key] = _state(state, own, p)
    return result


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a saved group under Apollo's names, without sigma."""
    decay = saved.get("weight_decay_type", "L2")
    if decay not in ("L2", "decoupled"):
        raise ValueError(
            f"weight_decay_type must be 'L2' or 'decoupled' to be loaded here, got {decay!r}"
        )
    missing = [name for name in _KEYS if name not in saved]
    if missing:
        raise ValueError(
            f"a parameter group lacks {', '.join(map(repr, missing))}, which the authors' releases "
            f"have; it has {sorted(saved)}. If the state is of a port of their optimizer, add the "
            "missing settings to state_dict['param_groups'] before loading"
        )
    return {
        **{name: saved[name] for name in ("lr", "beta", "eps", "weight_decay")},
        **{name: saved[name] for name in ("initial_lr",) if name in saved},  # set by a scheduler
        "decoupled_weight_decay": decay == "decoupled",
        "rebound": saved.get("rebound", "constant"),
        "warmup_steps": saved["warmup"],
        "warmup_init_lr": saved["init_lr"],
        "warmup_base_lr": saved["base_lr"],
    }


def _hyperparameters(settings: dict[str, Any], sigma: float) -> Hyperparameters:
    return Hyperparameters(
        lr=float(settings["lr"]),
        beta=settings["beta"],
        eps=settings["eps"],
        sigma=sigma,
        weight_decay=settings["weight_decay"],
        decoupled_weight_decay=settings["decoupled_weight_decay"],
        rebound=settings["rebound"],
        warmup_steps=settings["warmup_steps"],
        warmup_start=settings["warmup_init_lr"] / settings["warmup_base_lr"],
        maximize=False,
    )


def _sigma(settings: list[dict[str, Any]], members: list[list[_Member]], first: bool) -> float:
    """Return the sigma of the release that saved the state; it is the same in all groups.

    D = m / d is max(|B|, sigma). If some D is below 1, sigma is 0.01. Otherwise, if some |B| is
    below 1, sigma is 1. If every |B| is above 1, both values of sigma give the same steps.

    Args:
        settings: settings of each group.
        members: parameters of each group that have a state.
        first: whether the release is the first one.
    """
    if first:
        return _SIGMAS[0]
    constant = [
        (own, found)
        for own, found in zip(settings, members, strict=True)
        if own["rebound"] == "constant"
    ]
    for own, found in constant:
        for _, state, p in found:
            for D, B in _denominators(state, own, p):
                if bool((D < 1 - _CLOSE).any()):
                    return _SIGMAS[1]
                if bool((B.abs() < 1 - _CLOSE).any()):
                    return _SIGMAS[0]
    if constant and not any(members):
        raise ValueError(
            "the state of the authors' release was saved before its first step, so that it does "
            f"not tell whether sigma was {_SIGMAS[0]:g} (release of December 2020) or "
            f"{_SIGMAS[1]:g} (since August 2021). It holds settings alone: make a new Apollo with "
            f"sigma, lr={constant[0][0]['lr']:g}, warmup_steps={constant[0][0]['warmup_steps']}, "
            f"warmup_init_lr={constant[0][0]['warmup_init_lr']:g} and the other settings of your "
            "training; docs/migrating.md has a table"
        )
    return _SIGMAS[1]


def _denominators(
    state: dict[str, Any], settings: dict[str, Any], p: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield D and B of those elements whose D follows from the stored direction."""
    h = _hyperparameters(settings, 1.0)
    d, m = _direction(state, h, p), state["exp_avg_grad"].double()
    known = (d != 0) & (m != 0)
    if bool(known.any()):
        yield (m[known] / d[known]).abs(), state["approx_hessian"].double()[known]


def _direction(state: dict[str, Any], h: Hyperparameters, p: Tensor) -> Tensor:
    """Return m / D of the last step: the stored direction without weight decay."""
    d: Tensor = state["update"].double()
    if h.decoupled:
        theta_before = p.detach().to(d) + _previous_lr(state, h) * d
        d = d - h.weight_decay * theta_before
    return d


def _previous_lr(state: dict[str, Any], h: Hyperparameters) -> float:
    return float(h.rate(max(int(state["step"]) - 1, 0)))


def _state(state: dict[str, Any], settings: dict[str, Any], p: Tensor) -> dict[str, Any]:
    m, B = state["exp_avg_grad"], state["approx_hessian"]
    h = _hyperparameters(settings, settings["sigma"])
    steps = int(state["step"])
    result = {"step": torch.tensor(float(steps)), "exp_avg": m, "hessian_diag": B}
    if h.decoupled_weight_decay:
        result["previous_lr"] = torch.tensor(_previous_lr(state, h), dtype=torch.float64)
    if h.belief:
        offset = float(h.offset(max(steps - 1, 0)))
        threshold = torch.zeros((), dtype=m.dtype, device=m.device)
        for D, _ in _denominators(state, settings, p):
            # the smallest D is max(min |B|, threshold) + offset, so this threshold gives the same D
            threshold = (D.min() - offset).clamp(min=0).to(m.dtype)
        result["threshold"] = threshold
    return result
