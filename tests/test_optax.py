"""The twin in JAX: the trajectory of the class, extreme numbers, and JAX's transformations."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# XLA's compiler takes most of the time and is fastest at this level; tests pass at every level
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import apollo_qn.optax  # noqa: E402
from apollo_qn import Apollo  # noqa: E402
from apollo_qn.optax import ApolloState, apollo, apollow  # noqa: E402
from tests import tolerances  # noqa: E402
from tests.helpers import Comparison, as_numpy, gradient, normal, parameters  # noqa: E402
from tests.test_algorithm import EXTREMES, of_scale  # noqa: E402

SHAPES = ((), (0,), (3, 5), (257,))
STEPS = 20

MODES: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "L2": {"weight_decay": 0.05},
    "decoupled": {"weight_decay": 0.05, "decoupled_weight_decay": True},
    "belief": {"rebound": "belief"},
    "belief, L2": {"rebound": "belief", "weight_decay": 0.05},
    "belief, decoupled": {
        "rebound": "belief",
        "weight_decay": 0.05,
        "decoupled_weight_decay": True,
    },
    "warmup from a rate": {"warmup_steps": 8, "warmup_init_lr": 0.02, "sigma": 0.5, "beta": 0.8},
}
ALL_MODES = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
SOME_MODES = pytest.mark.parametrize(
    "mode", [MODES["L2"], MODES["belief, decoupled"]], ids=["L2", "belief, decoupled"]
)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Run with float32, and with float64, which must be enabled in JAX."""
    jax.config.update("jax_enable_x64", request.param == torch.float64)
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def arrays(tensors: Any) -> list[Any]:
    return [jnp.asarray(x.detach().numpy()) for x in tensors]


def tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x))


def gradients(shapes: Any, dtype: torch.dtype, steps: int = STEPS) -> list[list[Tensor]]:
    return [
        [gradient(torch.Size(shape), dtype, i, t) for i, shape in enumerate(shapes)]
        for t in range(steps)
    ]


def stacked(steps: list[list[Tensor]]) -> list[Any]:
    """Return a list of leaves, whose first dimension is the step."""
    return [jnp.asarray(np.stack([g.numpy() for g in leaf])) for leaf in zip(*steps, strict=True)]


def trainer(tx: Any) -> Any:
    """Return a function from start and gradients to stacked parameters and states.

    It is one scan, so that no type may change.
    """

    def step(carry: Any, g: Any) -> Any:
        x, state = carry
        updates, state = tx.update(g, state, x)
        carry = optax.apply_updates(x, updates), state
        return carry, carry

    return jax.jit(lambda x, g: jax.lax.scan(step, (x, tx.init(x)), g)[1])


def train(tx: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    return trainer(tx)(params, grads)


def of_the_class(
    params: list[Any], steps: list[list[Tensor]], schedule: Any = None, **settings: Any
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Return theta, m and B of each parameter after each step of :class:`apollo_qn.Apollo`."""
    optimizer = Apollo(params, **settings, foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule or (lambda t: 1.0))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        scheduler.step()
        states = [optimizer.state[p] for p in params]
        yield [(p, s["exp_avg"], s["hessian_diag"]) for p, s in zip(params, states, strict=True)]


def compare(found: tuple[Any, ApolloState], wanted: Any, dtype: torch.dtype) -> None:
    """Compare :func:`train` with :func:`of_the_class` after each step."""
    comparison = Comparison()
    xs, states = jax.tree.map(np.asarray, found)
    narrow, wide = tolerances.TRAJECTORY[dtype], tolerances.TRAJECTORY_B[dtype]
    for t, step in enumerate(wanted):
        for i, (theta, m, B) in enumerate(step):
            for name, got, want, tolerance in (
                ("theta", xs, theta, narrow),
                ("m", states.exp_avg, m, narrow),
                ("B", states.hessian_diag, B, wide),
            ):
                found_one = tensor(got[i][t])
                assert found_one.dtype == want.dtype
                comparison.check((i, name), real(found_one), as_numpy(want), tolerance)
    assert int(states.count[-1]) == t + 1


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def renamed(settings: dict[str, Any]) -> dict[str, Any]:
    return {"learning_rate" if name == "lr" else name: x for name, x in settings.items()}


# the trajectory of the class


@ALL_MODES
def test_trajectory_is_that_of_the_class(mode: dict[str, Any], dtype: torch.dtype) -> None:
    # larger rates with belief and L2 make B of one element ill-conditioned, in the class too
    settings = {"lr": 0.1, "warmup_steps": 0, **mode}
    params = parameters(SHAPES, dtype)
    steps = gradients(SHAPES, dtype)
    found = train(apollo(**renamed(settings)), arrays(params), stacked(steps))
    compare(found, of_the_class(params, steps, **settings), dtype)


def test_schedule_and_warmup_multiply(dtype: torch.dtype) -> None:
    """A schedule of optax equals LambdaLR; the displacement uses the previous rates."""
    settings = {
        "warmup_steps": 6,
        "warmup_init_lr": 0.03,
        "weight_decay": 0.05,
        "decoupled_weight_decay": True,
    }
    shapes = ((3, 5), (40,))
    params, steps = parameters(shapes, dtype), gradients(shapes, dtype)
    tx = apollo(lambda t: 0.3 * jnp.power(0.9, t), **settings)
    found = train(tx, arrays(params), stacked(steps))
    compare(found, of_the_class(params, steps, lambda t: 0.9**t, lr=0.3, **settings), dtype)


@pytest.mark.parametrize(
    ("kind", "decoupled"), [("tree", False), ("prefix", True), ("function", True)]
)
def test_mask_is_a_group_without_decay(kind: str, decoupled: bool) -> None:
    shapes, dtype = ((3, 5), (40,), (7,)), torch.float32
    params, steps = parameters(shapes), gradients(shapes, dtype)
    settings = {"warmup_steps": 0, "decoupled_weight_decay": decoupled}
    mask: Any = {
        "tree": {"a": [True, False], "b": False},
        "prefix": {"a": True, "b": False},
        "function": lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    }[kind]
    decayed = params[:2] if kind == "prefix" else params[:1]
    rest = params[len(decayed) :]

    def tree(leaves: list[Any]) -> Any:
        return {"a": leaves[:2], "b": leaves[2]}

    tx = apollo(0.3, weight_decay=0.1, mask=mask, **settings)
    xs, states = train(tx, tree(arrays(params)), tree(stacked(steps)))
    listed = states._replace(
        exp_avg=[*states.exp_avg["a"], states.exp_avg["b"]],
        hessian_diag=[*states.hessian_diag["a"], states.hessian_diag["b"]],
    )
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest}]
    wanted = of_the_class(groups, steps, lr=0.3, **settings)
    compare(([*xs["a"], xs["b"]], listed), wanted, dtype)


def test_complex_leaf_is_a_real_one_of_pairs() -> None:
    dtype = torch.complex64
    for mode in (MODES["decoupled"], MODES["belief, L2"]):
        params, steps = parameters([(3, 5), ()], dtype), gradients([(3, 5), ()], dtype)
        settings = {"lr": 0.3, "warmup_steps": 0, **mode}
        found = train(apollo(**renamed(settings)), arrays(params), stacked(steps))
        compare(found, of_the_class(params, steps, **settings), torch.float32)


@SOME_MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_parameter(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """With a float32 state the parameter is rounded as in the class."""
    settings = {"lr": 0.3, "warmup_steps": 0, **mode}
    p = parameters([(40,)], dtype)[0]
    optimizer = Apollo([p], **settings)
    tx = apollo(**renamed(settings))
    as_jax = jnp.bfloat16 if dtype == torch.bfloat16 else jnp.float16
    x = jnp.asarray(p.detach().float().numpy(), as_jax)
    state, update = tx.init(x), jax.jit(tx.update)
    for t in range(4):
        x = jnp.asarray(p.detach().float().numpy(), as_jax)
        p.grad = gradient(p.shape, dtype, 0, t).clone()
        updates, state = update(jnp.asarray(p.grad.float().numpy(), as_jax), state, x)
        assert updates.dtype == as_jax
        assert state.exp_avg.dtype == state.hessian_diag.dtype == jnp.float32
        optimizer.step()
        got = tensor(optax.apply_updates(x, updates).astype(jnp.float32))
        largest = float(p.detach().abs().max())
        allowed = tolerances.ROUNDED_PARAMETER * torch.finfo(dtype).eps * largest
        assert float((got - p.detach().float()).abs().max()) <= allowed


def test_an_update_has_the_promoted_type_of_gradient_and_parameter() -> None:
    half, single = jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float32)
    tx = apollo(weight_decay=0.1)
    for g, x, wanted in [(half, half, "bfloat16"), (half, single, "float32")]:
        assert jax.eval_shape(tx.update, g, tx.init(x), x)[0].dtype == wanted
        assert jax.eval_shape(tx.update, x, tx.init(g), g)[0].dtype == wanted


# extreme numbers


@cache
def compiled(*args: Any, **settings: Any) -> Any:
    tx = apollo(*args, **settings)
    return tx.init, jax.jit(tx.update)


@pytest.mark.parametrize("rebound", ["constant", "belief"])
@pytest.mark.parametrize("scales", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_gradients(scales: list[float], rebound: str) -> None:
    """Float32 follows the class where squares and fourth powers exceed float32's range by far."""
    settings = {"warmup_steps": 0, "rebound": rebound}
    p = torch.nn.Parameter(normal((300,), "theta").float())
    gs = of_scale(scales, (300,))
    x = jnp.asarray(p.detach().numpy())
    init, update = compiled(0.1, **settings)
    state, comparison = init(x), Comparison()
    wanted = of_the_class([p], [[g] for g in gs], lr=0.1, **settings)
    for g, [(_, m, B)] in zip(gs, wanted, strict=True):
        _, state = update(jnp.asarray(g.numpy()), state, x)
        comparison.check("m", tensor(state.exp_avg), as_numpy(m), tolerances.EXTREME)
        comparison.check("B", tensor(state.hessian_diag), as_numpy(B), tolerances.EXTREME)


@ALL_MODES
def test_nothing_is_nan_or_infinite(mode: dict[str, Any]) -> None:
    eps = 1e-4 if mode.get("rebound") == "belief" else 0.0
    tx = apollo(**{"learning_rate": 0.1, "eps": eps, "warmup_steps": 2, **mode})
    update = jax.jit(tx.update)
    x = jnp.asarray(normal((40,), "theta").float().numpy())
    for scales in ([0.0] * 3, [1e30] * 4, [1e-30, 1e30, 1e30, 1.0, 0.0, 1e-38, 1e-44, 1e30]):
        state = tx.init(x)
        for g in of_scale(scales, (40,)):
            updates, state = update(jnp.asarray(g.numpy()), state, x)
            assert all(jnp.isfinite(y).all() for y in jax.tree.leaves((updates, state)))


def test_displacement_that_cannot_be_rebuilt() -> None:
    start, steps = arrays(parameters([(40,)])), stacked(gradients([(40,)], torch.float32))

    @jax.jit
    def trained(lr: Any, wd: Any) -> Any:
        return train(apollow(lr, weight_decay=wd, warmup_steps=0), start, steps)

    for lr, wd in [(1.0, 1.0), (0.5, 2.0), (0.1, 10.0), (1.0, 1.0 + 1e-7)]:
        xs, states = trained(lr, wd)
        assert all(jnp.isfinite(y).all() for y in jax.tree.leaves((xs, states)))
        assert jnp.abs(xs[0]).max() < 100


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_alpha_is_right_to_float32(beta: float) -> None:
    """Gradients of 1 give m = 1; a gradient that is 1 only at step t gives m = alpha."""
    alpha = apollo_qn.optax._alpha(beta)
    given = apollo_qn.optax._alpha(jnp.asarray(beta))
    for t in (0, 1, 2, 5, 17, 100, 2_000, 1_000_000):
        wanted = (1 - beta) / (-math.expm1((t + 1) * math.log(beta)) if beta else 1)
        got = float(alpha(jnp.asarray(t)))
        assert got == pytest.approx(wanted, rel=tolerances.JAX_ALPHA[beta < 0.9999])
        rounded = tolerances.JAX_ALPHA[True] / (1 - beta)
        injected = float(given(jnp.asarray(t)))
        assert injected == pytest.approx(wanted, rel=tolerances.JAX_ALPHA[False] + rounded)


# the paper


def test_theorem_1(x64: None) -> None:
    """(c lr, c sigma) gives the same trajectory: eps is divided by sigma."""
    steps = stacked(gradients([(3, 5), ()], torch.float64))
    start = arrays(parameters([(3, 5), ()], torch.float64))

    @jax.jit
    def trajectory(c: Any) -> Any:
        return train(apollo(0.3 * c, sigma=0.7 * c, warmup_steps=5, eps=0.1), start, steps)[0]

    wanted = trajectory(1.0)
    for c in (1e-3, 0.37, 2.0, 55.5):
        for got, want in zip(trajectory(c), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerances.THEOREM_1)
    assert float(jnp.abs(wanted[0][-1] - start[0]).max()) > 0.1


def test_state_is_two_arrays_and_scalars() -> None:
    x = jnp.ones((3, 5))
    for mode in MODES.values():
        state = jax.tree.leaves(apollo(**mode).init([x, x]))
        assert sum(y.shape == x.shape for y in state) == 4
        assert all(y.shape in ((), (2,)) for y in state if y.shape != x.shape)


# JAX


@ALL_MODES
def test_types_of_the_state_never_change(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """The types stay for arrays and for Python numbers, which JAX types weakly."""
    mixed = [1.0, jnp.ones(3, jnp.bfloat16), jnp.ones((), jnp.complex64), jnp.ones((0,))]
    tx = apollo(optax.constant_schedule(0.1), **mode)
    state = tx.init(mixed)
    for _ in range(2):
        updates, new = jax.eval_shape(tx.update, mixed, state, mixed)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert not a.weak_type
            assert not b.weak_type
        for g, u in zip(mixed, updates, strict=True):
            assert jnp.result_type(g) == u.dtype
        state = new


@SOME_MODES
def test_members_of_a_batch_are_leaves_of_their_own(mode: dict[str, Any]) -> None:
    run = trainer(apollo(0.3, warmup_steps=0, **mode))
    x, scales = arrays(parameters([(40,)]))[0], jnp.asarray([1.0, 100.0, 0.01])
    g = stacked(gradients([(40,)], torch.float32, 6))[0]
    together, _ = jax.vmap(lambda scale: run(x, scale * g))(scales)
    for found, scale in zip(together, scales, strict=True):
        wanted, _ = run(x, scale * g)
        largest = jnp.abs(wanted).max()
        assert jnp.abs(found - wanted).max() <= tolerances.TRAJECTORY[torch.float32] * largest


def test_eager_is_jit() -> None:
    tx = apollow(0.3, weight_decay=0.05, rebound="belief")
    x, steps = arrays(parameters([(3, 5)])), gradients([(3, 5)], torch.float32, 3)
    wanted = train(tx, x, stacked(steps))[0][0]
    state = tx.init(x)
    for g, want in zip(steps, wanted, strict=True):
        updates, state = tx.update(arrays(g), state, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(x[0], want, rtol=0, atol=tolerances.TRAJECTORY[torch.float32])


@pytest.mark.slow
def test_many_devices() -> None:
    """Sharded arrays work under jit, pmap and shard_map, in a process with eight devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    run = subprocess.run(
        [sys.executable, "-m", "tests.optax_devices"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@SOME_MODES
def test_derivative_through_a_training(mode: dict[str, Any], x64: None) -> None:
    """Derivatives by start, rate and a coefficient of the loss equal finite differences."""
    coefficients = jnp.asarray([1.0, 3.0, 0.3])

    def loss(x: Any, scale: Any) -> Any:
        return jnp.sum(scale * coefficients * (x - 2) ** 2 + 0.1 * x**3)

    def trained(v: Any) -> Any:
        x, rate, scale = v[:3], v[3], v[4]
        tx = apollo(**{"learning_rate": rate, "warmup_steps": 2, **mode})

        def step(carry: Any, _: None) -> Any:
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x, scale), state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=5)
        return loss(x, scale)

    v = jnp.asarray([0.5, -0.4, 0.1, 0.05, 1.1])
    found = jax.jit(jax.grad(trained))(v)
    value = jax.jit(trained)
    h = 1e-6
    relative, absolute = tolerances.DERIVATIVE
    for i in range(5):
        step = h * jnp.eye(5)[i]
        wanted = (value(v + step) - value(v - step)) / (2 * h)
        assert float(found[i]) == pytest.approx(float(wanted), rel=relative, abs=absolute)


@SOME_MODES
def test_derivative_is_finite_where_the_gradient_vanishes(mode: dict[str, Any]) -> None:
    eps = 1e-4 if mode.get("rebound") == "belief" else 0.0
    tx = apollo(**{"learning_rate": 0.1, "eps": eps, **mode})

    def trained(x: Any) -> Any:
        state = tx.init(x)
        for _ in range(3):
            updates, state = tx.update(2 * x, state, x)
            x = optax.apply_updates(x, updates)
        return jnp.sum(x)

    assert jnp.isfinite(jax.jit(jax.grad(trained))(jnp.zeros(3))).all()
