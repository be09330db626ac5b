"""What the ranks do; each function is run by :func:`tests.distributed.ranks.on_ranks`."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from apollo_qn import Apollo, GradientRelease, diagnostics
from tests import tolerances
from tests.helpers import gradient, normal

SHAPES = ((7, 5), (1, 3), (64,), (3, 401), (2, 3, 4, 5))
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2": {"weight_decay": 1e-2, "maximize": True},
    "decoupled": {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "belief": {"rebound": "belief"},
    "belief-decoupled": {
        "rebound": "belief",
        "weight_decay": 1e-2,
        "decoupled_weight_decay": True,
    },
}
BACK_ENDS: dict[str, dict[str, Any]] = {
    "rule": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": None},
}


@contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives that are called meanwhile, by name."""
    calls: list[str] = []
    with torch.profiler.profile() as profile:
        yield calls
    calls += [event.name for event in profile.events() if event.name.startswith("c10d::")]


def whole(x: Any) -> Tensor:
    full: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return full.detach()


def distance(x: Any, y: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    y = y.detach()
    return float((whole(x) - y).abs().max() / y.abs().max().clamp(min=1e-30))


def placed(x: Tensor, mesh: Any, placements: Any) -> DTensor:
    return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)


def sharded_as_whole(dtype_name: str, steps_given: str = "50") -> None:
    """Trajectories of sharded tensors, of every placement, mode and back end, equal whole ones."""
    dtype = getattr(torch, dtype_name)
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    layouts = [
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Shard(0), Shard(0)]),
        (line, [Replicate()]),
    ]
    chosen = [
        (shape, mesh, placements)
        for shape in SHAPES
        for mesh, placements in layouts
        if all(getattr(p, "dim", 0) < len(shape) for p in placements)
    ]
    steps = int(steps_given)
    gradients = [
        [gradient(torch.Size(shape), dtype, i, t) for t in range(steps)]
        for i, (shape, _, _) in enumerate(chosen)
    ]
    placed_gradients = [
        [placed(g, mesh, placements) for g in row]
        for row, (_, mesh, placements) in zip(gradients, chosen, strict=True)
    ]
    for mode, settings in MODES.items():
        for name, back_end in BACK_ENDS.items():
            if name == "rule" and mode not in ("l2", "belief-decoupled"):
                continue  # it is slow, and test_parts.py knows it
            alone = [
                nn.Parameter(normal(shape, "theta", i, dtype=dtype))
                for i, (shape, _, _) in enumerate(chosen)
            ]
            spread = [
                nn.Parameter(placed(p.detach(), mesh, placements))
                for p, (_, mesh, placements) in zip(alone, chosen, strict=True)
            ]
            optimizers = [
                Apollo(params, seed=0, lr=0.05, warmup_steps=5, **settings, **back_end)
                for params in (alone, spread)
            ]
            for t in range(steps):
                for i, (p, q) in enumerate(zip(alone, spread, strict=True)):
                    p.grad, q.grad = gradients[i][t], placed_gradients[i][t]
                for optimizer in optimizers:
                    optimizer.step()
            for i, (p, q) in enumerate(zip(alone, spread, strict=True)):
                states = [o.state[x] for o, x in zip(optimizers, (p, q), strict=True)]
                where = (mode, name, *chosen[i])
                assert distance(q, p) <= tolerances.SHARDED[dtype], where
                found = distance(states[1]["exp_avg"], states[0]["exp_avg"])
                assert found <= tolerances.SHARDED[dtype], (found, *where)
                found = distance(states[1]["hessian_diag"], states[0]["hessian_diag"])
                assert found <= tolerances.SHARDED_B[dtype], (found, *where)
                for scalar in ("step", "threshold", "previous_lr"):
                    assert torch.equal(
                        states[0].get(scalar, torch.zeros(())),
                        states[1].get(scalar, torch.zeros(())),
                    ), (scalar, *where)


def sixteen_bits() -> None:
    """Shards draw different bits, replicas the same; a compensated step equals the unsharded
    one."""
    world, rank = dist.get_world_size(), dist.get_rank()
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    line = init_device_mesh("cpu", (world,))
    layouts = [(grid, [Replicate(), Shard(0)]), (grid, [Shard(1), Shard(0)]), (line, [Shard(0)])]
    layouts.append((line, [Replicate()]))
    for back_end in BACK_ENDS.values():
        for rounding in ("stochastic", "kahan"):
            settings: dict[str, Any] = {"lr": 2.0**-9, "warmup_steps": 0, "rounding": rounding}
            settings["state_dtype"] = torch.bfloat16
            alone = [nn.Parameter(torch.ones(16, 32, dtype=torch.bfloat16)) for _ in layouts]
            spread = [
                nn.Parameter(placed(p.detach(), *layout))
                for p, layout in zip(alone, layouts, strict=True)
            ]
            optimizers = [
                Apollo(params, seed=0, **settings, **back_end) for params in (alone, spread)
            ]
            for _ in range(3):
                for p in (*alone, *spread):
                    p.grad = torch.ones_like(p)
                for optimizer in optimizers:
                    optimizer.step()
            for p, q in zip(alone, spread, strict=True):
                state = optimizers[1].state[q]
                assert state["hessian_diag"].dtype is torch.bfloat16
                if rounding == "kahan":
                    assert state["compensation"].placements == q.placements
                    low = optimizers[0].state[p]["compensation"]
                    assert torch.equal(whole(q), p)
                    assert torch.equal(whole(state["compensation"]), low)
                else:
                    assert 0 < float((whole(q) - 1).abs().max()) < 2.0**-6
            if rounding == "kahan":
                continue
            parts = [_everywhere(q.to_local().detach()) for q in spread]
            tensor, data = rank % (world // 2), rank // (world // 2)
            for other in range(world):
                replica = other % (world // 2) == tensor
                assert torch.equal(parts[0][rank], parts[0][other]) == replica
                both = other % (world // 2) == tensor and other // (world // 2) == data
                assert torch.equal(parts[1][rank], parts[1][other]) == both
                assert torch.equal(parts[2][rank], parts[2][other]) == (other == rank)
                assert torch.equal(parts[3][rank], parts[3][other])
            assert torch.equal(whole(spread[3]), alone[3])  # a replicated one is whole


def _everywhere(x: Tensor) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return found


def one_all_reduce_a_mesh() -> None:
    """However many tensors and groups there are, a step needs one all-reduce for each mesh."""
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    for settings in MODES.values():
        for meshes in ([line], [line, grid]):
            params = [
                nn.Parameter(
                    placed(normal((9, 4), i), mesh, [Shard(0)] + [Replicate()] * (mesh.ndim - 1))
                )
                for mesh in meshes
                for i in range(6)
            ]
            groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.5}]
            optimizer = Apollo(groups, seed=0, **settings)
            for _ in range(2):
                for p in params:
                    p.grad = torch.ones_like(p)
                with counted() as calls:
                    optimizer.step()
                assert calls == ["c10d::allreduce_"] * len(meshes), calls


def compiled() -> None:
    """torch.compile takes the step of sharded parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for compiling in (False, True):
        params = [nn.Parameter(placed(normal((6, 4), i), mesh, [Shard(0)])) for i in range(3)]
        optimizer = Apollo(params, seed=0, lr=0.1, warmup_steps=2)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiling else optimizer.step
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = placed(gradient(torch.Size((6, 4)), torch.float64, i, t), mesh, [Shard(0)])
            step()
        found.append([whole(p) for p in params])
    for one, other in zip(*found, strict=True):
        assert distance(other, one) <= tolerances.COMPILED


def extreme_values() -> None:
    """Sums over shards of very different sizes neither overflow nor vanish."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype, sizes in (
        (torch.float32, (1e-30, 1e-12, 1e12, 1e30)),
        (torch.float64, (1e-200, 1e-60, 1e60, 1e200)),
    ):
        for size in sizes:
            for back_end in BACK_ENDS.values():
                scale = torch.tensor([1.0, 1e-3, 1e-6, 1e3], dtype=dtype).unsqueeze(1) * size
                p = nn.Parameter(torch.zeros(4, 6, dtype=dtype))
                q = nn.Parameter(placed(p.detach(), mesh, [Shard(0)]))
                optimizers = [
                    Apollo([x], seed=0, lr=0.1, warmup_steps=0, **back_end) for x in (p, q)
                ]
                for t in range(4):
                    p.grad = gradient(p.shape, dtype, 0, t) * scale
                    q.grad = placed(p.grad, mesh, [Shard(0)])
                    for optimizer in optimizers:
                        optimizer.step()
                B = optimizers[0].state[p]["hessian_diag"]
                assert bool(B.isfinite().all())
                assert distance(q, p) <= tolerances.EXTREME, (dtype, size, back_end)
                found = distance(optimizers[1].state[q]["hessian_diag"], B)
                assert found <= tolerances.EXTREME, (dtype, size, back_end, found)


def gradients_placed_otherwise() -> None:
    """Whatever the placements of gradient and parameter: the redistributed gradient is held."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for n in (6, 3000):
        for of_p, of_g in itertools.product(
            (Shard(0), Shard(1), Replicate()), (Shard(0), Shard(1), Replicate(), Partial())
        ):
            for back_end in BACK_ENDS.values():
                p = nn.Parameter(normal((n, 16), "theta", dtype=torch.float32))
                q = nn.Parameter(placed(p.detach(), mesh, [of_p]))
                optimizers = [
                    Apollo([x], seed=0, lr=0.1, warmup_steps=0, **back_end) for x in (p, q)
                ]
                for t in range(2):
                    p.grad = gradient(p.shape, torch.float32, 0, t).clone()
                    if of_g.is_partial():
                        share = p.grad if dist.get_rank() == 0 else torch.zeros_like(p.grad)
                        q.grad = DTensor.from_local(share, mesh, [of_g])
                    else:
                        q.grad = placed(p.grad, mesh, [of_g])
                    for optimizer in optimizers:
                        optimizer.step()
                    gc.collect()
                found = distance(q, p)
                assert found <= tolerances.SHARDED[torch.float32], (n, of_p, of_g, back_end, found)


def a_parameter_is_resharded() -> None:
    """The state keeps the old placements, which is an error, not a silently wrong step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(placed(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = Apollo([p], warmup_steps=0)
    p.grad = placed(torch.ones(4, 4), mesh, [Shard(0)])
    optimizer.step()
    q = nn.Parameter(p.detach().redistribute(mesh, [Shard(1)]))
    q.grad = placed(torch.ones(4, 4), mesh, [Shard(1)])
    optimizer.state[q] = optimizer.state.pop(p)
    optimizer.param_groups[0]["params"] = [q]
    with pytest.raises(RuntimeError, match="resharded after its state had been made"):
        optimizer.step()


def refusals() -> None:
    """Unsupported parameters raise an error that names them; nothing is changed."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for use_orig_params in (False, True):
        flat = FullyShardedDataParallel(
            nn.Linear(4, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
            Apollo(flat.parameters())

    p = nn.Parameter(placed(torch.ones(8, 2), mesh, [Shard(0)]))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="differentiable=True does not support sharded"):
        Apollo([p], differentiable=True, foreach=False).step()
    partial = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(RuntimeError, match="must be sharded or replicated"):
        Apollo([partial]).step()
    assert torch.equal(whole(p), torch.ones(8, 2))


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
    """Steps on a batch of 8, of which this rank sees ``part``."""
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
    """Train for a while and save in every form."""
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
    """Go on from every form as one process does that never stopped."""
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

    # whole tensors given to load_state_dict itself, which numbers the parameters
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
    """Over all processes it is that of the whole batch: values, gradients, running statistics."""
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
    """DDP with it trains a network with batch normalisation as one process does."""
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
        assert distance(q.double(), p.double()) < 1e-9  # 1e-16 grows a hundredfold a step


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


def diagnostics_of_shards() -> None:
    """Every rank says of the whole tensors what one process says; replicas are not counted twice.

    Some ranks hold nothing of the smallest tensors, one parameter is a plain tensor.
    """
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    layouts = [
        (line, [Shard(0)]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(0), Shard(1)]),
        (line, [Replicate()]),
        (None, []),
    ]
    chosen = [(shape, *layout) for shape in ((7, 5), (1, 3), (3, 401)) for layout in layouts]
    for settings in MODES.values():
        found = []
        for sharded in (False, True):
            records: list[Any] = []
            params = [
                nn.Parameter(p if mesh is None or not sharded else placed(p, mesh, placements))
                for p, mesh, placements in (
                    (normal(shape, "theta", i), mesh, placements)
                    for i, (shape, mesh, placements) in enumerate(chosen)
                )
            ]
            groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.1}]
            optimizer = Apollo(groups, seed=0, lr=0.05, warmup_steps=2, **settings)
            with (
                diagnostics.Recorder(
                    optimizer, lambda _, one, records=records: records.append(one), every=3
                ),
                diagnostics.Recorder(optimizer, None, every=5),
            ):
                for t in range(6):
                    for i, (p, (shape, mesh, placements)) in enumerate(
                        zip(params, chosen, strict=True)
                    ):
                        g = gradient(torch.Size(shape), torch.float64, i, t)
                        p.grad = placed(g, mesh, placements) if mesh and sharded else g
                    optimizer.step()
            found.append([asdict(one) for record in records for one in record])
        alone, spread = found
        assert len(alone) == 2 * len(chosen)
        for one, other in zip(alone, spread, strict=True):
            assert other.pop("name") == one.pop("name")
            tolerance = tolerances.SHARDED_B[torch.float64]
            # means and corrections are as exact as the B's that they are of
            assert other == pytest.approx(one, rel=tolerance, abs=tolerance * one["curvature_rms"])


def gradient_release() -> None:
    """Refused: DTensors, and several processes whenever they came."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    net = nn.Linear(3, 2)
    optimizer = Apollo(net.parameters())
    with pytest.raises(RuntimeError, match=r"cannot be used with 2 processes.*Distributed"):
        GradientRelease(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        # as if the processes met only later
        patch.setattr(dist, "is_initialized", lambda: False)
        with pytest.raises(RuntimeError, match=r"DTensor.*shape \(4, 3\)"):
            GradientRelease(Apollo([p]))
        GradientRelease(optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="cannot be used with 2 processes"):
        net(torch.ones(1, 3)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
