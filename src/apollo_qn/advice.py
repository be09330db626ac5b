"""Advice for users who come from another optimizer: warnings, and errors that say what to do."""

from __future__ import annotations

import functools
import reprlib
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

_Call = TypeVar("_Call", bound=Callable[..., Any])


class ApolloWarning(UserWarning):
    """Category of the warnings of this package, for ``warnings.filterwarnings``."""


class LearningRateWarning(ApolloWarning):
    """Category of the warning that a learning rate is one for Adam.

    It has a category of its own, so that a deliberately small rate can be kept without hiding the
    warning about flattened parameters, which means wrong results.
    """


def warn(message: str, category: type[ApolloWarning]) -> None:
    """Give a warning that points at the line that called this package or torch's optimizer."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_internal(module: str) -> bool:
    return module.partition(".")[0] in ("apollo_qn", "torch")


NOT_COMPILED = (
    "differentiable=True cannot be compiled through step(), because the compiler would lose the "
    "derivatives of m and B: compile a function that calls apollo_qn.apollo"
)

# parameters that a wrapper has replaced

_FLATTENED = (
    "takes its first step, but no parameter of that shape was given to this optimizer. Apollo's "
    "sums run over each tensor: where a wrapper has flattened or sharded the parameters (FSDP1, "
    "DeepSpeed ZeRO, apex), the trajectory is another one. Shard with "
    "torch.distributed.fsdp.fully_shard (FSDP2), or give the optimizer the parameters after they "
    "have been changed"
)

_NO_GRADIENT = (
    "step() updates nothing, because no parameter of this optimizer has had a gradient yet. If the "
    "model's parameters have been replaced since (fully_shard, parallelize_module), this optimizer "
    "holds the old ones: make it afterwards"
)


def warn_of_replaced(
    new: Sequence[Tensor],
    given: Collection[torch.Size],
    untouched: bool,
    describe: Callable[[Tensor], str],
) -> bool:
    """Warn where a wrapper seems to have replaced the parameters, and return whether it does.

    Args:
        new: parameters that take their first step. A vector whose shape is not in ``given`` is one
            that a wrapper has flattened.
        given: shapes of the parameters when they were given to the optimizer.
        untouched: whether no parameter has had a gradient yet.
        describe: function that returns the name of a parameter for a message.
    """
    if untouched:
        warn(_NO_GRADIENT, ApolloWarning)
        return True
    vectors = [p for p in new if p.dim() == 1 and p.shape not in given]
    if vectors:
        warn(f"{describe(vectors[0])} {_FLATTENED}", ApolloWarning)
    return len(vectors) > 0


# keywords of other optimizers

_NOTHING = "leave it out, because nothing in Apollo corresponds to it"
_KEYWORDS = {
    # torch.optim
    "betas": "use beta for the first of the two; nothing in Apollo corresponds to the second",
    "momentum": "use beta, and start at ten times the lr of SGD with momentum 0.9",
    "dampening": _NOTHING,
    "nesterov": _NOTHING,
    "amsgrad": _NOTHING,
    "alpha": _NOTHING,
    "centered": _NOTHING,
    "momentum_decay": _NOTHING,
    "lr_decay": "use a scheduler of torch.optim.lr_scheduler",
    # the authors' releases and ports
    "warmup": "use warmup_steps",
    "init_lr": "use warmup_init_lr",
    "weight_decay_type": "use Apollo for 'L2' and ApolloW for 'decoupled'",
    # other libraries
    "beta1": "use beta",
    "beta2": _NOTHING,
    "b1": "use beta",
    "b2": _NOTHING,
    "epsilon": "use eps, but leave it at 1e-4: it is not Adam's eps",
    "learning_rate": "use lr",
    "warmup_ratio": "use warmup_steps, a number of steps",
    "num_warmup_steps": "use warmup_steps",
}
_DECAY_TYPE = "'L2' is the default, and decoupled_weight_decay=True is 'decoupled'"
FUNCTIONAL = {
    **_KEYWORDS,
    "weight_decay_type": _DECAY_TYPE,
    "state_dtype": "the state is yours: make exp_avgs and hessian_diags of that type",
}
_XLA = "leave it out, because XLA compiles the step"
_STORED = "leave it out, and keep the parameters in float32: updates are rounded to the nearest"
OPTAX = {
    **{name: advice for name, advice in _KEYWORDS.items() if name != "learning_rate"},
    "lr": "use learning_rate",
    "weight_decay_type": _DECAY_TYPE,
    "lr_decay": "give learning_rate a schedule",
    # optax
    "eps_root": _NOTHING,
    "mu_dtype": "leave it out: the state is float32 or wider",
    "accumulator_dtype": "leave it out: the state is float32 or wider",
    # apollo_qn.Apollo
    "foreach": _XLA,
    "fused": _XLA,
    "capturable": _XLA,
    "differentiable": "leave it out: JAX differentiates through every update",
    "maximize": "chain optax.scale(-1.0) before the transformation",
    "rounding": _STORED,
    "state_dtype": "leave it out: the state is float32 or wider",
    "seed": _STORED,
}


def check_keywords(
    given: Mapping[str, Any], advice: Mapping[str, str] = _KEYWORDS, name: str = "Apollo"
) -> None:
    """Raise TypeError for the first keyword of another optimizer, and say what to use instead.

    Args:
        given: keyword arguments.
        advice: what to use instead of each keyword that ``name`` lacks.
        name: class or function that was called.
    """
    for keyword, value in given.items():
        if keyword in advice:
            raise TypeError(
                f"{name} has no argument {keyword}, got {keyword}={reprlib.repr(value)}: "
                f"{advice[keyword]}; docs/migrating.md has tables of what corresponds to what"
            )


def advises(function: _Call, advice: Mapping[str, str] = _KEYWORDS, name: str = "Apollo") -> _Call:
    """Return ``function``, giving advice where it gets a keyword of another optimizer.

    The signature stays that of ``function``; another unknown keyword is Python's own TypeError.
    """

    @functools.wraps(function)
    def advising(*args: Any, **kwargs: Any) -> Any:
        check_keywords(kwargs, advice, name)
        return function(*args, **kwargs)

    return cast(_Call, advising)


# learning rates of other optimizers

_SMALLEST_RATE = 0.01  # of lr / sigma; a fiftieth of the paper's smallest rate
_SMALL_RATE = (
    "{name}={lr:g} is a rate for Adam, at which Apollo hardly moves{where}. Apollo's usual rates "
    "are 0.5 to 10 for convolutional networks and, with the gradient's norm clipped to 1, 2 to 4 "
    "for MLPs, LoRA and fine-tuning, 2 to 10 for Transformers and 10 to 100 for LSTMs; {test}"
    "docs/choosing.md says more. If you mean this rate, filter the category "
    "apollo_qn.LearningRateWarning"
)


def warn_if_small_rate(group: Mapping[str, Any], position: int | None) -> bool:
    """Warn if a group starts with a rate that is Adam's, and return whether it does; 0 is not one.

    Where abs(B) is below sigma, the step is that of SGD with momentum at the rate lr / sigma. The
    belief bound does without sigma and has other rates.

    Args:
        group: settings. ``warmup_base_lr`` is the rate that the group was given, before any
            scheduler changed it.
        position: position of the group in the optimizer. None means a transformation of optax.
    """
    lr, sigma = group["warmup_base_lr"], group["sigma"]
    if group["rebound"] != "constant" or not 0 < lr < _SMALLEST_RATE * sigma:
        return False
    name, test = "learning_rate", ""
    details = [] if sigma == 1 else [f"sigma={sigma:g}"]
    if position is not None:
        name, test = "lr", "apollo_qn.lr_range_test proposes one for your model, and "
        details.insert(0, f"parameter group {position}")
    where = f" ({', '.join(details)})" if details else ""
    warn(_SMALL_RATE.format(name=name, lr=lr, where=where, test=test), LearningRateWarning)
    return True


# states of other optimizers

_SETTINGS_OF_STATES = {
    *("betas", "amsgrad", "momentum", "dampening", "nesterov", "alpha", "rho", "lr_decay"),
    *("etas", "lambd", "beta2_decay", "momentum_decay", "max_iter"),
}


def check_origin(state_dict: StateDict) -> None:
    """Raise ValueError for a state of another optimizer of torch.optim, or of no optimizer."""
    if "param_groups" not in state_dict or "state" not in state_dict:
        keys = reprlib.repr([str(key) for key in state_dict])
        raise ValueError(
            "the state must be that of an optimizer, with the keys 'state' and 'param_groups', got "
            f"the keys {keys}. The state of a model is loaded by the model; from a checkpoint of "
            "several states take the optimizer's, such as checkpoint['optimizer']"
        )
    for group in state_dict["param_groups"]:
        found = sorted(_SETTINGS_OF_STATES & set(group))
        if not found or "beta" in group:  # as all states of Apollo and its authors' releases have
            continue
        origin = "another optimizer"
        if "amsgrad" in group:
            origin = "Adam or AdamW"
        elif "dampening" in group:
            origin = "SGD"
        raise ValueError(
            f"the state must be one of Apollo, got one of {origin} (its groups have "
            f"{', '.join(found)}). Its averages are no curvature, and its lr is no rate for "
            "Apollo. Load the model's weights alone, and start with a new Apollo and a new "
            "scheduler; docs/migrating.md says with which settings"
        )
