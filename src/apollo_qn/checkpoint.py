"""Saved states: checks before a state is loaded, and restoring its tensors."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from apollo_qn import migrate
from apollo_qn.advice import check_origin
from apollo_qn.backends.base import Describe
from apollo_qn.distributed import is_sharded, place_like
from apollo_qn.saved_entries import check_present, check_scalar, check_step, check_tensor
from apollo_qn.state import SCALARS, TENSORS, scalar_types, stored_dtype
from apollo_qn.summary import parameter_name

_STORAGE = ("rounding", "state_dtype", "seed")
# entries that a state has with one value of a setting
_OF_SETTINGS = {"previous_lr": ("decoupled_weight_decay", True), "threshold": ("rebound", "belief")}


def prepare(state_dict: StateDict, groups: list[dict[str, Any]]) -> StateDict:
    """Convert a saved state to the current form and check it against the parameters.

    Args:
        state_dict: state of any version of this optimizer, or of the authors' released optimizer.
        groups: parameter groups to load the state into.

    Raises:
        ValueError: the state does not fit the groups, or is one of another optimizer.
    """
    check_origin(state_dict)
    sizes = [[len(g["params"]) for g in each] for each in (state_dict["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}: "
            "make the optimizer with the groups that were saved"
        )
    result = {**migrate.translate(state_dict, groups)}
    saved_groups = []
    for saved, group in zip(result["param_groups"], groups, strict=True):
        # settings of storage that the state lacks stay those of the group
        settings = {**{name: group[name] for name in _STORAGE}, **saved}
        if settings["state_dtype"] is torch.bfloat16:  # earlier versions saved the type itself
            settings["state_dtype"] = "bfloat16"
        saved_groups.append(settings)
    result["param_groups"] = saved_groups
    for p, saved, _, state in _entries(result, groups):
        _check(p, state, saved, partial(parameter_name, groups))
    return result


def _entries(
    state_dict: StateDict, groups: list[dict[str, Any]]
) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield each parameter, the saved and the present form of its group, and its saved state."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        for key, p in zip(saved["params"], group["params"], strict=True):
            if key in state_dict["state"]:
                yield p, saved, group, state_dict["state"][key]


def _check(p: Tensor, state: dict[str, Any], group: dict[str, Any], describe: Describe) -> None:
    """Raise ValueError if a saved state does not fit its parameter or the settings of its group."""
    for name in SCALARS:
        check_scalar(name, state.get(name, 0), p, describe)
    needed = ("step", *TENSORS)
    if not any(name in state for name in needed):
        return  # no state of Apollo
    check_present(needed, state, p, describe)
    check_step(state, p, describe)
    for name, (setting, value) in _OF_SETTINGS.items():
        if name not in state and group.get(setting) == value:
            raise ValueError(
                f"the saved state of {describe(p)} lacks {name!r}, which {setting}={value!r} of "
                "its group needs: make the optimizer with this setting before torch.distributed."
                "checkpoint loads its state, and change a setting after loading"
            )
    for name in (*TENSORS, "compensation"):
        if name not in state:
            continue
        check_tensor(name, state[name], p, describe)
        if is_sharded(state[name]) and not is_sharded(p):
            raise ValueError(
                f"{name} must be a plain tensor as {describe(p)} is, got a DTensor; save a state "
                "of full tensors, with get_optimizer_state_dict(..., options=StateDictOptions("
                "full_state_dict=True)), or shard the parameter"
            )


def restore(
    state_dict: StateDict, groups: list[dict[str, Any]], state: MutableMapping[Tensor, Any]
) -> None:
    """Put the saved tensors into ``state`` in full precision.

    ``torch.optim.Optimizer.load_state_dict`` casts them to the parameter's type, which would round
    the float32 state of a bfloat16 parameter. The saved state of a sharded parameter may be a full
    tensor. Entries that are not Apollo's stay as torch has loaded them.
    """
    with torch.inference_mode(False):  # later steps may run outside of this mode
        for p, _, group, saved in _entries(state_dict, groups):
            for name, types in scalar_types(p, group["capturable"]).items():
                if name in saved:
                    state[p][name] = _scalar(saved[name]).to(**types)
            for name in (*TENSORS, "compensation"):
                if name in saved:
                    state[p][name] = _restored(saved[name], p, group, name)


def _scalar(value: float | Tensor) -> Tensor:
    """Return a copy of a saved scalar as a 0-dim tensor."""
    if isinstance(value, Tensor):
        return value.detach().clone().reshape(())
    # neither the default type, which may be bfloat16, nor the default device
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _restored(value: Tensor, p: Tensor, group: dict[str, Any], name: str) -> Tensor:
    dtype = p.dtype
    if name in TENSORS:
        asked = torch.bfloat16 if group["state_dtype"] == "bfloat16" else None
        dtype = stored_dtype(value.dtype, p, asked)
    kept = value.detach().clone(memory_format=torch.preserve_format)
    kept = place_like(p, kept.to(device=p.device, dtype=dtype))
    layout = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    return kept if kept.stride() == layout.stride() else layout.copy_(kept)
