"""The class: groups, state, step and hooks; the mathematics is in ``algorithm.py``."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from apollo_qn import checkpoint, distributed, plan
from apollo_qn import rounding as storage
from apollo_qn.backends.base import TensorLists
from apollo_qn.distributed import Group
from apollo_qn.hyperparameters import (
    Hyperparameters,
    Rebound,
    Scalar,
    warmup_start,
)
from apollo_qn.rounding import Rounding
from apollo_qn.state import (
    NewState,
    compensations_of,
    complete,
    follow_state_dtype,
)
from apollo_qn.validation import check_settings, check_storage, dtype_name, is_traced, number

_rng_stream = lru_cache(maxsize=1 << 16)(storage.rng_stream)
_made = itertools.count()  # optimizers of this process


_FLATTENED = (
    "takes its first step, but no parameter of that shape was given to this optimizer. Apollo's "
    "sums run over each tensor: where a wrapper has flattened or sharded the parameters (FSDP1, "
    "DeepSpeed ZeRO, apex), the trajectory is another one. Shard with "
    "torch.distributed.fsdp.fully_shard (FSDP2), or give the optimizer the parameters after they "
    "have been changed"
)


class ApolloWarning(UserWarning):
    """Category of the warnings of this package, for ``warnings.filterwarnings``."""


class Apollo(Optimizer):
    r"""APOLLO, the adaptive parameter-wise diagonal quasi-Newton method (Ma, 2020, Algorithm 1).

    For each parameter tensor, with state m = B = 0 and t = 0, 1, ...:

    .. code-block:: text

        alpha  = (1 - beta) / (1 - beta^(t+1))
        m'     = m + alpha (g - m)                                            eq. (9)
        d      = m / max(|B|, sigma)                       direction of the step before
        a      = (<d, m' - m> + <d, B d>) / (||d||_4 + eps / sigma)^4
        B'     = B - a d^2                                                    eq. (8)
        theta' = theta - lr m' / max(|B'|, sigma)                             eq. (11)

    The sums run over the whole tensor. d is rebuilt from m and B, so that the state is two tensors
    of the parameter's shape, ``exp_avg`` (m) and ``hessian_diag`` (B), float32 at least unless
    ``state_dtype`` says otherwise, and 0-dim tensors: ``step``, with decoupled decay
    ``previous_lr``, with belief ``threshold``. ``rounding="kahan"`` adds ``compensation``.

    The state of a sharded parameter (DTensor: ``fully_shard``, tensor parallelism) is sharded as
    the parameter is. The sums are still those of the whole tensor, at the price of one small
    all-reduce per step and mesh. All ranks must have gradients of the same parameters.

    lr and sigma are coupled (Theorem 1): (c lr, c sigma) gives the same trajectory for any c > 0,
    so tune one of them.

    Args:
        params: tensors, (name, tensor) pairs or group dicts; a group may override every keyword
            but ``differentiable``.
        lr: learning rate eta, a float >= 0 or a tensor of one element.
        beta: decay of the moving average of gradients, in [0, 1). With ``differentiable`` a tensor
            of one element too.
        eps: added to \|\|d\|\|_4 after division by sigma, >= 0.
        sigma: convexity threshold, > 0 (section 3.3); unused with ``rebound="belief"``.
        weight_decay: >= 0; added to the gradient (L2), as in the paper's experiments. With
            ``differentiable`` a tensor of one element too.
        decoupled_weight_decay: add weight_decay * theta to the direction instead
            (Loshchilov & Hutter, 2019); the secant condition accounts for it.
        rebound: ``"constant"``, the paper's max(\|B\|, sigma), or ``"belief"``, the authors' later
            max(\|B\|, max\|g - m\|) + eps / alpha, which needs eps > 0.
        warmup_steps: steps over which the rate rises linearly from ``warmup_init_lr`` to ``lr``
            (section 3.4), a whole number >= 0; 0 turns it off. It multiplies ``group["lr"]``, so
            that every scheduler of ``torch.optim.lr_scheduler`` composes with it (OneCycleLR and
            CyclicLR with ``cycle_momentum=False``: there is no momentum of that name).
        warmup_init_lr: rate of the first step, >= 0; None: lr / 1000.
        foreach: True: all tensors together; False: one by one; None: the default back end.
        fused: True demands the fused kernel: in CPU memory for float32, bfloat16 and float64
            tensors, on CUDA and ROCm devices (a Triton kernel) for float16 too; others fall back
            one by one. False forbids it. None: the fused kernel on a CPU, foreach elsewhere.
        maximize: ascend instead of descend.
        capturable: keep ``step`` on the parameters' device, so that a step can be captured in a
            CUDA graph.
        differentiable: let autograd run through the step.
        rounding: how a bfloat16 or float16 parameter takes its update, which is computed in
            float32; others ignore it. ``"nearest"`` loses updates of less than half a unit in the
            last place. ``"stochastic"`` rounds up or down by chance, so that they count in the
            mean. ``"kahan"`` keeps what is cut off in a third state tensor of the parameter's type
            (a sum of a high and a low number: theta is parameter + ``compensation``). None:
            ``"stochastic"``.
        state_dtype: type of m and B: None, float32 at least, or ``torch.bfloat16``, of which B is
            rounded stochastically; not for complex parameters. Groups store it as a string.
        seed: seed of the random bits of stochastic rounding, a whole number in [0, 2**64). None:
            drawn from torch's default generator, or, in a run of several processes, the number of
            optimizers made before, so that all ranks agree. It is saved with the group. The bits
            are a function of seed, position of the parameter in the optimizer, step and element,
            the same on every back end, so that a resumed run draws what it would have drawn.

    Raises:
        ValueError: a hyperparameter out of its range, named with its value; a parameter that FSDP1
            has flattened; a state of a wrong shape when one is loaded.
        RuntimeError: a sparse gradient; a choice of back end that cannot be served.

    Nothing is changed where an error is raised. Do not change ``sigma``, ``beta``, ``eps`` or
    ``weight_decay`` of a group lightly in mid-run: the direction of the step before is rebuilt with
    the new values.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=100)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _backends: plan.Backends | None = None
    _given_shapes: set[torch.Size] | None = None  # of the parameters when they were given
    _has_warned = False
    # torch's generator before and after the default seed was drawn
    _drawn_seed: tuple[Tensor, Tensor] | None = None

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
        seed = self._default_seed() if seed is None else seed
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
            "seed": seed,
        }
        check_settings(defaults)
        super().__init__(params, defaults)

    def _default_seed(self) -> int:
        made = next(_made)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # replicas must round alike, and the generators of the ranks need not agree
            return made
        if is_traced():
            return made  # a fake tensor has no number
        before = torch.get_rng_state()
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        self._drawn_seed = (before, torch.get_rng_state())
        return seed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises as the constructor does, before anything is changed."""
        if isinstance(param_group, dict):
            if "state_dtype" in param_group:
                param_group["state_dtype"] = dtype_name(param_group["state_dtype"])
            settings = {**self.defaults, **param_group}
            check_settings(settings)
            if settings["differentiable"] != self.defaults["differentiable"]:
                raise ValueError(
                    "differentiable must be the same for all groups, got "
                    f"{settings['differentiable']!r} in a group of an optimizer with "
                    f"{self.defaults['differentiable']!r}: give the constructor the value"
                )
            # warmup_init_lr is divided by it, whatever a scheduler makes of lr later
            param_group.setdefault("warmup_base_lr", number(settings["lr"]))
            params = param_group["params"]
            if not isinstance(params, Tensor | set):
                param_group["params"] = params = list(params)
            for p in [params] if isinstance(params, Tensor) else params:
                tensor = p[1] if isinstance(p, tuple) else p
                distributed.check_parameter(tensor)
                check_storage(settings, [tensor])
        super().add_param_group(param_group)
        if self._given_shapes is None:
            self._given_shapes = set()
        lazy = torch.nn.parameter.UninitializedParameter
        members = self.param_groups[-1]["params"]
        self._given_shapes |= {p.shape for p in members if not isinstance(p, lazy)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group.setdefault("warmup_base_lr", number(group["lr"]))
            group["state_dtype"] = dtype_name(group["state_dtype"])

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this optimizer, or of the authors' released one.

        Load the model's parameters first: the released state's thresholds are recovered with them.

        Raises:
            ValueError: the groups or shapes do not fit, or a setting has no counterpart here;
                nothing is changed.
        """
        loaded: StateDict = {}

        def before(optimizer: Optimizer, given: StateDict) -> StateDict:
            loaded.update(checkpoint.prepared(given, self.param_groups))
            for its, group in zip(loaded["param_groups"], self.param_groups, strict=True):
                check_storage(its, group["params"])
            return loaded

        def after(optimizer: Optimizer) -> None:
            checkpoint.restore(loaded, self.param_groups, self.state)

        # after the user's own hooks, and before them
        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self._return_drawn_seed()

    def _return_drawn_seed(self) -> None:
        """Give the default seed, which the loaded one replaces, back to torch's generator.

        A resumed run then goes on with the random numbers of the run that it continues.
        """
        drawn, self._drawn_seed = self._drawn_seed, None
        if drawn is not None and torch.equal(drawn[1], torch.get_rng_state()):
            torch.set_rng_state(drawn[0])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter has another shape than its state;
                nothing has been changed.
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
        """Do the step of one parameter alone: what :meth:`step` does to it.

        Args:
            p: a parameter with a gradient.
            group: its group, an element of ``param_groups``.
            position: its position among the parameters of all groups, from which its random bits
                follow.

        Raises:
            RuntimeError: as :meth:`step` does.
        """
        self._step([(group, [p], position)])

    def _step(self, groups: list[tuple[dict[str, Any], list[Tensor], int]]) -> None:
        """Do the step of some parameters of some groups, with the position of each one's first."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if torch.compiler.is_compiling():
                lists = [self._tensor_lists(*some) for some in groups]
                plan.execute(plan.prepare(lists, plan.TRACED))
                return
            if self._backends is None:
                self._backends = plan.Backends()
            step, new = None, NewState()
            try:
                lists = [self._tensor_lists(*some, new) for some in groups]
                step = plan.prepare(lists, self._backends, self._describe)
                plan.execute(step)
            except Exception:
                if step is None or not step.started:
                    new.remove(self.state)
                raise
            if new.entries and self._given_shapes and not self._has_warned:
                others = [p for p in new.parameters if p.shape not in self._given_shapes]
                if others:
                    self._has_warned = True
                    told = f"{self._describe(others[0])} {_FLATTENED}"
                    warnings.warn(told, ApolloWarning, stacklevel=3)

    def _tensor_lists(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        first: int,
        new: NewState | None = None,
    ) -> Group:
        """Return the tensors of a group that have gradients, and its hyperparameters."""
        lists: Any = [[] for _ in range(9)]  # in the order of TensorLists
        some = None if params is group["params"] else params
        self._init_group(group, *lists, first=first, among=some, new=new)
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
        rng_streams: list[int],
        *,
        first: int = 0,
        among: list[Tensor] | None = None,
        new: NewState | None = None,
    ) -> None:
        """Fill the lists with what a step of a group needs; make the state that is missing.

        torch.compile runs this method as it is, by its name, and traces only what follows.

        Args:
            first: position of the group's first parameter in the optimizer.
            among: the parameters that take part; None: all of the group.
            new: collects what was made, so that it can be removed again.
        """
        group["state_dtype"] = dtype_name(group["state_dtype"])
        check_storage(group, group["params"])
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
        wanted = [
            ("step", state_steps),
            ("exp_avg", exp_avgs),
            ("hessian_diag", hessian_diags),
        ]
        if group["decoupled_weight_decay"]:
            wanted.append(("previous_lr", previous_lrs))
        if group["rebound"] == "belief":
            wanted.append(("threshold", thresholds))
        for name, column in wanted:
            try:
                column += map(itemgetter(name), states)
            except KeyError:
                with torch.inference_mode(False):  # the state may be used outside of this mode
                    for p, state in zip(params, states, strict=True):
                        complete(state, p, group, new)
                column[:] = map(itemgetter(name), states)
        follow_state_dtype(group, params, states, exp_avgs, hessian_diags)
        if group["rounding"] == "kahan":
            compensations += compensations_of(params, states, new)
        else:
            for state in states:
                if "compensation" in state:
                    del state["compensation"]  # it would be stale if kahan came again
        if group["state_dtype"] is not None or not storage.NARROW.isdisjoint(
            {p.dtype for p in params}
        ):
            rng_streams += [
                _rng_stream(group["seed"], first + i)
                for i, p in enumerate(members)
                if p.grad is not None
            ]

    def _describe(self, p: Tensor) -> str:
        """Return how a message calls a parameter."""
        for group in self.param_groups:
            for name, q in zip(group.get("param_names", ()), group["params"], strict=False):
                if q is p:
                    return f"the parameter {name!r} of shape {tuple(p.shape)}"
        return f"a parameter of shape {tuple(p.shape)}"


class ApolloW(Apollo):
    """:class:`Apollo` with decoupled weight decay; its arguments are Apollo's."""

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


def hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    """Return the settings of a parameter group for its next step."""
    lr, steps = group["lr"], group["warmup_steps"]
    return Hyperparameters(
        lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr,
        group["beta"],
        group["eps"],
        group["sigma"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        group["rebound"],
        steps,
        warmup_start(group["warmup_init_lr"], group["warmup_base_lr"]) if steps else 1.0,
        group["maximize"],
        group["rounding"] or storage.DEFAULT,
        group["foreach"],
        group["fused"],
        group["capturable"],
        group["differentiable"],
    )
