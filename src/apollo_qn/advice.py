"""Advice for users who come from another optimizer: warnings, and errors that say what to do."""

from __future__ import annotations

import functools
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch.optim.optimizer import StateDict

_Init = TypeVar("_Init", bound=Callable[..., None])


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


def check_keywords(given: Mapping[str, Any]) -> None:
    """Raise TypeError for the first keyword of another optimizer, and say what to use instead."""
    for name, value in given.items():
        if name in _KEYWORDS:
            raise TypeError(
                f"Apollo has no argument {name}, got {name}={reprlib.repr(value)}: "
                f"{_KEYWORDS[name]}; docs/migrating.md has tables of what corresponds to what"
            )


def advises(init: _Init) -> _Init:
    """Return a constructor that gives advice where it gets a keyword of another optimizer.

    The signature stays that of ``init``; another unknown keyword is Python's own TypeError.
    """

    @functools.wraps(init)
    def advising(*args: Any, **kwargs: Any) -> None:
        check_keywords(kwargs)
        init(*args, **kwargs)

    return cast(_Init, advising)


# learning rates of other optimizers

_SMALLEST_RATE = 0.01  # of lr / sigma; a fiftieth of the paper's smallest rate
_SMALL_RATE = (
    "lr={lr:g} is a rate for Adam, at which Apollo hardly moves (parameter group {group}{sigma}). "
    "Apollo's usual rates are 0.5 to 5 for convolutional networks, 2 to 4 for MLPs, LoRA and "
    "fine-tuning and, with the gradient's norm clipped to 1, 10 to 100 for LSTMs and 2 to 10 for "
    "Transformers; "
    "apollo_qn.lr_range_test proposes one for your model, and docs/choosing.md says more. If you "
    "mean this rate, filter the category apollo_qn.LearningRateWarning"
)


def warn_if_small_rate(group: Mapping[str, Any], position: int) -> bool:
    """Warn if a group starts with a rate that is Adam's, and return whether it does; 0 is not one.

    Where abs(B) is below sigma, the step is that of SGD with momentum at the rate lr / sigma. The
    belief bound does without sigma and has other rates. ``warmup_base_lr`` is the rate that the
    group was given, before any scheduler changed it.
    """
    lr, sigma = group["warmup_base_lr"], group["sigma"]
    if group["rebound"] != "constant" or not 0 < lr < _SMALLEST_RATE * sigma:
        return False
    where = "" if sigma == 1 else f", sigma={sigma:g}"
    warn(_SMALL_RATE.format(lr=lr, group=position, sigma=where), LearningRateWarning)
    return True


# states of other optimizers

_SETTINGS_OF_STATES = {
    *("betas", "amsgrad", "momentum", "dampening", "nesterov", "alpha", "rho", "lr_decay"),
    *("etas", "lambd", "beta2_decay", "momentum_decay", "max_iter"),
}


def check_origin(state_dict: StateDict) -> None:
    """Raise ValueError for a state of another optimizer of torch.optim."""
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
