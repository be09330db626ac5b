"""The model of a user: ``family = "custom"`` with ``factory = "my_module:make"``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict

from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.signatures import call_arguments, complete_arguments, name_of, takes
from apollo_bench.user_code import checked_object_path, import_object
from apollo_bench.workloads.base_settings import ModelSettings

if TYPE_CHECKING:
    from torch import nn


class CustomModel(ModelSettings):
    """Any nn.Module; all other keys are keyword arguments of its factory, a function or class.

    The task passes some arguments itself, such as the number of classes or words.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    family: Literal["custom"]
    factory: Annotated[str, AfterValidator(checked_object_path)]

    def __str__(self) -> str:
        arguments = ", ".join(f"{key} {value}" for key, value in self.arguments.items())
        return f"{self.factory} ({arguments})" if arguments else self.factory

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that the recipe states."""
        return dict(self.model_extra or {})


def complete_model(model: CustomModel, given_by_task: Sequence[str]) -> CustomModel:
    """Return the settings with the defaults of the factory's signature.

    Args:
        model: settings of a recipe.
        given_by_task: names of the arguments that the task gives.

    Raises:
        ExperimentError: the factory cannot be imported, or does not take the arguments.
    """
    factory = _import_factory(model)
    for name in given_by_task:
        if name in model.arguments:
            raise ExperimentError(
                f"model.{name} is {model.arguments[name]!r}: the data set it; leave it out"
            )
    arguments = complete_arguments(
        factory, model.arguments, "model", positional=0, passed=given_by_task
    )
    return CustomModel.model_validate({"family": "custom", "factory": model.factory, **arguments})


def make_model(model: CustomModel, **given_by_task: Any) -> nn.Module:
    """Call the factory with the recipe's arguments and those of the task that it takes.

    Raises:
        ExperimentError: the factory raises, or does not return an nn.Module.
    """
    from torch import nn  # reading a recipe needs no torch

    factory = _import_factory(model)
    arguments = call_arguments(factory, model.arguments)
    arguments |= {name: value for name, value in given_by_task.items() if takes(factory, name)}
    call = f"{name_of(factory)}({', '.join(f'{key}={x!r}' for key, x in arguments.items())})"
    try:
        made = factory(**arguments)
    except Exception as error:  # the user's code may raise any type
        raise ExperimentError(
            f"model.factory is {model.factory!r}: {call} raised {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ExperimentError(
            f"model.factory is {model.factory!r}: {call} must return an nn.Module, got a "
            f"{type(made).__name__}"
        )
    return made


def _import_factory(model: CustomModel) -> Any:
    factory = import_object(model.factory, "model.factory")
    if not callable(factory):
        raise ExperimentError(
            "model.factory must be a function or class that returns an nn.Module, got "
            f"{model.factory!r}: it is {factory!r}"
        )
    return factory
