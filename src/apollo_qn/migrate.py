"""Conversion of states of the authors' released optimizer.

There are three releases. The first (September 2020) has no key ``rebound``, the second (December
2020) has it; both fix sigma = 1. The third (August 2021, the main branch since) fixes sigma = 0.01.
The keys of the second and the third are equal, so sigma is computed from the stored direction.
A state that was saved before the first step is recognized by the keys of its groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from apollo_qn.backends.base import Describe
from apollo_qn.hyperparameters import Hyperparameters, check_ranges, warmup_start
from apollo_qn.saved_entries import check_present, check_step, check_tensor
from apollo_qn.summary import parameter_name

_SIGMAS = (1.0, 0.01)  # sigma of the first two releases, and of the third
_KEYS = ("lr", "beta", "eps", "weight_decay", "warmup", "init_lr", "base_lr")
_FOREIGN = {"warmup", "init_lr", "base_lr"}  # keys that no version of Apollo has
_TENSORS = ("exp_avg_grad", "approx_hessian", "update")
_BELOW = 0.9  # a |B| below this share of a threshold is below it whatever the rounding
_Member = tuple[Any, dict[str, Any], Tensor]  # key, saved state and parameter


def translate(state_dict: StateDict, groups: list[dict[str, Any]]) -> StateDict:
    """Convert a state of the released optimizer to one of Apollo; return any other unchanged.

    Raises:
        ValueError: the state was trained with ``weight_decay_type="stable"``, which Apollo does not
            have; its groups or a parameter's state lack an entry of the releases, or have a wrong
            one; or it was saved before the first step and does not tell sigma.
    """
    states, saved_groups = state_dict["state"], state_dict["param_groups"]
    if not any(map(_is_released, states.values())) and not any(
        _FOREIGN & set(saved) and "warmup_init_lr" not in saved for saved in saved_groups
    ):
        return state_dict
    settings = [_settings(saved) for saved in saved_groups]
    members = [
        [
            (key, states[key], p)
            for key, p in zip(saved["params"], group["params"], strict=True)
            if _is_released(states.get(key))
        ]
        for saved, group in zip(saved_groups, groups, strict=True)
    ]
    for _, state, p in (member for found in members for member in found):
        _check_state(state, p, partial(parameter_name, groups))
    sigma = _sigma(settings, members, first="rebound" not in saved_groups[0])
    result: StateDict = {**state_dict, "param_groups": [], "state": dict(states)}
    for saved, group, own, found in zip(saved_groups, groups, settings, members, strict=True):
        own["sigma"] = sigma
        result["param_groups"].append({**group, **own, "params": saved["params"]})
        for key, state, p in found:
            result["state"][key] = _state(state, own, p)
    return result


def _is_released(state: Any) -> bool:
    """Return whether an entry of the saved state is a parameter's, as the releases save it."""
    return isinstance(state, Mapping) and ("approx_hessian" in state or "exp_avg_grad" in state)


def _check_state(state: dict[str, Any], p: Tensor, describe: Describe) -> None:
    """Raise ValueError if a parameter's state lacks an entry of the releases or has a wrong one."""
    check_present(("step", *_TENSORS), state, p, describe)
    check_step(state, p, describe)
    for name in _TENSORS:
        check_tensor(name, state[name], p, describe)
        dtype = state[name].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(
                f"{name} must be of a floating-point type, got {dtype} for {describe(p)}"
            )


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
    result = {
        **{name: _plain(saved[name]) for name in ("lr", "beta", "eps", "weight_decay")},
        **{name: saved[name] for name in ("initial_lr",) if name in saved},  # set by a scheduler
        "decoupled_weight_decay": decay == "decoupled",
        "rebound": saved.get("rebound", "constant"),
        "warmup_steps": saved["warmup"],
        "warmup_init_lr": _plain(saved["init_lr"]),
        "warmup_base_lr": _plain(saved["base_lr"]),
    }
    try:
        check_ranges({"lr": result["lr"]})
        check_ranges(result, lr="warmup_base_lr")
    except ValueError as error:
        raise ValueError(
            f"{error}, in a saved parameter group, whose 'warmup', 'init_lr' and 'base_lr' are "
            "called warmup_steps, warmup_init_lr and warmup_base_lr here; correct it in "
            "state_dict['param_groups'] before loading"
        ) from None
    return result


def _plain(x: Any) -> Any:
    """Return the number in a tensor of one element; anything else unchanged."""
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 else x


def _sigma(settings: list[dict[str, Any]], members: list[list[_Member]], first: bool) -> float:
    """Return the sigma of the release that saved the state; it is the same in all groups.

    The stored directions without weight decay are m / max(|B|, sigma), apart from rounding. Of both
    values of sigma, that with the smaller sum of squared errors is returned. If every |B| is at
    least 1, both give the same steps.

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
    errors = dict.fromkeys(_SIGMAS, 0.0)
    for own, found in constant:
        for _, state, p in found:
            last = _LastStep(state, own, p)
            telling = last.B.lt(_SIGMAS[0])  # the other elements have the same D for both
            direction = last.direction()
            for sigma in _SIGMAS:
                missed = direction - last.m / last.B.clamp(min=sigma)
                errors[sigma] += float(missed[telling].square().sum())
    if constant and not any(members):
        raise ValueError(
            "the state of the authors' release was saved before its first step, so that it does "
            f"not tell whether sigma was {_SIGMAS[0]:g} (release of December 2020) or "
            f"{_SIGMAS[1]:g} (since August 2021). It holds settings alone: make a new Apollo with "
            f"sigma, lr={constant[0][0]['lr']:g}, warmup_steps={constant[0][0]['warmup_steps']}, "
            f"warmup_init_lr={constant[0][0]['warmup_init_lr']:g} and the other settings of your "
            "training; docs/migrating.md has a table"
        )
    return _SIGMAS[0] if errors[_SIGMAS[0]] < errors[_SIGMAS[1]] else _SIGMAS[1]


class _LastStep:
    """The last step of a parameter as the releases store it, in float64.

    They store the update u = m / D + wd theta_before, and theta = theta_before - rate u. The rate
    is not stored: the group's may have been changed by a scheduler since.
    """

    def __init__(self, state: dict[str, Any], own: dict[str, Any], p: Tensor) -> None:
        self.update: Tensor = state["update"].double()
        self.m = state["exp_avg_grad"].to(self.update)
        self.B = state["approx_hessian"].to(self.update).abs()
        self.decay: float = own["weight_decay"] if own["decoupled_weight_decay"] else 0.0
        self.theta: Tensor = (
            p.detach().to(self.update) if self.decay else torch.zeros_like(self.update)
        )
        before = max(int(state["step"]) - 1, 0)
        h = _hyperparameters(own)
        # their warmup ignores schedulers
        warming = before < h.warmup_steps
        self.rate = float((h._replace(lr=own["warmup_base_lr"]) if warming else h).rate(before))
        self.offset = float(h.offset(before))
        epsilons = torch.finfo(state["update"].dtype).eps, torch.finfo(p.dtype).eps
        self._epsilons = epsilons[0], max(epsilons)

    def direction(self) -> Tensor:
        """Return m / D: the update without weight decay, if the rate was the group's."""
        return self.update - self.decay * (self.theta + self.rate * self.update)

    def rounding(self) -> Tensor:
        """Return a bound of the error of each element of ``direction`` and of m / D."""
        own, larger = self._epsilons
        return 2 * (own * self.update.abs() + larger * self.decay * self.theta.abs())

    def fitted_rate(self, D: Tensor) -> float:
        """Return the rate with which the update follows from m / D and the parameter.

        The group's rate is kept if it leaves rounding alone. It is kept too if no rate does: then
        the parameter is not the one that was trained.
        """
        if not self.decay:
            return self.rate
        u, missed = self.update.flatten(), (self.direction() - self.m / D).flatten()
        change = float(missed @ u / (self.decay * (u @ u)))  # least squares; NaN if u is 0
        left = (missed - change * self.decay * u).norm()
        fits = bool(left <= self.rounding().norm() < missed.norm())
        return max(self.rate + change, 0.0) if fits else self.rate

    def threshold(self) -> float:
        """Return the threshold of belief; 0 if no element tells it.

        D is max(|B|, threshold) + offset. So the smallest D tells the threshold, or that all |B|
        are above it. Elements whose direction is small beside weight decay do not count: their D is
        mostly rounding, or the error of a rate that a scheduler has changed.
        """
        d, m = self.direction().abs(), self.m.abs()
        share = d / (self.update.abs() + self.decay * self.theta.abs())
        known = (m != 0) & (d > self.rounding())
        if not bool(known.any()):
            return 0.0
        known &= share >= share[known].max() / 2
        smallest = (m / d)[known].min()
        # all elements with a |B| below the threshold have the same D: their mean is more precise
        equal = known & (self.B + self.offset < _BELOW * smallest)
        if bool(equal.any()):
            smallest = (m * d)[equal].sum() / d[equal].square().sum()
        return float((smallest - self.offset).clamp(min=0))


def _hyperparameters(own: dict[str, Any]) -> Hyperparameters:
    """Return the settings of a group, with any sigma."""
    return Hyperparameters(
        lr=own["lr"],
        beta=own["beta"],
        eps=own["eps"],
        sigma=1.0,
        weight_decay=own["weight_decay"],
        decoupled_weight_decay=own["decoupled_weight_decay"],
        rebound=own["rebound"],
        warmup_steps=own["warmup_steps"],
        warmup_start=warmup_start(own["warmup_init_lr"], own["warmup_base_lr"]),
        maximize=False,
    )


def _state(state: dict[str, Any], own: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Return the state of one parameter under Apollo's names."""
    result = {
        "step": float(int(state["step"])),
        "exp_avg": state["exp_avg_grad"],
        "hessian_diag": state["approx_hessian"],
    }
    last = _LastStep(state, own, p)
    belief = own["rebound"] == "belief"
    if belief:
        result["threshold"] = last.threshold()
    if own["decoupled_weight_decay"]:
        # with belief the threshold, and so D, is only known for a given rate
        rate = last.rate if belief else last.fitted_rate(last.B.clamp(min=own["sigma"]))
        result["previous_lr"] = rate
    return result
