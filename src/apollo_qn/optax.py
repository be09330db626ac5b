"""APOLLO in JAX, an optax transformation: ``rule.py`` once more, judged by agreement with it.

It needs the extra ``apollo-qn[jax]``; ``import apollo_qn`` does not import it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from apollo_qn import ranges
from apollo_qn.functional import warmup_share
from apollo_qn.rule import UNDETERMINED, Rebound

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


class ApolloState(NamedTuple):
    """State of :func:`apollo`; a field that its mode does not need is None."""

    count: jax.Array  # t, shape=(), dtype=int32
    exp_avg: optax.Updates  # m, the parameters' shapes, float32 at least
    hessian_diag: optax.Updates  # B, likewise
    previous_lr: jax.Array | None  # rate of the step before, shape=(); decoupled decay
    thresholds: jax.Array | None  # of the step before, one for each leaf; belief
    warmup_base_lr: jax.Array | None  # what warmup_init_lr is a share of, shape=()


class _Scalars(NamedTuple):
    """The numbers of one step, as in ``rule.py``."""

    alpha: Number
    rate: Number
    sigma: Number
    eps: Number
    weight_decay: Number
    offset: Number
    previous_offset: Number
    kappa: Number
    omega: Number


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
    r"""APOLLO, the adaptive parameter-wise diagonal quasi-Newton method (Ma, 2020, Algorithm 1).

    For each leaf, with state m = B = 0 and t = 0, 1, ...:

    .. code-block:: text

        alpha  = (1 - beta) / (1 - beta^(t+1))
        m'     = m + alpha (g - m)                                            eq. (9)
        d      = m / max(|B|, sigma)                       direction of the step before
        a      = (<d, m' - m> + <d, B d>) / (||d||_4 + eps / sigma)^4
        B'     = B - a d^2                                                    eq. (8)
        update = -learning_rate m' / max(|B'|, sigma)                         eq. (11)

    The sums run over the whole leaf. Under ``jit`` that is so for sharded arrays too; under
    ``vmap`` each member of the batch is a leaf of its own; in ``shard_map`` give it whole leaves,
    for it cannot know of the parts on other devices.

    It takes the steps of :class:`apollo_qn.Apollo`, whose arguments have the same names, but:

    * ``lr`` is ``learning_rate``, as in optax, and may be a schedule.
    * ``mask`` stands for parameter groups with and without decay; ``optax.multi_transform`` for
      other groups.
    * There is no ``maximize``, for which optax has no convention: put ``optax.scale(-1.0)`` before.
    * ``warmup_init_lr`` is a share of the rate at the first step. Where a schedule starts at 0,
      the rate rises from 0.
    * A number may be a 0-dim array, so that ``optax.inject_hyperparams`` can inject all of them
      (with ``static_args="mask"`` where that is callable). The ranges below are checked only of
      Python numbers.

    Do not change ``sigma``, ``beta``, ``eps`` or ``weight_decay`` lightly in mid-run: the direction
    of the step before is rebuilt with the new values.

    An update has the type that gradient and parameter have together. A complex leaf is a real one
    with twice as many elements; its gradients are to be conjugated, as for every optimizer in
    optax. A leaf whose gradient is None is left as it is.

    Args:
        learning_rate: eta, >= 0, or a schedule: a function of the number of steps done.
        beta: decay of the moving average of gradients, in [0, 1).
        eps: added to \|\|d\|\|_4 after division by sigma, >= 0.
        sigma: convexity threshold, > 0 (section 3.3); unused with ``rebound="belief"``. (c
            learning_rate, c sigma) gives the same trajectory for any c > 0 (Theorem 1).
        weight_decay: >= 0; added to the gradient (L2), as in the paper's experiments. ``update``
            then needs the parameters.
        mask: which leaves are decayed: booleans in the tree of the parameters or a prefix of it, or
            a function that makes them of the parameters; None: all.
        warmup_steps: steps over which the rate rises linearly from ``warmup_init_lr`` to
            ``learning_rate``, whose schedule it multiplies (section 3.4); a whole number >= 0, 0
            turns it off.
        warmup_init_lr: rate of the first step, >= 0; None: a thousandth of ``learning_rate``.
        decoupled_weight_decay: add weight_decay * theta to the direction instead
            (Loshchilov & Hutter, 2019); the secant condition accounts for it.
        rebound: ``"constant"``, the paper's max(\|B\|, sigma), or ``"belief"``, the authors' later
            max(\|B\|, max\|g - m\|) + eps / alpha, which needs eps > 0.

    Returns:
        A transformation whose state is an :class:`ApolloState`.

    Raises:
        ValueError: a number out of its range, named with its value; in ``init``, a leaf that is
            neither floating nor complex; in ``update``, a gradient of another shape than its
            parameter, or no parameters where there is decay.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from apollo_qn.optax import apollo
        >>> loss = lambda x: jnp.sum(jnp.array([1.0, 3.0]) * (x - 2) ** 2)
        >>> solver = apollo(optax.cosine_decay_schedule(0.5, 20), warmup_steps=5)
        >>> x = jnp.zeros(2)
        >>> state = solver.init(x)
        >>> for _ in range(20):
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
    belief = rebound == "belief"
    decays = not _is_zero(weight_decay)
    log_beta = _log(beta)

    def schedule(count: jax.Array) -> jax.Array:
        return _real(learning_rate(count) if callable(learning_rate) else learning_rate)

    def alpha(t: jax.Array) -> jax.Array:
        return (1 - beta) / -jnp.expm1((t + 1) * log_beta)  # 1 - beta^(t+1) would cancel

    def offset(t: jax.Array) -> Number:
        return eps / alpha(t) if belief else 0.0

    def warmup(t: jax.Array, base: jax.Array | None) -> Number:
        if _is_zero(warmup_steps):
            return 1.0
        if warmup_init_lr is None or base is None:
            start: Number = warmup_share(None, 1.0)
        else:
            start = jnp.where(base == 0, 0, warmup_init_lr / jnp.where(base == 0, 1, base))
        factor = start + (1 - start) * t / jnp.maximum(warmup_steps, 1)
        return jnp.where(t < warmup_steps, factor, 1)

    def init_fn(params: optax.Params) -> ApolloState:
        leaves = jax.tree.leaves(params, is_leaf=_is_none)
        count = jnp.zeros([], jnp.int32)
        return ApolloState(
            count=count,
            exp_avg=jax.tree_util.tree_map_with_path(_zeros, params),
            hessian_diag=jax.tree_util.tree_map_with_path(_zeros, params),
            previous_lr=_real(0.0) if decoupled_weight_decay else None,
            thresholds=jnp.ones(len(leaves), _real(0.0).dtype) if belief else None,
            warmup_base_lr=None if warmup_init_lr is None else schedule(count),
        )

    def update_fn(
        updates: optax.Updates, state: ApolloState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ApolloState]:
        if decays and params is None:
            raise ValueError(optax.base.NO_PARAMS_MSG)
        t = _real(state.count)
        rate = schedule(state.count) * warmup(t, state.warmup_base_lr)
        kappa, omega = 1.0, 0.0
        if decays and decoupled_weight_decay:
            kappa, omega = _displacement_weights(t, state.previous_lr, weight_decay)
        s = _Scalars(
            alpha=alpha(t),
            rate=rate,
            sigma=sigma,
            eps=eps if belief else eps / sigma,
            weight_decay=weight_decay,
            offset=offset(t),
            previous_offset=offset(jnp.maximum(t - 1, 0)),
            kappa=kappa,
            omega=omega,
        )

        leaves, tree = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_none)
        ms = tree.flatten_up_to(state.exp_avg)
        Bs = tree.flatten_up_to(state.hessian_diag)
        thetas = [None] * len(leaves) if params is None else tree.flatten_up_to(params)
        decayed = [False] * len(leaves)
        if decays:
            decayed = tree.flatten_up_to(_full_mask(mask, params))
        thresholds = [None] * len(leaves) if state.thresholds is None else list(state.thresholds)
        ...

    return optax.GradientTransformation(init_fn, update_fn)
