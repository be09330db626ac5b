"""The optimizer class: groups, state, step and hooks. ``algorithm.py`` holds the mathematics."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from apollo_qn import advice, checkpoint, distributed, plan, summary, validation
from apollo_qn import rounding as storage
from apollo_qn.backends.base import TensorLists
from apollo_qn.distributed import Group
from apollo_qn.hyperparameters import Rebound, Scalar, number
from apollo_qn.rounding import Rounding
from apollo_qn.seeds import default_seed
from apollo_qn.state import (
    NewState,
    add_missing_state,
    compensations_of,
    drop_compensation,
    dtype_name,
    follow_state_dtype,
    hyperparameters,
    rate_of_next_step,
)

_rng_key = lru_cache(maxsize=1 << 16)(storage.rng_key)


class Apollo(Optimizer):
    r"""Implement APOLLO, a diagonal quasi-Newton method (Ma, 2020, Algorithm 1).

    For each parameter tensor, with state m = B = 0 and t = 0, 1, ...:

    .. code-block:: text

        alpha  = (1 - beta) / (1 - beta^(t+1))
        m'     = m + alpha (g - m)                                            eq. (9)
        d      = m / max(|B|, sigma)                       direction of the step before
        a      = (<d, m' - m> + <d, B d>) / (||d||_4 + eps / sigma)^4
        B'     = B - a d^2                                                    eq. (8)
        theta' = theta - lr m' / max(|B'|, sigma)                             eq. (11)

    The sums run over the full tensor. The state holds two tensors of the parameter's shape:
    ``exp_avg`` (m) and ``hessian_diag`` (B). Both are float32 or wider unless ``state_dtype`` is
    given. Apollo rebuilds d from m and B instead of storing it. The state also holds the 0-dim
    tensor ``step``. Three modes add an entry: decoupled decay a 0-dim ``previous_lr``, belief a
    0-dim ``threshold``, and ``rounding="kahan"`` a ``compensation`` of the parameter's shape.

    A sharded parameter (DTensor: ``fully_shard``, tensor parallelism) has a state that is sharded
    in the same way. Its sums still run over the full tensor, which takes one small all-reduce per
    step and mesh. All ranks must have gradients of the same parameters.

    By Theorem 1, (c lr, c sigma) gives the same trajectory for any c > 0. Tune only one of them.

    Args:
        params: tensors, (name, tensor) pairs or group dicts. A group may override every keyword
            except ``differentiable``.
        lr: learning rate eta, a float >= 0 or a tensor of one element. Usual rates are 0.5 to
            10 for convolutional networks and, with the gradient's norm clipped to 1, 2 to 4 for
            MLPs, LoRA and fine-tuning, 2 to 10 for Transformers, 10 to 100 for LSTMs; or ten times
            SGD's with momentum 0.9. Apollo hardly moves at 3e-4, a rate for Adam, and warns.
        beta: decay of the moving average of gradients, in [0, 1). It may be a tensor of one element
            if ``differentiable`` is True.
        eps: number added to \|\|d\|\|_4 after division by sigma, >= 0.
        sigma: convexity threshold, > 0 (section 3.3); unused with ``rebound="belief"``.
        weight_decay: factor of the decay, >= 0. By default weight_decay * theta is added to the
            gradient (L2), as in the paper's experiments. It may be a tensor of one element if
            ``differentiable`` is True.
        decoupled_weight_decay: True adds weight_decay * theta to the direction instead
            (Loshchilov & Hutter, 2019). The secant condition accounts for it.
        rebound: ``"constant"``, the paper's max(\|B\|, sigma), or ``"belief"``, the authors' later
            max(\|B\|, max\|g - m\|) + eps / alpha, which needs eps > 0.
        warmup_steps: number of steps over which the rate rises linearly from ``warmup_init_lr`` to
            ``lr`` (section 3.4), an integer >= 0; 0 turns the warmup off. The warmup multiplies
            ``group["lr"]``, so every scheduler of ``torch.optim.lr_scheduler`` composes with it.
            OneCycleLR and CyclicLR need ``cycle_momentum=False``.
        warmup_init_lr: rate of the first step, >= 0. None means lr / 1000.
        foreach: True updates many tensors per call, False one tensor per call. None chooses the
            default back end.
        fused: True demands the fused kernel, False forbids it. None uses it on a CPU and on an
            NVIDIA GPU of compute capability >= 8.0, and foreach elsewhere. Tensors that it cannot
            take (float16 on a CPU, complex ones) fall back alone.
        maximize: whether to ascend instead of descend.
        capturable: whether ``step`` is kept on the parameters' device, so that a CUDA graph can
            capture a step.
        differentiable: whether autograd runs through the step.
        rounding: how a bfloat16 or float16 parameter stores its update, which is computed in
            float32. ``"nearest"`` loses updates smaller than half a unit in the last place.
            ``"stochastic"`` rounds up or down at random and is right in the mean. ``"kahan"`` keeps
            the rounding error in ``compensation``, a third state tensor of the parameter's type;
            theta is parameter + ``compensation``. None means ``"stochastic"``.
        state_dtype: type of m and B. None means the parameter's type, float32 or wider.
            ``torch.bfloat16`` rounds B stochastically and excludes complex parameters. Groups store
            it as a string.
        seed: seed of the random bits of stochastic rounding, an integer in [0, 2**64), saved with
            the group. None takes the next number of torch's CPU generator and leaves the generator
            as it is. With several processes None takes the number of optimizers made before, so
            that all ranks agree. The bits depend only on seed, position of the parameter in the
            optimizer, step and element. A resumed run therefore draws the same bits.

    Raises:
        TypeError: a keyword is one of another optimizer, such as ``betas``.
        ValueError: a hyperparameter is out of its range; FSDP1 has flattened a parameter; a loaded
            state has a wrong shape.
        RuntimeError: a gradient is sparse; no back end serves the choice of ``foreach``, ``fused``
            and ``differentiable``.

    If a call raises, it has changed nothing. If you change ``sigma``, ``beta``, ``eps`` or
    ``weight_decay`` of a group during training, the next step rebuilds d with the new values.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=100)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _backends: plan.Backends | None = None
    _given_shapes: frozenset[torch.Size] | None = None  # None if not known, or after a warning
    _has_warned_of_rate = False

    @advice.advises
    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1.0,
        beta: Scalar = 0.9,
        eps: float = 1e-4,
        sigma: float = 1.0,
        weight_decay: Scalar = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        rebound: Rebound = "constant",
        warmup_steps: int = 500,
        warmup_init_lr: float | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        rounding: Rounding | None = None,
        state_dtype: torch.dtype | str | None = None,
        seed: int | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "eps": eps,
            "sigma": sigma,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "rebound": rebound,
            "warmup_steps": warmup_steps,
            "warmup_init_lr": warmup_init_lr,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "rounding": rounding,
            "state_dtype": dtype_name(state_dtype),
            "seed": default_seed() if seed is None else seed,
        }
        validation.check_settings(defaults)
        self._given_shapes = frozenset()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Raise as the constructor does, before anything is changed."""
        if isinstance(param_group, dict):
            advice.check_keywords(param_group)
            if "state_dtype" in param_group:
                param_group["state_dtype"] = dtype_name(param_group["state_dtype"])
            settings = {**self.defaults, **param_group}
            validation.check_settings(settings)
            if settings["differentiable"] != (given := self.defaults["differentiable"]):
                raise ValueError(
                    f"differentiable must be the same for all groups, {given!r} as the constructor "
                    f"was given, got {settings['differentiable']!r}"
                )
            # the warmup divides warmup_init_lr by this, even after a scheduler has changed lr
            base_lr = param_group.setdefault("warmup_base_lr", number(settings["lr"]))
            settings["warmup_base_lr"] = base_lr
            if not self._has_warned_of_rate:
                position = len(self.param_groups)
                self._has_warned_of_rate = advice.warn_if_small_rate(settings, position)
            params = param_group["params"]
            if not isinstance(params, Tensor | set):
                param_group["params"] = params = list(params)
            for p in [params] if isinstance(params, Tensor) else params:
                tensor = p[1] if isinstance(p, tuple) else p
                distributed.check_parameter(tensor)
                validation.check_storage(settings, [tensor])
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in added):
            self._given_shapes = None
        elif self._given_shapes is not None:
            self._given_shapes |= {p.shape for p in added}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group.setdefault("warmup_base_lr", number(group["lr"]))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this optimizer or of the authors' released optimizer.

        Load the model's parameters first: the thresholds of a released state are computed from
        them.

        Raises:
            ValueError: the state is one of another optimizer; the groups or shapes do not fit;
                Apollo lacks a saved setting. Nothing has been changed.
        """
        loaded: StateDict = {}

        def before(optimizer: Optimizer, given: StateDict) -> StateDict:
            loaded.update(checkpoint.prepare(given, self.param_groups))
            for saved, group in zip(loaded["param_groups"], self.param_groups, strict=True):
                validation.check_storage(saved, group["params"])
            return loaded

        def after(optimizer: Optimizer) -> None:
            checkpoint.restore(loaded, self.param_groups, self.state)

        # the pre-hook runs after the user's own, the post-hook before them
        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def effective_lrs(self) -> list[float]:
        """Return the learning rate of the next step of each group, with the warmup included.

        A group's ``lr`` is only the rate that the scheduler sets. If parameters of a group have
        taken different numbers of steps, the rate is that of the parameters with the most steps;
        during the warmup the rates of the others are lower. Counters on a GPU (``capturable``) are
        waited for, but only with a warmup.
        """
        return [float(rate_of_next_step(group, self.state)) for group in self.param_groups]

    def __repr__(self) -> str:
        return summary.describe(self)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: function that evaluates the model again and returns the loss.

        Returns:
            The loss that the closure returned, or None without a closure.

        Raises:
            RuntimeError: a gradient is sparse, or the shape of a parameter differs from that of its
                state. Nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first, groups = 0, []
        for group in self.param_groups:
            groups.append((group, group["params"], first))
            first += len(group["params"])
        self._step(groups)
        return loss

    def step_parameter(self, p: Tensor, group: dict[str, Any], position: int) -> None:
        """Update one parameter exactly as :meth:`step` would.

        Args:
            p: a parameter with a gradient.
            group: group of the parameter, an element of ``param_groups``.
            position: position of the parameter among those of all groups; its random bits depend on
                it.

        Raises:
            RuntimeError: as :meth:`step`.
        """
        self._step([(group, [p], position)])

    def _step(self, groups: list[tuple[dict[str, Any], list[Tensor], int]]) -> None:
        """Update parameters, given as (group, some of its parameters, position of the first)."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if torch.compiler.is_compiling():
                if self.defaults["differentiable"]:
                    raise RuntimeError(advice.NOT_COMPILED)  # without fullgraph, it runs untraced
                lists = [self._tensor_lists(*group) for group in groups]
                plan.execute(plan.prepare(lists, plan.TRACED))
                return
            if self._backends is None:
                self._backends = plan.Backends()
            step, new = None, NewState()
            describe = partial(summary.parameter_name, self.param_groups)
            try:
                lists = [self._tensor_lists(*group, new) for group in groups]
                step = plan.prepare(lists, self._backends, describe)
                if (known := self._given_shapes) is not None and advice.warn_of_replaced(
                    new.parameters, known, not self.state, describe
                ):
                    self._given_shapes = None
                plan.execute(step)
            except Exception:
                if step is None or not step.started:
                    new.undo(self.state)
                raise

    def _tensor_lists(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        first: int,
        new: NewState | None = None,
    ) -> Group:
        """Return the tensor lists of the parameters with gradients, and the hyperparameters."""
        lists: Any = [[] for _ in range(9)]  # in the order of TensorLists
        among = None if params is group["params"] else params
        self._init_group(group, *lists, first=first, among=among, new=new)
        return TensorLists(*lists), hyperparameters(group)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        hessian_diags: list[Tensor],
        state_steps: list[Tensor],
        previous_lrs: list[Tensor],
        thresholds: list[Tensor],
        compensations: list[Any],
        rng_keys: list[int],
        *,
        first: int = 0,
        among: list[Tensor] | None = None,
        new: NewState | None = None,
    ) -> None:
        """Append a group's tensors to the lists and create missing state.

        torch.compile recognizes this method by its name. It runs the method without tracing it.

        Args:
            first: position of the group's first parameter in the optimizer.
            among: parameters that take part. None means all of the group.
            new: record of the state that was created or converted, so that it can be undone.
        """
        group["state_dtype"] = dtype_name(group["state_dtype"])
        validation.check_storage(group, group["params"])
        members = group["params"] if among is None else among
        every = [p.grad for p in members]
        grads += [g for g in every if g is not None]
        if len(grads) == len(members):
            params += members
        else:
            params += [p for p, g in zip(members, every, strict=True) if g is not None]
        known = len(self.state)
        states = [self.state[p] for p in params]
        if new is not None and len(self.state) > known:
            new.parameters += [p for p, s in zip(params, states, strict=True) if not s]
        wanted = [("step", state_steps), ("exp_avg", exp_avgs), ("hessian_diag", hessian_diags)]
        if group["decoupled_weight_decay"]:
            wanted.append(("previous_lr", previous_lrs))
        if group["rebound"] == "belief":
            wanted.append(("threshold", thresholds))
        for name, column in wanted:
            try:
                column += map(itemgetter(name), states)
            except KeyError:
                with torch.inference_mode(False):  # later steps may run outside of this mode
                    for p, state in zip(params, states, strict=True):
                        add_missing_state(state, p, group, new)
                column[:] = map(itemgetter(name), states)
        follow_state_dtype(group, params, states, exp_avgs, hessian_diags, new)
        if group["rounding"] == "kahan":
            compensations += compensations_of(params, states, new)
        else:
            for state in [each for each in states if "compensation" in each]:
                drop_compensation(state, new)  # it would be stale if "kahan" were chosen again
        if group["state_dtype"] is not None or not storage.NARROW.isdisjoint(
            {p.dtype for p in params}
        ):
            rng_keys += [
                _rng_key(group["seed"], first + i)
                for i, p in enumerate(members)
                if p.grad is not None
            ]


class ApolloW(Apollo):
    """Implement :class:`Apollo` with decoupled weight decay, which is then on by default.

    All arguments are those of :class:`Apollo`.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ApolloW(model.parameters(), lr=0.5, weight_decay=1e-4)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1.0,
        beta: Scalar = 0.9,
        eps: float = 1e-4,
        sigma: float = 1.0,
        weight_decay: Scalar = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            beta,
            eps,
            sigma,
            weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            **settings,
        )
