"""APOLLO in JAX as an optax transformation, tested against ``algorithm.py``.

The module needs the extra ``apollo-qn[jax]``. ``import apollo_qn`` does not import it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from apollo_qn import advice
from apollo_qn.hyperparameters import UNDETERMINED, Rebound, check_ranges, warmup_start

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    raise ImportError(
        f"apollo_qn.optax needs JAX and optax ({error}): pip install 'apollo-qn[jax]'"
    ) from error

__all__ = ["ApolloState", "apollo", "apollow"]

Number: TypeAlias = "float | jax.Array"

_LONGEST_TABLE = 1 << 16  # steps, enough for beta up to 0.9994


class ApolloState(NamedTuple):
    """State of :func:`apollo`; a field that the settings do not need is None."""

    count: jax.Array  # type: ignore[assignment]  # t, shape=(), dtype=int32
    exp_avg: optax.Updates  # m, the parameters' shapes, float32 at least
    hessian_diag: optax.Updates  # B, the parameters' shapes, float32 at least
    previous_lr: jax.Array | None  # rate of the step before, shape=(), with decoupled decay
    thresholds: jax.Array | None  # thresholds of the step before, shape=(leaves,), with belief
    warmup_base_lr: jax.Array | None  # divisor of warmup_init_lr, shape=()


class _Scalars(NamedTuple):
    """Scalars of one step, as in ``hyperparameters.py``."""

    alpha: Number
    rate: Number
    sigma: Number
    secant_eps: Number
    weight_decay: Number
    offset: Number
    previous_offset: Number
    kappa: Number
    omega: Number


@functools.partial(advice.advises, advice=advice.OPTAX, name="apollo")
def apollo(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    beta: Number = 0.9,
    eps: Number = 1e-4,
    sigma: Number = 1.0,
    weight_decay: Number = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    warmup_steps: int | jax.Array = 500,
    *,
    warmup_init_lr: Number | None = None,
    decoupled_weight_decay: bool = False,
    rebound: Rebound = "constant",
) -> optax.GradientTransformation:
    r"""Return APOLLO, a diagonal quasi-Newton method (Ma, 2020, Algorithm 1).

    For each leaf, with state m = B = 0 and t = 0, 1, ...:

    .. code-block:: text

        alpha  = (1 - beta) / (1 - beta^(t+1))
        m'     = m + alpha (g - m)                                            eq. (9)
        d      = m / max(|B|, sigma)                       direction of the step before
        a      = (<d, m' - m> + <d, B d>) / (||d||_4 + eps / sigma)^4
        B'     = B - a d^2                                                    eq. (8)
        update = -learning_rate m' / max(|B'|, sigma)                         eq. (11)

    The sums run over the full leaf, under ``jit`` for sharded arrays too. Under ``vmap`` each
    member of the batch is a leaf of its own. Inside ``shard_map`` pass full leaves, because the
    transformation does not see the shards on other devices.

    The steps are those of :class:`apollo_qn.Apollo`, and the arguments have the same names, with
    these differences:

    * ``lr`` is ``learning_rate``, as in optax, and may be a schedule.
    * ``mask`` replaces parameter groups with and without decay, ``optax.multi_transform`` replaces
      other groups.
    * There is no ``maximize``. Chain ``optax.scale(-1.0)`` before the transformation.
    * ``warmup_init_lr`` is divided by the rate at the first step. If a schedule starts at 0, the
      rate rises from 0.
    * There is no ``rounding``, ``state_dtype`` or ``seed``. A 16-bit parameter is rounded to the
      nearest, and loses an update of less than half a unit in its last place.
    * A number may be a 0-dim array, so ``optax.inject_hyperparams`` can inject all of them (with
      ``static_args="mask"`` if the mask is a function). Only Python numbers are checked against
      their ranges.

    If you change ``sigma``, ``beta``, ``eps`` or ``weight_decay`` during training, the direction of
    the step before is rebuilt with the new values.

    An update has the promoted type of gradient and parameter. A complex leaf is treated as a real
    one with twice as many elements. Conjugate its gradients, as for every optimizer in optax. A
    leaf whose gradient is None does not change.

    Args:
        learning_rate: eta, >= 0, or a schedule: a function of the number of steps done.
        beta: decay of the moving average of gradients, in [0, 1).
        eps: number added to \|\|d\|\|_4 after division by sigma, >= 0.
        sigma: convexity threshold, > 0 (section 3.3); unused with ``rebound="belief"``. By Theorem
            1, (c learning_rate, c sigma) gives the same trajectory for any c > 0.
        weight_decay: factor of the decay, >= 0. By default weight_decay * theta is added to the
            gradient (L2), as in the paper's experiments. ``update`` then needs the parameters.
        mask: tree of booleans that says which leaves decay, of the structure of the parameters or a
            prefix of it, or a function of the parameters that returns one. None means all.
        warmup_steps: number of steps over which the rate rises linearly from ``warmup_init_lr`` to
            ``learning_rate`` (section 3.4), an integer >= 0; 0 turns the warmup off. The warmup
            multiplies a schedule.
        warmup_init_lr: rate of the first step, >= 0; None means ``learning_rate`` / 1000.
        decoupled_weight_decay: True adds weight_decay * theta to the direction instead
            (Loshchilov & Hutter, 2019). The secant condition accounts for it.
        rebound: ``"constant"``, the paper's max(\|B\|, sigma), or ``"belief"``, the authors' later
            max(\|B\|, max\|g - m\|) + eps / alpha, which needs eps > 0.

    Returns:
        A transformation whose state is an :class:`ApolloState`.

    Raises:
        TypeError: a keyword is one of another optimizer; the message says what to use instead.
        ValueError: a number is out of its range; in ``init``, a leaf is neither floating nor
            complex; in ``update``, a gradient has another shape than its parameter, or the
            parameters are missing although weights decay.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from apollo_qn.optax import apollo
        >>> loss = lambda x: jnp.sum(jnp.array([1.0, 3.0]) * (x - 2) ** 2)
        >>> solver = apollo(optax.cosine_decay_schedule(1.0, 30), warmup_steps=5)
        >>> x = jnp.zeros(2)
        >>> state = solver.init(x)
        >>> for _ in range(30):
        ...     updates, state = solver.update(jax.grad(loss)(x), state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> bool(loss(x) < 0.01 * loss(jnp.zeros(2)))
        True
    """
    _check(
        learning_rate=learning_rate,
        beta=beta,
        eps=eps,
        sigma=sigma,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        warmup_init_lr=warmup_init_lr,
        rebound=rebound,
    )
    beta, eps, sigma, weight_decay = map(_widened, (beta, eps, sigma, weight_decay))
    alpha = _alpha(beta)
    belief = rebound == "belief"
    decays = not _is_zero(weight_decay)

    def offset(count: jax.Array) -> Number:
        return eps / alpha(count) if belief else 0.0

    def scheduled(count: jax.Array) -> jax.Array:
        return _real(learning_rate(count) if callable(learning_rate) else learning_rate)

    def rate(count: jax.Array, base: jax.Array | None) -> jax.Array:
        lr = scheduled(count)
        if _is_zero(warmup_steps):
            return lr
        w: Number = warmup_start(None, 1.0)
        if warmup_init_lr is not None and base is not None:
            w = jnp.where(base == 0, 0, warmup_init_lr / jnp.where(base == 0, 1, base))
        factor = w + (1 - w) * _real(count) / jnp.maximum(warmup_steps, 1)
        return lr * jnp.where(count < warmup_steps, factor, 1)

    def init_fn(params: optax.Params) -> ApolloState:
        leaves = jax.tree.leaves(params, is_leaf=_is_none)
        count = jnp.zeros([], jnp.int32)
        return ApolloState(
            count=count,
            exp_avg=jax.tree_util.tree_map_with_path(_zeros, params),
            hessian_diag=jax.tree_util.tree_map_with_path(_zeros, params),
            previous_lr=_real(0) if decoupled_weight_decay else None,
            thresholds=_real([1] * len(leaves)) if belief else None,
            warmup_base_lr=None if warmup_init_lr is None else scheduled(count),
        )

    def update_fn(
        updates: optax.Updates, state: ApolloState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ApolloState]:
        if decays and params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")
        t = state.count  # number of steps done
        kappa: Number = 1.0
        omega: Number = 0.0
        if decoupled_weight_decay:
            kappa, omega = _displacement_weights(t, state.previous_lr, weight_decay)
        new_rate = rate(t, state.warmup_base_lr)
        s = _Scalars(
            alpha=alpha(t),
            rate=new_rate,
            sigma=sigma,
            secant_eps=eps if belief else eps / sigma,
            weight_decay=weight_decay,
            offset=offset(t),
            previous_offset=offset(jnp.maximum(t - 1, 0)),
            kappa=kappa,
            omega=omega,
        )

        def leaf(
            path: Any, g: Any, m: Any, B: Any, theta: Any, decayed: Any, threshold: Any
        ) -> tuple[Any, Any, Any, Any]:
            if g is None:
                return None, m, B, threshold
            _check_shapes(path, m, g, theta)
            pairs = _Pairs(m.dtype)
            u, m, B, threshold = _step(
                pairs.split(g),
                pairs.split(m),
                pairs.split(B),
                pairs.split(theta) if decayed else None,
                threshold,
                s,
                decoupled_weight_decay,
            )
            dtype = jnp.result_type(g, g if theta is None else theta)
            return pairs.join(u).astype(dtype), pairs.join(m), pairs.join(B), threshold

        tree: Any
        gs, tree = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_none)
        nothing = [None] * len(gs)
        results = map(
            leaf,
            [path for path, _ in gs],
            [g for _, g in gs],
            tree.flatten_up_to(state.exp_avg),
            tree.flatten_up_to(state.hessian_diag),
            nothing if params is None else tree.flatten_up_to(params),
            tree.flatten_up_to(_full_mask(mask, params)) if decays else nothing,
            nothing if state.thresholds is None else state.thresholds,
        )
        us, ms, Bs, thresholds = zip(*results, strict=True) if gs else ((),) * 4
        return tree.unflatten(us), ApolloState(
            count=optax.safe_increment(t),
            exp_avg=tree.unflatten(ms),
            hessian_diag=tree.unflatten(Bs),
            previous_lr=new_rate if decoupled_weight_decay else None,
            thresholds=_real(thresholds) if belief else None,
            warmup_base_lr=state.warmup_base_lr,
        )

    return optax.GradientTransformation(init_fn, update_fn)


apollow = functools.partial(apollo, decoupled_weight_decay=True)
apollow.__doc__ = """Return :func:`apollo` with decoupled weight decay; all arguments are the same.

Example:
    >>> from apollo_qn.optax import apollow
    >>> solver = apollow(0.5, weight_decay=1e-4)
"""


def _step(
    g: jax.Array,
    m: jax.Array,
    B: jax.Array,
    theta: Any,
    threshold: jax.Array | None,
    s: Any,
    decoupled: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the update -rate d', m', B' and the threshold: Algorithm 1 on one real leaf.

    The function is :func:`apollo_qn.algorithm.update`, except that the latter returns theta'.
    ``theta`` is None without decay. ``threshold`` is that of the step before, or None without
    belief. ``s`` is a :class:`_Scalars` of any types.
    """
    s = jax.tree.map(lambda x: jnp.asarray(x, m.dtype), s)
    l2 = theta is not None and not decoupled
    decoupled = theta is not None and decoupled
    if l2:
        g = g + s.weight_decay * theta

    # the displacement of the step before, rebuilt; 0 at t = 0 because m = 0
    floor = s.sigma if threshold is None else threshold.astype(m.dtype)
    d = m / (jnp.maximum(jnp.abs(B), floor) + s.previous_offset)
    if decoupled:
        d = s.kappa * d + s.omega * theta

    delta = g - m
    y = s.alpha * delta  # m' - m
    m = m + y

    # B' = B - a d^2 with u = d / max |d|, eq. (8)
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(d), initial=0))
    u = d / jnp.where(scale == 0, 1, scale)
    B = B - _secant_coefficient(scale, u, y + B * d, s.secant_eps) * u**2

    if threshold is not None:
        floor = threshold = jnp.max(jnp.abs(delta), initial=0)
    d = m / (jnp.maximum(jnp.abs(B), floor) + s.offset)
    if decoupled:
        d = d + s.weight_decay * theta
    return -s.rate * d, m, B, threshold


def _secant_coefficient(scale: jax.Array, u: jax.Array, v: jax.Array, eps: jax.Array) -> jax.Array:
    """Return c with B' = B - c u^2, as :func:`apollo_qn.secant.secant_coefficient`.

    <u, v> is the k of that function.
    """
    wide = jnp.promote_types(u.dtype, jnp.result_type(float))
    q4, k = jnp.sum(u**4, dtype=wide), jnp.sum(u * v, dtype=wide)
    scale, eps = scale.astype(wide), eps.astype(wide)
    # the root has no derivative at 0
    n = scale * jnp.sqrt(jnp.sqrt(jnp.where(scale == 0, 1, q4))) + eps
    nothing = n == 0  # eps = 0 and d = 0: no displacement, no information
    n = jnp.where(nothing, 1, n)
    share = scale / n  # <= 1; its cube may underflow although c does not
    c = jnp.where(nothing, 0, share * (share * (share * k / n)))
    largest = float(np.finfo(u.dtype).max) / 8
    return jnp.clip(c, -largest, largest).astype(u.dtype)  # a saturated B stays finite


def _alpha(beta: Number) -> Callable[[jax.Array], jax.Array]:
    """Return the weight of the new gradient in m, eq. (9), as a function of the step t.

    An error of alpha is the same for all elements. It does not average out in the sums, and changes
    B about ten times as much. In float32 even expm1 is not exact enough. If beta is known, alpha is
    therefore tabulated in float64 until beta^(t+1) vanishes, unless the table would be too long.
    """
    log: Number
    if isinstance(beta, jax.Array):
        log = jnp.log(beta)
    else:
        log = math.log(beta) if beta else -math.inf
        steps = math.ceil(-37 / log) + 1  # exp(-37) is float64's roundoff
        if steps <= _LONGEST_TABLE:
            table = (1 - beta) / (1 - beta ** np.arange(1.0, steps + 1))
            return lambda t: _real(table)[jnp.minimum(t, len(table) - 1)]
    return lambda t: (1 - beta) / -jnp.expm1((t + 1) * log)


def _displacement_weights(t: jax.Array, lr: Any, weight_decay: Number) -> tuple[Number, Number]:
    """Return kappa and omega with d + wd theta_before = kappa d + omega theta."""
    kept = 1 - lr * weight_decay
    known = (jnp.abs(kept) >= UNDETERMINED) & (t > 0)
    safe = jnp.where(known, kept, 1)
    return 1 / safe, jnp.where(known, weight_decay / safe, 0)


class _Pairs:
    """Conversion of complex arrays to real ones with a last dimension of 2, and back."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.complex = jnp.issubdtype(dtype, jnp.complexfloating)

    def split(self, x: Any) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        return jnp.stack([x.real, x.imag], axis=-1) if self.complex else x

    def join(self, x: jax.Array) -> jax.Array:
        return jax.lax.complex(x[..., 0], x[..., 1]) if self.complex else x


def _zeros(path: Any, p: Any) -> jax.Array:
    dtype = jnp.result_type(p)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"params must be floating or complex arrays, got {dtype} at "
            f"{_place(path)}; leave others out, for example with optax.masked"
        )
    return jnp.zeros_like(p, dtype=jnp.promote_types(dtype, jnp.float32))


def _check_shapes(path: Any, m: jax.Array, g: Any, theta: Any) -> None:
    for name, x in (("gradient", g), ("parameter", m if theta is None else theta)):
        if jnp.shape(x) != m.shape:
            raise ValueError(
                f"{name} must have the shape of its state, {m.shape}, got {jnp.shape(x)} at "
                f"{_place(path)}"
            )


def _place(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"


def _full_mask(mask: Any, params: optax.Params) -> Any:
    """Expand ``mask`` to a boolean per leaf."""
    if mask is None:
        mask = True
    elif callable(mask) and jax.tree_util.all_leaves([mask]):  # not a callable node of a tree
        mask = mask(params)
    if mask is False or any(_is_array(on) for on in jax.tree.leaves(mask)):
        raise ValueError(
            f"mask must be a pytree of bools or a callable that makes one, got {mask}, by which "
            "nothing would decay: optax.inject_hyperparams takes each callable for a schedule, so "
            "name mask in its static_args"
        )
    return jax.tree.map(lambda on, part: jax.tree.map(lambda _: on, part), mask, params)


def _check(**given: Any) -> None:
    numbers = {}
    for name, value in given.items():
        if not _is_array(value):
            numbers[name] = value
        elif value.ndim:
            raise ValueError(f"{name} must be a number or a 0-dim array, got shape {value.shape}")
    if callable(given["learning_rate"]):
        del numbers["learning_rate"]
    check_ranges(numbers, lr="learning_rate")
    if {"learning_rate", "sigma"} <= numbers.keys():
        advice.warn_if_small_rate({**numbers, "warmup_base_lr": numbers["learning_rate"]}, None)


def _is_none(x: Any) -> bool:
    return x is None


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _is_zero(x: Any) -> bool:
    """Return whether ``x`` is a Python number equal to 0."""
    return not _is_array(x) and bool(x == 0)


def _real(x: Any) -> jax.Array:
    """Convert ``x`` to JAX's widest enabled floating type: float32 or float64."""
    return jnp.asarray(x, jnp.result_type(float))


def _widened(x: Any) -> Number:
    """Convert arrays as :func:`_real` does; keep Python numbers, which are exact to float64."""
    return _real(x) if _is_array(x) else x
