"""Settings of an optimizer that a recipe names by its class, as ``"my_module:MyOptimizer"``."""

from __future__ import annotations

import functools
import inspect
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from apollo_bench.config_section import ConfigSection, EqualStrength, NonNegative, Positive
from apollo_bench.errors import ExperimentError
from apollo_bench.optional_imports import import_optional
from apollo_bench.signatures import complete_arguments, name_of, takes
from apollo_bench.user_code import checked_object_path, import_object


class ShortName(NamedTuple):
    """The class that a short name stands for, and its arguments."""

    path: str
    arguments: tuple[tuple[str, Any], ...] = ()


_LIBRARY = "pytorch_optimizer"  # from packages that apollo-bench does not depend on
_MORE = {
    "nesterov": ShortName("torch.optim:SGD", (("momentum", 0.9), ("nesterov", True))),
    "adabelief": ShortName(f"{_LIBRARY}:AdaBelief"),
    "lion": ShortName(f"{_LIBRARY}:Lion"),
    "soap": ShortName(f"{_LIBRARY}:SOAP"),
    "sophia": ShortName(f"{_LIBRARY}:SophiaH"),
}


@functools.cache
def short_names() -> dict[str, ShortName]:
    """Return the classes of torch.optim by their names in small letters, and some others."""
    import torch

    classes = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
    return {name.lower(): ShortName(f"torch.optim:{name}") for name in sorted(classes)} | _MORE


class CustomSettings(ConfigSection):
    """Settings of any torch.optim.Optimizer; all other keys are keyword arguments of its class.

    ``apply_defaults`` checks them against the signature. Until then a value may be missing.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), serialize_by_alias=True)

    class_path: Annotated[str, AfterValidator(checked_object_path)] = Field(alias="class")
    lr: Positive | None = None
    weight_decay: NonNegative | EqualStrength | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_short_name(cls, table: Any) -> Any:
        if not isinstance(table, dict) or "class" in table:
            return table
        others = dict(table)
        short = short_names()[others.pop("method")]
        return {"class": short.path, **dict(short.arguments), **others}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that the recipe states."""
        numbers = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {
            **{name: value for name, value in numbers.items() if value is not None},
            **(self.model_extra or {}),
        }


def apply_defaults(settings: CustomSettings, key: str) -> CustomSettings:
    """Return the settings with the defaults of the class's signature.

    Args:
        settings: settings of a recipe.
        key: table of the recipe, for example ``"optimizers.mine"``; errors begin with it.

    Raises:
        ExperimentError: the class cannot be imported or is no optimizer, or its signature does not
            take the arguments.
    """
    target = import_optimizer(settings, key)
    arguments = settings.arguments
    # resolved by the recipe: the signature only says whether there is such an argument
    coupled = isinstance(settings.weight_decay, EqualStrength)
    if coupled:
        arguments["weight_decay"] = 0.0
    if not takes(target, "lr"):
        raise ExperimentError(
            f"{key}.class is {settings.class_path!r}: {name_of(target)} has no argument lr, which "
            "the learning rate schedule changes"
        )
    arguments = complete_arguments(target, arguments, key)
    if isinstance(arguments.get("lr"), bool) or not isinstance(arguments.get("lr"), int | float):
        raise ExperimentError(
            f"{key}.lr is missing; {name_of(target)} has no number as its default"
        )
    decay = arguments.get("weight_decay")
    if coupled:
        arguments["weight_decay"] = settings.weight_decay
    elif not isinstance(decay, int | float):
        arguments.pop("weight_decay", None)
    return CustomSettings.model_validate({"class": settings.class_path, **arguments})


def import_optimizer(settings: CustomSettings, key: str) -> Any:
    """Return the class, or the function that returns an optimizer.

    Raises:
        ExperimentError: it cannot be imported, is neither, or takes no step without a closure.
    """
    import torch

    if settings.class_path.startswith(f"{_LIBRARY}:"):
        import_optional(_LIBRARY, f"{key}.class {settings.class_path!r}")
    target = import_object(settings.class_path, f"{key}.class")
    fault = None
    if not callable(target):
        fault = f"it is {target!r}"
    elif inspect.isclass(target) and not issubclass(target, torch.optim.Optimizer):
        fault = f"{name_of(target)} is no torch.optim.Optimizer"
    if fault is not None:
        raise ExperimentError(
            f"{key}.class must be a subclass of torch.optim.Optimizer or a function that returns "
            f"one, got {settings.class_path!r}: {fault}"
        )
    if inspect.isclass(target) and not _steps_without_closure(target):
        raise ExperimentError(
            f"{key}.class is {settings.class_path!r}: {name_of(target)}.step needs a closure; "
            "training calls step()"
        )
    return target


def _steps_without_closure(target: Any) -> bool:
    try:
        parameters = list(inspect.signature(target.step).parameters.values())[1:]
    except (TypeError, ValueError):
        return True
    return not any(
        p.default is inspect.Parameter.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        for p in parameters
    )
