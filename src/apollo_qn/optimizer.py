"""The class: hyperparameters, groups, state and step; the mathematics is in ``rule.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from apollo_qn import checkpoint, ranges, rounding, sharded
from apollo_qn.backends import Group
from apollo_qn.functional import Kept, check_back_end_choice, check_rounding, run, warmup_share
from apollo_qn.rounding import Rounding
from apollo_qn.rule import Hyperparameters, Rebound, Scalar

if TYPE_CHECKING:
    from apollo_qn.gradient_release import GradientRelease


_STORING = ("rounding", "state_dtype", "seed")


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

    Of a sharded parameter (DTensor: ``fully_shard``, tensor parallelism) the state is sharded alike
    and the sums are still those of the whole tensor, at the price of one small all-reduce a step
    and mesh. All ranks must have gradients of the same parameters.

    lr and sigma are coupled (Theorem 1): (c lr, c sigma) gives the same trajectory for any c > 0,
    so tune one of them.

    Args:
        params: tensors, (name, tensor) pairs or group dicts; a group may override every keyword.
        lr: learning rate eta, a float >= 0 or a tensor of one element.
        beta: decay of the moving average of gradients, in [0, 1).
        eps: added to \|\|d\|\|_4 after division by sigma, >= 0.
        sigma: convexity threshold, > 0 (section 3.3); unused with ``rebound="belief"``.
        weight_decay: >= 0; added to the gradient (L2), as in the paper's experiments.
        decoupled_weight_decay: add weight_decay * theta to the direction instead
            (Loshchilov & Hutter, 2019); the secant condition accounts for it.
        rebound: ``"constant"``, the paper's max(\|B\|, sigma), or ``"belief"``, the authors' later
            max(\|B\|, max\|g - m\|) + eps / alpha, which needs eps > 0.
        warmup_steps: steps over which the rate rises linearly from ``warmup_init_lr`` to ``lr``
            (section 3.4), a whole number >= 0; 0 turns it off. It multiplies ``group["lr"]``, so
            that every scheduler of ``torch.optim.lr_scheduler`` composes with it (OneCycleLR and
            CyclicLR with ``cycle_momentum=False``: there is no momentum of that name).
        warmup_init_lr: rate of the first step, >= 0; None: lr / 1000.
        foreach: True: all tensors together; False: one by one; None: the fastest that serves.
        fused: True demands the fused kernel: in CPU memory for float32, bfloat16 and float64
            tensors, on CUDA and ROCm devices (a Triton kernel) for float16 too; others fall back
            one by one. False forbids it; None: the fastest that serves.
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
            rounded stochastically; not for complex parameters.
        seed: of the random bits, a whole number in [0, 2**64). They are a function of seed,
            position of the parameter in the optimizer, step and element, the same on every back
            end; a run that is resumed draws what it would have drawn.

    Raises:
        ValueError: a hyperparameter out of its range, named with its value; a parameter that FSDP1
            has flattened; a state of a wrong shape when one is loaded.
        RuntimeError: a sparse gradient; a choice of back end that cannot be served.

    Nothing is changed where an error is raised. Do not change ``sigma``, ``beta``, ``eps`` or
    ``weight_decay`` of a group lightly in mid-run: the direction of the step before is rebuilt with
    the new values.
    """

    _kept: Kept | None = None  # from step to step
    _modes: list[tuple[Any, ...]] | None = None  # how each group stored its numbers, last step
    _streams: dict[Tensor, int] | None = None  # the word of each parameter's random bits
    _release: GradientRelease | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1.0,
        beta: float = 0.9,
        eps: float = 1e-4,
        sigma: float = 1.0,
        weight_decay: float = 0.0,
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
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
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
            "state_dtype": state_dtype,
            "seed": seed,
        }
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises as the constructor does, before anything is changed."""
        if isinstance(param_group, dict):
            settings = {**self.defaults, **param_group}
            _check_hyperparameters(settings)
            lr = settings["lr"]
            # what warmup_init_lr is a share of, whatever a scheduler makes of lr later
            param_group.setdefault("warmup_base_lr", float(lr))
            params = param_group["params"]
            if not isinstance(params, Tensor | set):
                param_group["params"] = params = list(params)
            for p in [params] if isinstance(params, Tensor) else params:
                tensor = p[1] if isinstance(p, tuple) else p
                sharded.check_parameter(tensor)
                _check_storing(settings, [tensor])
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group.setdefault("warmup_base_lr", float(group["lr"]))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this optimizer, or of the authors' released one.

        Load the model's parameters first: the released state's thresholds are recovered with them.

        Raises:
            ValueError: the groups or shapes do not fit, or a setting has no counterpart here;
                nothing is changed.
        """
        loaded: StateDict = {}
        self._kept = self._modes = None  # it would keep the state before alive
        if self._release is not None:
            self._release._forget()

        def before(optimizer: Optimizer, given: StateDict) -> StateDict:
            loaded.update(checkpoint.translated(given, self.param_groups))
            checkpoint.check(loaded, self.param_groups)
            saved = loaded["param_groups"]
            # a state that says nothing of storing, as older ones do, is stored as the groups say
            loaded["param_groups"] = [
                {**{name: group[name] for name in _STORING}, **its}
                for group, its in zip(self.param_groups, saved, strict=True)
            ]
            for its, group in zip(loaded["param_groups"], self.param_groups, strict=True):
                _check_storing(its, group["params"])
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

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: a gradient is sparse; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:
            self._release._end_step()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._settle()
            groups = [self._group(group, group["params"]) for group in self.param_groups]
            self._kept = run(groups, self._kept)
        return loss

    def _step_of(self, p: Tensor, group: dict[str, Any], kept: Kept | None = None) -> Kept:
        """The step of one parameter alone; it is what :meth:`step` does to it.

        Args:
            p: has a gradient.
            group: of which it is.
            kept: what the last call with this parameter returned.
        """
        with torch.no_grad():
            self._settle()
            return run([self._group(group, [p])], kept)

    def _settle(self) -> None:
        """Make the state what the groups say of storing it, where that has changed."""
        modes = [
            (*(group[k] for k in _STORING), len(group["params"])) for group in self.param_groups
        ]
        if modes == self._modes:
            return
        for group in self.param_groups:
            _check_storing(group, group["params"])
        self._kept = None  # it would keep what is replaced alive
        streams: dict[Tensor, int] = {}
        for group in self.param_groups:
            for p in group["params"]:
                streams[p] = rounding.stream(group["seed"], len(streams))
                state = self.state.get(p)
                if not state:
                    continue
                low = state.get("compensation")
                if _rounding(group) != "kahan" or (low is not None and low.dtype is not p.dtype):
                    state.pop("compensation", None)  # it would be stale when kahan comes again
                for name in checkpoint.TENSORS:
                    dtype = checkpoint.stored_dtype(state[name].dtype, p, group["state_dtype"])
                    state[name] = state[name].to(dtype)
        self._modes, self._streams = modes, streams

    def _streams_of(self, params: list[Tensor]) -> list[int]:
        streams = self._streams or {}
        if not all([p in streams for p in params]):  # one has been replaced
            self._modes = None
            self._settle()
            streams = self._streams or {}
        return [streams[p] for p in params]

    def _group(self, group: dict[str, Any], params: list[Tensor]) -> Group:
        """What a step does to these parameters of a group."""
        h = hyperparameters(group)
        # no assignment within: torch.compile breaks its graph there
        grads = [p.grad for p in params if p.grad is not None]
        if len(grads) < len(params):
            params = [p for p in params if p.grad is not None]
        states = [self.state[p] for p in params]
        modes = (("previous_lr", h.decoupled_weight_decay), ("threshold", h.belief))
        needed = ["step", *(name for name, on in modes if on)]
        for name in needed:
            for i in [i for i, state in enumerate(states) if name not in state]:
                self._complete(states[i], params[i], group, h)
        compensations = None
        if h.rounding == "kahan":
            for state, p in zip(states, params, strict=True):
                low = state.get("compensation")
                if low is not None and low.dtype is not p.dtype:
                    del state["compensation"]  # of what the parameter was before
                if "compensation" not in state and p.dtype in rounding.DROPPED:
                    state["compensation"] = torch.zeros_like(p)
            compensations = [state.get("compensation") for state in states]
        return Group(
            h,
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["hessian_diag"] for s in states],
            [s["step"] for s in states],
            [s["previous_lr"] for s in states] if h.decoupled_weight_decay else None,
            [s["threshold"] for s in states] if h.belief else None,
            compensations,
            self._streams_of(params),
            foreach=group["foreach"],
            fused=group["fused"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
        )

    def _complete(
        self, state: dict[str, Any], p: Tensor, group: dict[str, Any], h: Hyperparameters
    ) -> None:
        """Add to a parameter's state what is missing of it."""
        if "step" not in state:
            state["step"] = _scalar(p, group["capturable"])
            for name in checkpoint.TENSORS:
                state[name] = torch.zeros_like(
                    p,
                    dtype=group["state_dtype"] or checkpoint.state_dtype(p),
                    memory_format=torch.preserve_format,
                )
        if h.decoupled_weight_decay and "previous_lr" not in state:
            # the mode was chosen in mid-run: the rate of the step before is that of now
            state["previous_lr"] = _scalar(p, group["capturable"], torch.float64)
            state["previous_lr"] += h.lr
        if h.belief and "threshold" not in state:
            real = checkpoint.state_dtype(p).to_real()
            state["threshold"] = torch.full((), h.sigma, dtype=real, device=p.device)


class ApolloW(Apollo):
    """:class:`Apollo` with decoupled weight decay; its arguments are Apollo's."""

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1.0,
        beta: float = 0.9,
        eps: float = 1e-4,
        sigma: float = 1.0,
        weight_decay: float = 0.0,
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


def _scalar(p: Tensor, capturable: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    if capturable and not p.is_cpu:
        return torch.zeros((), dtype=torch.float32, device=p.device)
    # whatever torch.set_default_device says: it is read on the host
    return torch.zeros((), dtype=dtype, device="cpu")


def hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    """What a parameter group says of its next step."""
    lr = group["lr"]
    return Hyperparameters(
        lr=lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr,
        beta=group["beta"],
        eps=group["eps"],
        sigma=group["sigma"],
        weight_decay=group["weight_decay"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        rebound=group["rebound"],
        warmup_steps=group["warmup_steps"],
        warmup_start=warmup_share(group["warmup_init_lr"], group["warmup_base_lr"])
        if group["warmup_steps"]
        else 1.0,
        maximize=group["maximize"],
        rounding=_rounding(group),
    )


def _rounding(group: dict[str, Any]) -> Rounding:
    chosen: Rounding | None = group["rounding"]
    return chosen or rounding.DEFAULT


def _check_hyperparameters(given: dict[str, Any]) -> None:
    lr = given["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(
                f"lr must be a tensor of one real element, got shape {tuple(lr.shape)}"
            )
        given = {**given, "lr": float(lr)}
    ranges.check(given)
    _check_storing(given)
    check_back_end_choice(given["foreach"], given["fused"], given["differentiable"])


def _check_storing(given: dict[str, Any], params: Iterable[Any] = ()) -> None:
    """Raise ValueError for a way of storing numbers that there is not, or not for these tensors."""
    check_rounding(given["rounding"], given["seed"])
    chosen = given["state_dtype"]
    if chosen not in (None, torch.bfloat16):
        raise ValueError(
            f"state_dtype must be None (float32 at least) or torch.bfloat16, got {chosen!r}"
        )
    if chosen is not None and any(isinstance(p, Tensor) and p.is_complex() for p in params):
        raise ValueError(f"state_dtype must be None for complex parameters, got {chosen}")
