"""Apollo in JAX on eight devices: run by :mod:`tests.test_optax` in a separate process.

XLA_FLAGS must hold --xla_force_host_platform_device_count=8 before JAX starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apollo_qn.optax import ApolloState, apollo
from tests import tolerances
from tests.helpers import Comparison, gradient, normal

STEPS = 5
# leaf: shape, and the axes of the mesh along which its dimensions are divided
LEAVES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((16, 24), ("a",)),
    "both": ((8, 40), ("b", "a")),
    "flat": ((24,), (("a", "b"),)),
    "whole": ((3, 5), ()),
}
L2: dict[str, Any] = {"weight_decay": 0.05}
DECOUPLED_BELIEF: dict[str, Any] = {
    "weight_decay": 0.05,
    "decoupled_weight_decay": True,
    "rebound": "belief",
    "warmup_init_lr": 0.01,
}

Tree = dict[str, Any]


def parameters() -> Tree:
    return {
        name: normal(shape, name, dtype=torch.float32).numpy()
        for name, (shape, _) in LEAVES.items()
    }


def gradients(t: int) -> Tree:
    return {
        name: gradient(torch.Size(shape), torch.float32, i, t).numpy()
        for i, (name, (shape, _)) in enumerate(LEAVES.items())
    }


def on_one_device(tx: optax.GradientTransformation) -> Iterator[tuple[Tree, ApolloState]]:
    x = parameters()
    state = tx.init(x)
    step = jax.jit(stepper(tx))
    for t in range(STEPS):
        x, state = step(x, state, gradients(t))
        yield x, state


def stepper(tx: optax.GradientTransformation) -> Any:
    def step(x: Tree, state: ApolloState, g: Tree) -> tuple[Tree, ApolloState]:
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    return step


def sharded(tx: optax.GradientTransformation) -> Iterator[tuple[Tree, ApolloState]]:
    """Train with each leaf and its state divided over a mesh of 4 x 2 devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    places = {name: NamedSharding(mesh, PartitionSpec(*axes)) for name, (_, axes) in LEAVES.items()}
    x = jax.device_put(parameters(), places)
    state = tx.init(x)
    step = jax.jit(stepper(tx))
    for t in range(STEPS):
        x, state = step(x, state, jax.device_put(gradients(t), places))
        for name, place in places.items():
            for array in (x[name], state.exp_avg[name], state.hessian_diag[name]):
                assert array.sharding.is_equivalent_to(place, array.ndim), (name, array.sharding)
        yield x, state


def replicated(tx: optax.GradientTransformation) -> Iterator[tuple[Tree, ApolloState]]:
    """``pmap``: every device has the parameters and its own gradient."""

    def step(x: Tree, state: ApolloState, g: Tree) -> tuple[Tree, ApolloState]:
        return stepper(tx)(x, state, jax.lax.pmean(g, "devices"))

    def on_all(tree: Any) -> Any:
        return jax.tree.map(lambda x: np.stack([x] * 8), tree)

    x, state = on_all(parameters()), on_all(tx.init(parameters()))
    mapped = jax.pmap(step, axis_name="devices")
    for t in range(STEPS):
        x, state = mapped(x, state, apart(gradients(t)))
        found = jax.tree.map(np.asarray, (x, state))
        for array in jax.tree.leaves(found):
            assert (array == array[:1]).all()  # the devices do not drift apart
        yield jax.tree.map(lambda array: array[0], found)


def mapped_over_shards(tx: optax.GradientTransformation) -> Iterator[tuple[Tree, ApolloState]]:
    """``shard_map``: the same, where the batch of gradients is divided over the devices."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))

    def step(x: Tree, state: ApolloState, g: Tree) -> tuple[Tree, ApolloState]:
        own = jax.tree.map(lambda array: array[0], g)
        return stepper(tx)(x, state, jax.lax.pmean(own, "devices"))

    everywhere, divided = PartitionSpec(), PartitionSpec("devices")
    mapped = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(everywhere, everywhere, divided),
            out_specs=(everywhere, everywhere),
        )
    )
    x = parameters()
    state = tx.init(x)
    for t in range(STEPS):
        x, state = mapped(x, state, apart(gradients(t)))
        yield x, state


def apart(g: Tree) -> Tree:
    """Return a gradient per device, for eight devices, whose mean is exactly ``g``."""
    return jax.tree.map(lambda x: np.stack([2 * x, 0 * x] * 4), g)


def check(mode: dict[str, Any], ways: list[Any]) -> None:
    """Check that every step equals that on one device."""
    tx = apollo(0.3, warmup_steps=3, **mode)
    wanted = list(on_one_device(tx))
    for way in ways:
        compare(way, list(way(tx)), wanted)


def compare(way: Any, found: Any, wanted: Any) -> None:
    comparison = Comparison()
    for t, ((x, state), (one, other)) in enumerate(zip(found, wanted, strict=True)):
        assert int(state.count) == t + 1
        for what, of_all, of_one, tolerance in (
            ("theta", x, one, tolerances.SHARDED),
            ("m", state.exp_avg, other.exp_avg, tolerances.SHARDED),
            ("B", state.hessian_diag, other.hessian_diag, tolerances.SHARDED_B),
        ):
            for name in LEAVES:
                got = torch.from_numpy(np.array(of_all[name]))
                want = np.asarray(of_one[name], np.float64)
                comparison.check((way.__name__, name, what), got, want, tolerance[torch.float32])


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    check(L2, [sharded])
    check(DECOUPLED_BELIEF, [sharded, replicated, mapped_over_shards])
