"""Weights and optimizer states of sharded models as whole tensors, and back.

A checkpoint holds whole tensors whatever the run was trained on, so that it can be read anywhere.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

State = dict[str, Any]


def is_sharded(network: nn.Module) -> bool:
    """Whether its parameters lie in parts on several processes."""
    return any(_is_sharded(p) for p in network.parameters())


def gathered(state: Any) -> Any:
    """The same nested state with whole tensors; all processes must call it."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    return state.full_tensor() if _is_sharded(state) else state


def load_weights(network: nn.Module, state: State) -> None:
    """Load whole tensors, of which every process has a copy."""
    own = network.state_dict()
    network.load_state_dict({name: _as(own.get(name), value) for name, value in state.items()})


def load_optimizer(optimizer: Any, state: State) -> None:
    """Likewise, into an optimizer (or Fabric's form of one) of the same parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        number: {
            name: _as(params[number], x)
            if isinstance(x, Tensor) and x.shape == params[number].shape and x.dim()
            else x
            for name, x in entries.items()
        }
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _as(like: Any, value: Any) -> Any:
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    # every process cuts its part out of its own copy
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _is_sharded(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
