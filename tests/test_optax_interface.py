"""The twin in JAX inside optax's wrappers, its arguments and its errors."""

from __future__ import annotations

import doctest
import inspect
import itertools
import math
import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

# XLA's compiler takes most of the time and is fastest at this level; tests pass at every level
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import apollo_qn.optax  # noqa: E402
from apollo_qn import Apollo, LearningRateWarning, advice  # noqa: E402
from apollo_qn.optax import apollo, apollow  # noqa: E402
from tests import tolerances  # noqa: E402
from tests.helpers import Comparison, as_numpy, normal, parameters  # noqa: E402
from tests.test_optax import (  # noqa: E402
    MODES,
    SOME_MODES,
    arrays,
    compare,
    gradients,
    of_the_class,
    renamed,
    stacked,
    tensor,
    train,
)


def start_and_gradients(dtype: torch.dtype) -> tuple[Any, Any]:
    as_jax = jnp.float32 if dtype == torch.float32 else jnp.bfloat16
    x, g = normal((3, 5), "theta"), normal((4, 3, 5), "g")
    return jnp.asarray(x.numpy(), as_jax), jnp.asarray(g.numpy(), as_jax)


@SOME_MODES
def test_hyperparameters_can_be_injected(mode: dict[str, Any]) -> None:
    """All hyperparameters are arrays, even the number of steps; the rate changes."""
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
        # beta is rounded to float32 here, and with capturable in the class
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
    """vmap runs over hyperparameters."""
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
    """Accumulating two gradients takes the step of their mean; nothing moves in between."""
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
    """optax.tree_map_params, which gives shardings to a state, maps this state too."""
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


def test_a_schedule_that_starts_at_zero() -> None:
    tx = apollo(lambda t: 0.1 * t, warmup_steps=4, warmup_init_lr=0.05)
    x = jnp.ones(3)
    state = tx.init(x)
    updates, state = tx.update(x, state, x)
    assert not updates.any()
    updates, state = tx.update(x, state, x)
    np.testing.assert_allclose(updates, -0.1 / 4, rtol=tolerances.CAPTURED_RATE)


# errors

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
    # every argument that only the class has, and those of optax's common optimizers
    others = {*inspect.signature(Apollo).parameters} - {"params"}
    for other in (optax.adamw, optax.sgd, optax.lion):
        others |= set(inspect.signature(other).parameters)
    assert others - set(found) <= advice.OPTAX.keys()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigmaa'"):
        apollo(sigmaa=1.0)


def test_a_rate_for_adam_gives_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(
        LearningRateWarning, match=r"^learning_rate=0\.0003 is a rate for Adam.*moves\. "
    ) as told:
        apollow(3e-4)
    assert told[0].filename == __file__
    assert "lr_range_test" not in str(told[0].message)  # lr_range_test is for models of PyTorch
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


def test_contradicting_values_are_refused() -> None:
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
    updates, _ = without.update(x, without.init(x))  # without decay no parameters are needed
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
