"""Full state dicts of sharded models and optimizers, in a process group of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from apollo_bench.training import full_state_dict


def sharded_network() -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    network = nn.Linear(3, 4)
    for name, p in list(network.named_parameters()):
        setattr(network, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    return network


def stepped(network: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.usefixtures("single_process_group")
def test_a_saved_state_has_full_tensors_and_loads_as_shards() -> None:
    network = sharded_network()
    optimizer = stepped(network)
    assert full_state_dict.is_sharded(network)
    weights = full_state_dict.full_model_state(network)
    state = full_state_dict.full_optimizer_state(optimizer)
    held = [x for entries in state["state"].values() for x in entries.values()]
    assert not any(isinstance(x, DTensor) for x in [*weights.values(), *held])

    other = sharded_network()
    restored = torch.optim.AdamW(other.parameters(), lr=0.1)
    full_state_dict.load_model_state(other, weights)
    full_state_dict.load_optimizer_state(restored, state)
    for p in other.parameters():
        assert isinstance(restored.state[p]["exp_avg"], DTensor)
    torch.testing.assert_close(full_state_dict.full_model_state(other), weights)
    torch.testing.assert_close(full_state_dict.full_optimizer_state(restored), state)


def test_a_shard_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two processes holds half of a tensor; a checkpoint needs the full tensor."""

    class Shard0:
        def full_tensor(self) -> torch.Tensor:
            return torch.arange(4.0)

        def to_local(self) -> torch.Tensor:
            return torch.arange(2.0)

    class OneState:
        def state_dict(self) -> dict[str, object]:
            return {"state": {0: {"exp_avg": Shard0(), "step": 1}}}

    monkeypatch.setattr(full_state_dict, "_is_dtensor", lambda x: isinstance(x, Shard0))
    state = full_state_dict.full_optimizer_state(OneState())
    assert state["state"][0]["exp_avg"].tolist() == [0, 1, 2, 3]
