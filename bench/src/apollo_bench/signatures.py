"""Check free keyword arguments against the signature of the class or function that takes them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from apollo_bench.errors import ExperimentError

# arguments that choose an implementation: recorded only if the user states them
_TECHNICAL = ("capturable", "differentiable", "foreach", "fused")
_KINDS = {bool: "true or false", int: "a number", float: "a finite number", str: "a text"}
_PLAIN = (inspect.Parameter.empty, *_KINDS, *(kind.__name__ for kind in _KINDS))
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def complete_arguments(
    target: Any,
    given: Mapping[str, Any],
    key: str,
    positional: int = 1,
    passed: Sequence[str] = (),
) -> dict[str, Any]:
    """Return keyword arguments with the defaults of the signature, as JSON has them.

    Args:
        target: class or function.
        given: keyword arguments of the recipe.
        key: table of the recipe, for example ``"optimizers.mine"``; errors begin with it.
        positional: number of leading arguments that the caller passes itself.
        passed: names of more arguments that the caller passes itself.

    Raises:
        ExperimentError: an argument is unknown, missing or of another type than its default.
    """
    for name, value in given.items():
        if not _is_plain(value):
            raise ExperimentError(
                f"{key}.{name} must be a finite number, true, false, a text, or a list or table of "
                f"these, got {value!r}"
            )
    parameters = _parameters(target)
    if parameters is None:  # a class in C has no signature; only itself can check
        return dict(given)
    accepted = list(parameters.values())[positional:]
    named = {p.name: p for p in accepted if p.kind in _NAMED and p.name not in passed}
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted):
        for name in given.keys() - named.keys():
            raise ExperimentError(
                f"{key}.{name} is {given[name]!r}: {name_of(target)} has no such argument; "
                f"allowed are {', '.join(named) or 'none'}"
            )
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise ExperimentError(f"{key}.{name} is missing; {name_of(target)} needs it")
    defaults = {
        name: _checked(_as_json(parameter.default), parameter, key)
        for name, parameter in named.items()
        if name not in _TECHNICAL and _is_simple(parameter.default)
    }
    checked = {
        name: _checked(value, named[name], f"{key}.{name}") if name in named else value
        for name, value in given.items()
    }
    return {**defaults, **checked}


def call_arguments(target: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON's keyword arguments as the signature has them: a list as a tuple."""
    parameters = _parameters(target) or {}
    return {
        name: tuple(value)
        if isinstance(value, list)
        and name in parameters
        and isinstance(parameters[name].default, tuple)
        else value
        for name, value in settings.items()
    }


def unknown_arguments(target: Any, given: Mapping[str, Any]) -> list[str]:
    """Return the arguments that only the ``**kwargs`` of a signature takes."""
    parameters = _parameters(target)
    return [] if parameters is None else [name for name in given if name not in parameters]


def takes(target: Any, name: str) -> bool:
    """Return whether a signature takes an argument of this name."""
    parameters = _parameters(target)
    if parameters is None:
        return True
    return name in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def name_of(target: Any) -> str:
    """Return the name of a class or function."""
    return str(getattr(target, "__name__", None) or type(target).__name__)


def _parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def _is_simple(value: Any) -> bool:
    """Return whether a default can be stored in run.json."""
    if isinstance(value, list | tuple):
        return all(_is_simple(one) for one in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | int | str)


def _is_plain(value: Any) -> bool:
    """Return whether ``run.json`` can hold a value of a recipe."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, list):
        return all(_is_plain(one) for one in value)
    return value is None or _is_simple(value)


def _as_json(value: Any) -> Any:
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _checked(value: Any, parameter: inspect.Parameter, key: str) -> Any:
    """Return a value of the type that the signature has; the class itself checks the range."""
    default = parameter.default
    if isinstance(default, list | tuple) and default:
        if not isinstance(value, list):
            raise ExperimentError(f"{key} must be a list, as {_as_json(default)!r}, got {value!r}")
        like = parameter.replace(default=default[0], annotation=inspect.Parameter.empty)
        return [_checked(one, like, f"{key}.{index}") for index, one in enumerate(value)]
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        right = isinstance(value, bool)
    elif isinstance(default, int | float):
        right = numbers and math.isfinite(value)
    else:
        right = not isinstance(default, str) or isinstance(value, str)
    # the class itself checks an annotation such as "float | str"
    if not right and parameter.annotation in _PLAIN:
        raise ExperimentError(f"{key} must be {_KINDS[type(default)]}, got {value!r}")
    is_float = type(default) is float or parameter.annotation in (float, "float")
    return float(value) if numbers and is_float else value
