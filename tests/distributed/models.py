"""Models that ranks train, save and load; :func:`tests.distributed.ranks.on_ranks` runs each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apollo_qn import Apollo
from tests import tolerances
from tests.distributed.work import distance
from tests.helpers import normal


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.last = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.last(x)
        return out


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    part: slice,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Train on batches of 8, of which this rank sees ``part``."""
    for t in steps:
        x, y = normal((8, 10), "x", t, dtype=torch.float32), normal((8, 3), t, dtype=torch.float32)
        optimizer.zero_grad()
        ((model(x[part]) - y[part]) ** 2).mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


SETTINGS: dict[str, Any] = {"weight_decay": 1e-2, "decoupled_weight_decay": True}
BEFORE, AFTER = range(3), range(3, 8)  # steps


def two_groups(model: nn.Module) -> Apollo:
    last = list(model.last.parameters())  # type: ignore[union-attr]
    layers = list(model.layers.parameters())  # type: ignore[union-attr]
    groups = [{"params": layers}, {"params": last, "lr": 0.02, "rebound": "belief"}]
    return Apollo(groups, seed=0, lr=0.05, warmup_steps=6, **SETTINGS)


def sharded_net() -> tuple[nn.Module, Apollo, torch.optim.lr_scheduler.LRScheduler]:
    model = net()
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return scheduled(model)


def scheduled(
    model: nn.Module,
) -> tuple[nn.Module, Apollo, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = two_groups(model)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


FORMS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


def save_checkpoints(folder: str) -> None:
    """Train for a while and save a checkpoint in each of ``FORMS``."""
    model, optimizer, schedule = sharded_net()
    train(model, optimizer, BEFORE, my_part(), schedule)
    for form, options in FORMS.items():
        state = {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            "schedule": schedule.state_dict(),
        }
        if form != "full":
            dcp.save(state, checkpoint_id=Path(folder) / form)
        elif dist.get_rank() == 0:
            torch.save(state, Path(folder) / "full.pt")


def load_checkpoints(folder: str) -> None:
    """Continue from every form of checkpoint as an uninterrupted process does."""
    alone, optimizer, schedule = scheduled(net())
    train(alone, optimizer, range(AFTER.stop), slice(None), schedule)
    for form, options in FORMS.items():
        model, resumed, schedule = sharded_net()
        if form == "full":
            state = torch.load(Path(folder) / "full.pt", weights_only=True)
        else:
            state = {
                "model": get_model_state_dict(model, options=options),
                "optimizer": get_optimizer_state_dict(model, resumed, options=options),
                "schedule": schedule.state_dict(),
            }
            dcp.load(state, checkpoint_id=Path(folder) / form)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, resumed, state["optimizer"], options=options)
        schedule.load_state_dict(state["schedule"])
        check_resumed(alone, optimizer, model, resumed, schedule, form)

    # full tensors, loaded by load_state_dict itself, whose keys are positions of parameters
    state = torch.load(Path(folder) / "full.pt", weights_only=True)
    model, resumed, schedule = sharded_net()
    set_model_state_dict(model, state["model"], options=FORMS["full"])
    saved = state["optimizer"]
    names = [name for group in saved["param_groups"] for name in group["params"]]
    numbered = {
        "state": {i: saved["state"][name] for i, name in enumerate(names)},
        "param_groups": [
            {**group, "params": [names.index(name) for name in group["params"]]}
            for group in saved["param_groups"]
        ],
    }
    resumed.load_state_dict(numbered)
    schedule.load_state_dict(state["schedule"])
    check_resumed(alone, optimizer, model, resumed, schedule, "load_state_dict")

    if dist.get_world_size() > 1:
        theirs, plain = resumed.state_dict(), two_groups(net())
        before = plain.state_dict()
        with pytest.raises(ValueError, match=r"exp_avg must be a plain tensor.*got a DTensor"):
            plain.load_state_dict(theirs)
        assert plain.state_dict() == before


def check_resumed(
    alone: nn.Module,
    optimizer: Apollo,
    model: nn.Module,
    resumed: Apollo,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    where: str,
) -> None:
    train(model, resumed, AFTER, my_part(), schedule)
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        found = distance(q, p.detach())
        assert found <= tolerances.TRAINED_APART, (where, found)
        one, other = optimizer.state[p], resumed.state[q]
        assert one.keys() == other.keys()
        for name in one:
            assert other[name].dtype == one[name].dtype
            # B takes differences of what is rounded
            worst = tolerances.TRAINED_APART * (100 if name == "hessian_diag" else 1)
            assert distance(other[name], one[name]) <= worst, (where, name)
    for one, other in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        for name in one.keys() - {"params"}:
            assert one[name] == other[name], (where, name)


def my_part() -> slice:
    size = 8 // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def wrapped() -> None:
    """DDP, ZeroRedundancyOptimizer, FSDP2 and HSDP train as one process does."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    settings: dict[str, Any] = {
        "lr": 0.05,
        "warmup_steps": 5,
        "weight_decay": 1e-2,
        "decoupled_weight_decay": True,
    }
    alone = net()
    train(alone, Apollo(alone.parameters(), seed=0, **settings), range(50), slice(None))

    world = dist.get_world_size()
    meshes = {
        "fsdp": init_device_mesh("cpu", (world,)),
        "hsdp": init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard")),
    }
    for way in ("ddp", "zero", "fsdp", "hsdp"):
        model: nn.Module = net()
        if way in meshes:
            for layer in model.layers:  # type: ignore[union-attr]
                fully_shard(layer, mesh=meshes[way])
            fully_shard(model, mesh=meshes[way])
            optimizer: torch.optim.Optimizer = Apollo(model.parameters(), seed=0, **settings)
        else:
            inner = model
            model = DistributedDataParallel(model)
            optimizer = (
                ZeroRedundancyOptimizer(inner.parameters(), Apollo, **settings)
                if way == "zero"
                else Apollo(inner.parameters(), seed=0, **settings)
            )
        train(model, optimizer, range(50), my_part())
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            found = distance(q, p.detach())
            assert found <= tolerances.TRAINED_APART, (way, found)


def batch_norm() -> None:
    """Outputs, gradients and running statistics equal those of one process with the full batch."""
    from apollo_bench.training.sync_batch_norm import convert_sync_batch_norm

    size = 8 // dist.get_world_size()
    whole_batch = normal((8, 3, 5, 4), "x").requires_grad_()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    part = whole_batch[mine].detach().requires_grad_()
    alone, spread = (nn.Sequential(nn.BatchNorm2d(3)).double() for _ in range(2))
    spread = convert_sync_batch_norm(spread, torch.device("cpu"))
    weights = normal((8, 3, 5, 4), "weights")
    for _ in range(2):
        one, other = alone(whole_batch), spread(part)
        assert distance(other, one[mine]) < 1e-14
        (one * weights).sum().backward()
        (other * weights[mine]).sum().backward()
    assert whole_batch.grad is not None
    assert part.grad is not None
    assert distance(part.grad, whole_batch.grad[mine]) < 1e-13
    for p, q in zip(alone.parameters(), spread.parameters(), strict=True):
        dist.all_reduce(q.grad)
        assert distance(q.grad, p.grad) < 1e-13
    for name, value in alone.state_dict().items():
        assert distance(spread.state_dict()[name].double(), value.double()) < 1e-14, name
    narrow = spread.to(torch.bfloat16)(part.detach().bfloat16())
    assert narrow.dtype == torch.bfloat16


def residual_network() -> None:
    """DDP with synchronized batch normalization trains as one process does."""
    from torch.nn.parallel import DistributedDataParallel

    from apollo_bench.training.sync_batch_norm import convert_sync_batch_norm
    from apollo_bench.workloads.image_classification.resnet import ResNet

    torch.manual_seed(1)
    alone = ResNet(blocks=1, width=2, in_channels=1, classes=10).double()
    spread: nn.Module = ResNet(blocks=1, width=2, in_channels=1, classes=10).double()
    spread.load_state_dict(alone.state_dict())
    spread = DistributedDataParallel(convert_sync_batch_norm(spread, torch.device("cpu")))
    size = 8 // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    for model, part in ((alone, slice(None)), (spread, mine)):
        optimizer = Apollo(model.parameters(), seed=0, lr=0.1, warmup_steps=0)
        for t in range(5):
            x, y = normal((8, 1, 12, 12), "x", t)[part], torch.arange(8)[part]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    for p, q in zip(alone.state_dict().values(), spread.state_dict().values(), strict=True):
        # rounding, 1e-16, grows a hundredfold per step
        assert distance(q.double(), p.double()) < 1e-9


def tensor_parallel() -> None:
    """FSDP2 over tensor parallelism: two meshes, some gradients partial or replicated."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    world = dist.get_world_size()
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    alone, model = net(), net()
    train(
        alone, Apollo(alone.parameters(), seed=0, lr=0.05, warmup_steps=5), range(50), slice(None)
    )
    plan: dict[str, Any] = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
    parallelize_module(model, grid["tensor"], plan)
    fully_shard(model, mesh=grid["data"])
    optimizer = Apollo(model.parameters(), seed=0, lr=0.05, warmup_steps=5)
    row, rows = grid.get_local_rank("data"), world // 2
    part = slice(row * 8 // rows, (row + 1) * 8 // rows)
    train(model, optimizer, range(50), part)
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        assert distance(q, p.detach()) <= tolerances.TRAINED_APART
