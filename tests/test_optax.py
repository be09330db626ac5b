"""The twin in JAX: the trajectory of the class, and all that optax wraps around it."""

from __future__ import annotations

import doctest
import inspect
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# the tests pass at every level; most of their time is XLA's, and it compiles faster at this one
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import apollo_qn.optax  # noqa: E402
from apollo_qn import Apollo, LearningRateWarning, advice  # noqa: E402
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
    """Both types of arithmetic; JAX has float64 only where that is enabled."""
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
    """A list of leaves, whose first dimension is the step."""
    return [jnp.asarray(np.stack([g.numpy() for g in leaf])) for leaf in zip(*steps, strict=True)]


def trainer(tx: Any) -> Any:
    """Parameters and state after each step, stacked, as a function of start and gradients.

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
    """theta, m and B of each parameter after each step of :class:`apollo_qn.Apollo`."""
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
    """What :func:`train` made of lists against :func:`of_the_class`, after each step."""
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
    """LambdaLR here, a function of the count there; the displacement knows the rates before."""
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
    """State in float32 and a parameter rounded as the class rounds it, from the same parameter."""
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


def test_update_has_the_type_that_gradient_and_parameter_have_together() -> None:
    half, single = jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float32)
    tx = apollo(weight_decay=0.1)
    for g, x, wanted in [(half, half, "bfloat16"), (half, single, "float32")]:
        assert jax.eval_shape(tx.update, g, tx.init(x), x)[0].dtype == wanted
        assert jax.eval_shape(tx.update, x, tx.init(g), g)[0].dtype == wanted


# numbers at the ends of their range


@cache
def compiled(*args: Any, **settings: Any) -> Any:
    tx = apollo(*args, **settings)
    return tx.init, jax.jit(tx.update)


@pytest.mark.parametrize("rebound", ["constant", "belief"])
@pytest.mark.parametrize("scales", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_gradients(scales: list[float], rebound: str) -> None:
    """Float32 follows the class where squares and fourth powers leave float32 by far."""
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
    """m of a gradient that is 1 from step 0 on is 1; of one that is 1 at step t alone, alpha."""
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
    """Neither of arrays, nor of Python numbers, whose type is weak."""
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
    """Sharded arrays under jit, pmap and shard_map: in a process with eight devices."""
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
    """With respect to start, rate and a coefficient of the loss: as finite differences say."""
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


# optax


def start_and_gradients(dtype: torch.dtype) -> tuple[Any, Any]:
    as_jax = jnp.float32 if dtype == torch.float32 else jnp.bfloat16
    x, g = normal((3, 5), "theta"), normal((4, 3, 5), "g")
    return jnp.asarray(x.numpy(), as_jax), jnp.asarray(g.numpy(), as_jax)


@SOME_MODES
def test_hyperparameters_can_be_injected(mode: dict[str, Any]) -> None:
    """All are arrays, even the number of steps; the rate is changed during the run."""
    settings = {"warmup_steps": 4, "warmup_init_lr": 0.01, **mode}
    tx = optax.inject_hyperparams(apollo)(0.3, **settings)
    [p], steps = parameters([(3, 5)]), gradients([(3, 5)], torch.float32, 8)
    optimizer = Apollo([p], lr=0.3, **settings)
    x = jnp.asarray(p.detach().numpy())
    state, update, comparison = tx.init(x), jax.jit(tx.update), Comparison()
    assert {"learning_rate", "beta", "eps", "sigma", "weight_decay", "warmup_steps"} < set(
        state.hyperparams
    )
    for t, [g] in enumerate(steps):
        if t in (2, 6):
            state.hyperparams["learning_rate"] = jnp.asarray(0.1 * t)
            optimizer.param_groups[0]["lr"] = 0.1 * t
        updates, state = update(jnp.asarray(g.numpy()), state, x)
        x = optax.apply_updates(x, updates)
        p.grad = g.clone()
        optimizer.step()
        # beta itself is rounded: as the class's alpha is with capturable
        tolerance = tolerances.CAPTURABLE[torch.float32]
        comparison.check("theta", tensor(x), as_numpy(p), tolerance)


def test_schedules_of_other_hyperparameters_are_injected() -> None:
    tx = optax.inject_hyperparams(apollo)(
        learning_rate=optax.linear_schedule(0.0, 0.3, 4),
        weight_decay=optax.linear_schedule(0.1, 0.0, 4),
        warmup_steps=0,
    )
    x = jnp.ones(3)
    update = jax.jit(tx.update)
    first, state = update(jnp.ones(3), tx.init(x), x)
    assert not first.any()
    second, state = update(jnp.ones(3), state, x)
    assert (second < 0).all()
    assert float(state.hyperparams["weight_decay"]) == pytest.approx(
        0.075, rel=tolerances.CAPTURED_RATE
    )


def test_many_rates_are_tried_at_once() -> None:
    """vmap over hyperparameters."""
    x, g = arrays(parameters([(40,)])), stacked(gradients([(40,)], torch.float32, 5))

    @jax.jit
    def end(rate: Any, sigma: Any) -> Any:
        return train(apollo(rate, sigma=sigma, warmup_steps=2), x, g)[0][0][-1]

    rates, sigmas = jnp.asarray([0.1, 0.3, 1.0]), jnp.asarray([1.0, 0.5, 2.0])
    for found, rate, sigma in zip(jax.vmap(end)(rates, sigmas), rates, sigmas, strict=True):
        wanted = end(rate, sigma)
        largest = jnp.abs(wanted).max()
        assert jnp.abs(found - wanted).max() <= tolerances.TRAJECTORY[torch.float32] * largest


def test_clipping_before_it() -> None:
    shapes = ((3, 5), (7,))
    params, steps = parameters(shapes), gradients(shapes, torch.float32)
    tx = optax.chain(optax.clip(1.0), apollo(0.3, warmup_steps=0))
    xs, states = train(tx, arrays(params), stacked(steps))
    clipped = [[g.clamp(-1, 1) for g in grads] for grads in steps]
    compare((xs, states[1]), of_the_class(params, clipped, lr=0.3, warmup_steps=0), torch.float32)


def test_each_label_has_a_transformation_of_its_own() -> None:
    shapes = ((3, 5), (7,), (4,))
    params, steps = parameters(shapes), gradients(shapes, torch.float32)
    tx = optax.multi_transform(
        {
            "one": apollo(0.3, weight_decay=0.1, warmup_steps=0),
            "other": apollow(0.1, weight_decay=0.1, warmup_steps=3, rebound="belief"),
            "frozen": optax.set_to_zero(),
        },
        {"a": "one", "b": "other", "c": "frozen"},
    )
    names = "abc"
    xs, _ = train(
        tx,
        dict(zip(names, arrays(params), strict=True)),
        dict(zip(names, stacked(steps), strict=True)),
    )
    one = {"params": params[:1], "lr": 0.3, "weight_decay": 0.1}
    other = {
        "params": params[1:2],
        "lr": 0.1,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "decoupled_weight_decay": True,
        "rebound": "belief",
    }
    comparison = Comparison()
    wanted = of_the_class([one, other], [grads[:2] for grads in steps], warmup_steps=0)
    for t, step in enumerate(wanted):
        for name, (theta, _, _) in zip(names, step, strict=False):
            found = tensor(xs[name][t])
            comparison.check(name, found, as_numpy(theta), tolerances.TRAJECTORY[torch.float32])
    assert (xs["c"] == xs["c"][:1]).all()


def test_masked_leaves_pass() -> None:
    tx = optax.masked(
        apollo(0.1, weight_decay=0.1, mask={"a": True, "b": True}, rebound="belief"),
        {"a": True, "b": False},
    )
    x = {"a": jnp.ones(3), "b": jnp.ones(2)}
    updates, state = tx.update(x, tx.init(x), x)
    assert (updates["b"] == x["b"]).all()
    assert (updates["a"] < 0).all()
    assert len(jax.tree.leaves(state.inner_state.exp_avg)) == 1


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(MODES["L2"], torch.float32), (MODES["belief, decoupled"], torch.bfloat16)],
    ids=["L2", "belief, decoupled"],
)
def test_accumulated_gradients(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """A step every two gradients is the step of their mean; nothing moves in between."""
    inner = apollo(0.3, warmup_steps=2, **mode)
    x, g = start_and_gradients(dtype)
    twice = jnp.repeat(g, 2, axis=0)
    found, _ = train(optax.MultiSteps(inner, 2).gradient_transformation(), x, twice)
    wanted, _ = train(inner, x, g)
    allowed = tolerances.OTHER_PROGRAM[dtype]
    np.testing.assert_allclose(
        *[y.astype(float) for y in (found[1::2], wanted)], rtol=0, atol=allowed
    )
    assert (found[0] == x).all()


def test_gradient_that_is_not_finite_is_passed_over() -> None:
    dtype = torch.bfloat16  # the updates must have the type that apply_if_finite expects
    inner = apollow(0.3, weight_decay=0.1, warmup_steps=0, rebound="belief")
    x, g = start_and_gradients(dtype)
    with_nan = jnp.concatenate([g[:2], jnp.full_like(g[:1], jnp.nan), g[2:]])
    found, states = train(optax.apply_if_finite(inner, 2), x, with_nan)
    wanted, _ = train(inner, x, g)
    assert (found[2] == found[1]).all()
    found = found[jnp.asarray([0, 1, 3, 4])].astype(float)
    allowed = tolerances.OTHER_PROGRAM[dtype]
    np.testing.assert_allclose(found, wanted.astype(float), rtol=0, atol=allowed)
    assert int(states.total_notfinite[-1]) == 1


def test_state_is_mapped_as_the_parameters_are() -> None:
    """optax.tree_map_params, with which shardings are given to a state."""
    x = {"a": jnp.ones((2, 3)), "b": [jnp.ones(4)]}
    for mode in MODES.values():
        tx = apollo(**mode)
        marked = optax.tree_map_params(
            tx,
            lambda _, name: name,
            tx.init(x),
            {"a": "of a", "b": ["of b"]},
            transform_non_params=lambda _: "number",
        )
        assert marked.exp_avg == marked.hessian_diag == {"a": "of a", "b": ["of b"]}
        assert all(y in (None, "number") for y in (marked.count, *marked[3:]))


def test_leaf_without_a_gradient_is_left_alone() -> None:
    tx = apollow(0.1, weight_decay=0.1, warmup_steps=0, rebound="belief")
    x = {"a": jnp.ones(3), "b": jnp.ones(2), "c": None}
    state = tx.init(x)
    for _ in range(2):
        updates, state = tx.update({"a": None, "b": jnp.ones(2), "c": None}, state, x)
    assert updates["a"] is None
    assert (updates["b"] < 0).all()
    assert not state.exp_avg["a"].any()
    assert optax.apply_updates({"b": x["b"]}, {"b": updates["b"]})["b"].shape == (2,)


def test_tree_without_leaves() -> None:
    for mode in MODES.values():
        tx = apollo(**mode)
        updates, state = tx.update({}, tx.init({}), {})
        assert updates == {}
        assert int(state.count) == 1


def test_schedule_that_starts_at_nothing() -> None:
    tx = apollo(lambda t: 0.1 * t, warmup_steps=4, warmup_init_lr=0.05)
    x = jnp.ones(3)
    state = tx.init(x)
    updates, state = tx.update(x, state, x)
    assert not updates.any()
    updates, state = tx.update(x, state, x)
    np.testing.assert_allclose(updates, -0.1 / 4, rtol=tolerances.CAPTURED_RATE)


# what is refused

ADVICE = [
    ("lr", 0.5, "use learning_rate"),
    ("b1", 0.9, "use beta"),
    ("b2", 0.999, "leave it out"),
    ("betas", (0.9, 0.999), "use beta for the first of the two"),
    ("momentum", 0.9, "use beta, and start at ten times the lr of SGD"),
    ("nesterov", True, "leave it out"),
    ("mu_dtype", jnp.bfloat16, "the state is float32 or wider"),
    ("warmup", 100, "use warmup_steps"),
    ("init_lr", 0.01, "use warmup_init_lr"),
    ("weight_decay_type", "L2", "'L2' is the default, and decoupled_weight_decay=True"),
    ("maximize", True, r"chain optax\.scale\(-1\.0\)"),
    ("fused", True, "XLA compiles the step"),
    ("rounding", "kahan", "keep the parameters in float32"),
]


@pytest.mark.parametrize("make", [apollo, apollow], ids=["apollo", "apollow"])
@pytest.mark.parametrize(("name", "value", "message"), ADVICE, ids=[x[0] for x in ADVICE])
def test_keywords_of_other_optimizers_get_advice(
    make: Any, name: str, value: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=f"apollo has no argument {name}, got {name}=.*{message}"):
        make(**{name: value})


def test_what_is_an_argument_gets_no_advice() -> None:
    found = inspect.signature(apollo).parameters
    assert not set(found) & advice.OPTAX.keys()
    # every argument that the class alone has, and every one of optax's usual optimizers
    others = {*inspect.signature(Apollo).parameters} - {"params"}
    for other in (optax.adamw, optax.sgd, optax.lion):
        others |= set(inspect.signature(other).parameters)
    assert others - set(found) <= advice.OPTAX.keys()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigmaa'"):
        apollo(sigmaa=1.0)


def test_a_rate_for_adam_is_told(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(
        LearningRateWarning, match=r"^learning_rate=0\.0003 is a rate for Adam.*moves\. "
    ) as told:
        apollow(3e-4)
    assert told[0].filename == __file__
    assert "lr_range_test" not in str(told[0].message)  # it is for models of PyTorch
    with pytest.warns(LearningRateWarning, match=r"moves \(sigma=100\)\."):
        apollo(0.5, sigma=100)
    recwarn.clear()
    warnings.simplefilter("always")
    apollo(3e-4, rebound="belief")
    apollo(optax.constant_schedule(3e-4))
    apollo(jnp.asarray(3e-4))
    apollo(0.0)
    assert not recwarn


def test_signature_is_that_of_the_class() -> None:
    found = inspect.signature(apollo).parameters
    wanted = dict(inspect.signature(Apollo).parameters)
    of_torch = ("params", "foreach", "fused", "maximize", "capturable", "differentiable")
    for name in (*of_torch, "rounding", "state_dtype", "seed"):
        del wanted[name]
    names = {"learning_rate" if name == "lr" else name for name in wanted}
    assert set(found) == names | {"mask"}
    for name, p in wanted.items():
        assert found["learning_rate" if name == "lr" else name].default == p.default
    positional = [name for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [*list(found)[:5], "mask", "warmup_steps"]
    assert list(found)[:5] == ["learning_rate", "beta", "eps", "sigma", "weight_decay"]


BAD: list[tuple[str, Any]] = [
    *itertools.product(("lr", "eps", "weight_decay"), (-0.1, math.nan, math.inf, "1", None, True)),
    *itertools.product(("beta",), (-0.1, 1.0, math.nan, (0.9, 0.99))),
    *itertools.product(("sigma",), (0, -1.0, math.inf)),
    *itertools.product(("warmup_steps",), (-1, 1.5, math.inf, "5")),
    *itertools.product(("warmup_init_lr",), (-1.0, math.nan, "a")),
    *itertools.product(("rebound",), ("Constant", None)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={v!r}" for n, v in BAD])
def test_bad_values_are_refused_as_by_the_class(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be") as wanted:
        Apollo(parameters([(3,)]), **{name: value})
    with pytest.raises(ValueError, match="must be") as found:
        apollo(**renamed({name: value}))
    message = str(wanted.value)
    assert str(found.value) == (f"learning_rate{message[2:]}" if name == "lr" else message)


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="eps must be > 0 with rebound='belief'"):
        apollo(eps=0.0, rebound="belief")
    with pytest.raises(ValueError, match="warmup_init_lr must be None or 0 where learning_rate"):
        apollo(0.0, warmup_init_lr=0.1)
    with pytest.raises(ValueError, match=r"sigma must be a number or a 0-dim array, got .*\(2,\)"):
        apollo(sigma=jnp.ones(2))


def test_trees_that_do_not_fit() -> None:
    x = {"a": jnp.ones((2, 3))}
    tx = apollo(weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay needs the parameters"):
        tx.update(x, tx.init(x))
    with pytest.raises(ValueError, match=r"gradient must have the shape .*\(2, 3\).*\(3,\).*'a'"):
        tx.update({"a": jnp.ones(3)}, tx.init(x), x)
    with pytest.raises(ValueError, match=r"parameter must have the shape .*\(3,\) at \['a'\]"):
        tx.update(x, tx.init(x), {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"floating or complex arrays, got int32 at \['b'\]"):
        tx.init({"b": jnp.arange(3)})
    without = apollo()
    updates, _ = without.update(x, without.init(x))  # no decay: no need of parameters
    assert updates["a"].shape == (2, 3)


def test_apollow_is_apollo_with_decoupled_decay() -> None:
    x = jnp.asarray([1.0, -2.0])
    for one, other in [
        (
            apollow(0.1, weight_decay=0.1),
            apollo(0.1, weight_decay=0.1, decoupled_weight_decay=True),
        ),
        (
            apollow(0.1, weight_decay=0.1, decoupled_weight_decay=False),
            apollo(0.1, weight_decay=0.1),
        ),
    ]:
        found, wanted = (tx.update(x, tx.init(x), x) for tx in (one, other))
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        assert (found[0] == wanted[0]).all()


# the module


def test_example_of_the_docstring() -> None:
    results = doctest.testmod(apollo_qn.optax)
    assert results.attempted > 5
    assert results.failed == 0


IMPORTS = """
import sys
import apollo_qn, apollo_qn.functional, apollo_qn.schedules
assert not {"jax", "jaxlib", "optax", "apollo_qn.optax"} & set(sys.modules)
sys.modules["jax"] = None  # as if it were not installed
try:
    import apollo_qn.optax
except ImportError as error:
    assert "apollo-qn[jax]" in str(error), error
    assert "jax" in str(error.__cause__)
else:
    raise AssertionError("apollo_qn.optax was imported without JAX")
from apollo_qn import Apollo  # what there is still works
"""


def test_jax_is_imported_where_it_is_asked_for() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_mask_that_has_become_a_schedule_is_refused() -> None:
    """optax.inject_hyperparams calls it with the count, so nothing would decay."""
    params = {"a": jnp.ones((2, 2))}
    method = optax.inject_hyperparams(apollo)(
        learning_rate=0.1,
        weight_decay=0.1,
        mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    )
    with pytest.raises(ValueError, match=r"mask must be a pytree of bools.*static_args"):
        method.update(params, method.init(params), params)
