"""Full state dicts; those of optimizers by hand, because checkpoints key them by position.

A checkpoint holds full tensors, however the run was sharded, so that it can be read anywhere.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

StateDict = dict[str, Any]


def is_sharded(network: nn.Module) -> bool:
    """Return whether parameters of the network are sharded over several processes."""
    return any(_is_dtensor(p) for p in network.parameters())


def full_model_state(network: nn.Module) -> StateDict:
    """Return the state dict with full tensors; every process must call this.

    Example:
        >>> network = nn.Linear(4, 2)
        >>> load_model_state(network, full_model_state(network))
    """
    if not is_sharded(network):
        return network.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))


def load_model_state(network: nn.Module, state: StateDict) -> None:
    """Load full tensors, a copy in every process, into a sharded or unsharded network.

    Args:
        network: the network, or its shards.
        state: what ``full_model_state`` returned for the same network.
    """
    if not is_sharded(network):
        network.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(network, dict(state), options=StateDictOptions(full_state_dict=True))


# Checkpoints key the state of an optimizer by the position of its parameter, as state_dict() does.
# torch.distributed.checkpoint takes names of parameters as keys. Before it loads, it also takes a
# step with zero gradients, which an optimizer of the user may refuse.


def full_optimizer_state(optimizer: Any) -> StateDict:
    """Return the optimizer's state dict with full tensors; every process must call this.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam(nn.Linear(4, 2).parameters())
        >>> load_optimizer_state(optimizer, full_optimizer_state(optimizer))
    """
    state: StateDict = _full(optimizer.state_dict())
    return state


def load_optimizer_state(optimizer: Any, state: StateDict) -> None:
    """Load a full state dict into an optimizer, or Fabric's wrapper of one.

    Args:
        optimizer: of parameters with the same shapes in the same order.
        state: what ``full_optimizer_state`` returned.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        index: {
            name: _shard_like(params[index], x)
            if isinstance(x, Tensor) and x.shape == params[index].shape and x.dim()
            else x
            for name, x in entries.items()
        }
        for index, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


def _full(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _full(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_full(value) for value in state)
    return state.full_tensor() if _is_dtensor(state) else state


def _shard_like(like: Any, value: Any) -> Any:
    if not _is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    # every process cuts its shard out of its own copy
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _is_dtensor(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
