"""What the ranks do; each function is run by :func:`tests.distributed.ranks.on_ranks`."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from apollo_qn import Apollo, GradientRelease, apollo, diagnostics, distributed
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
    """Yield a list that holds the names of the collectives that the body has called, at its end."""
    calls: list[str] = []
    with torch.profiler.profile() as profile:
        yield calls
    calls += [event.name for event in profile.events() if event.name.startswith("c10d::")]


def full(x: Any) -> Tensor:
    tensor: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return tensor.detach()


def distance(x: Any, y: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    y = y.detach()
    return float((full(x) - y).abs().max() / y.abs().max().clamp(min=1e-30))


def placed(x: Tensor, mesh: Any, placements: Any) -> DTensor:
    return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)


def sharded_as_unsharded(dtype_name: str, steps_given: str = "50") -> None:
    """Trajectories of sharded tensors equal unsharded ones, per placement, mode and back end."""
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
                continue  # it is slow, and two modes suffice
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
                    assert torch.equal(full(q), p)
                    assert torch.equal(full(state["compensation"]), low)
                else:
                    assert 0 < float((full(q) - 1).abs().max()) < 2.0**-6
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
            assert torch.equal(full(spread[3]), alone[3])  # replicated


def nothing_changes_at_an_error() -> None:
    """An error about a plain parameter leaves its sharded neighbor unchanged, and vice versa."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def tensors() -> list[Any]:
        return [placed(torch.ones(4), mesh, [Shard(0)]), torch.ones(4)]

    counter = torch.zeros(())
    sharded, plain = tensors()
    with pytest.raises(RuntimeError, match="share a tensor of state_steps"):
        apollo([sharded, plain], tensors(), tensors(), tensors(), [counter, counter], fused=True)
    assert torch.equal(full(sharded), plain)
    assert counter == 0
    for back_end, which in itertools.product(BACK_ENDS.values(), range(2)):
        params = [nn.Parameter(x) for x in tensors()]
        optimizer = Apollo(params, seed=0, warmup_steps=0, **back_end)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        before = [full(p).clone() for p in params]
        optimizer.state[params[which]]["step"].fill_(float("nan"))
        with pytest.raises(RuntimeError, match="not a number"):
            optimizer.step()
        optimizer.state[params[which]]["step"].fill_(1.0)
        params[1].grad = torch.ones_like(params[0])
        with pytest.raises(RuntimeError, match=r"DTensor.*belongs to a parameter of shape \(4,\)"):
            optimizer.step()
        assert all(torch.equal(full(p), x) for p, x in zip(params, before, strict=True))


def indices_stay_few() -> None:
    """Their number does not grow with the subsets of tensors that have a gradient."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_CACHED_INDICES", 4)
        params = [nn.Parameter(placed(torch.ones(4), mesh, [Shard(0)])) for _ in range(6)]
        optimizer = Apollo(params, seed=0)
        for t in range(18):
            for i, p in enumerate(params):
                p.grad = None if i == t * t % 6 else torch.ones_like(p)
            optimizer.step()
            assert optimizer._backends is not None
            assert optimizer._backends.reduction is not None
            assert len(optimizer._backends.reduction._indices) <= 4


def _everywhere(x: Tensor) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return found


def one_all_reduce_per_mesh() -> None:
    """A step needs one all-reduce per mesh, for any number of tensors and groups."""
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
        found.append([full(p) for p in params])
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
    """Gradients of any placement are redistributed to the placement of their parameter."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gc.freeze()  # a collection then sees this function's objects alone, and takes no time
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
    gc.unfreeze()


def a_parameter_is_resharded() -> None:
    """The state keeps the old placements, which is an error, not a silently wrong step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(placed(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = Apollo([("w", p)], warmup_steps=0)
    p.grad = placed(torch.ones(4, 4), mesh, [Shard(0)])
    optimizer.step()
    q = nn.Parameter(p.detach().redistribute(mesh, [Shard(1)]))
    q.grad = placed(torch.ones(4, 4), mesh, [Shard(1)])
    optimizer.state[q] = optimizer.state.pop(p)
    optimizer.param_groups[0]["params"] = [q]
    with pytest.raises(RuntimeError, match=r"the parameter 'w'.*resharded after its state"):
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
    with pytest.raises(RuntimeError, match=r"the parameter 'w'.*must be sharded or replicated"):
        Apollo([("w", partial)]).step()
    assert torch.equal(full(p), torch.ones(8, 2))


def diagnostics_of_shards() -> None:
    """Every rank measures what one process measures of the full tensors.

    Replicas are not counted twice. Some ranks hold nothing of the smallest tensors, and one
    parameter is a plain tensor.
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
            # means and corrections have the error of the B that they are computed from
            assert other == pytest.approx(one, rel=tolerance, abs=tolerance * one["curvature_rms"])


def gradient_release() -> None:
    """DTensors and several processes are refused, also processes that join later."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    net = nn.Linear(3, 2)
    optimizer = Apollo(net.parameters())
    with pytest.raises(RuntimeError, match=r"cannot be used with 2 processes.*Distributed"):
        GradientRelease(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        # as if the process group were initialized later
        patch.setattr(dist, "is_initialized", lambda: False)
        with pytest.raises(RuntimeError, match=r"DTensor.*shape \(4, 3\)"):
            GradientRelease(Apollo([p]))
        GradientRelease(optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="cannot be used with 2 processes"):
        net(torch.ones(1, 3)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
