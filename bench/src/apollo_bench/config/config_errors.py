"""Describe errors in a recipe in terms of its file: key, value and what is allowed."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from apollo_bench.config.optimizer_settings import allowed_methods
from apollo_bench.config_section import ConfigSection


def describe(error: ValidationError, schema: type[ConfigSection]) -> str:
    """Return one line with every error: its key, its value and what is allowed.

    Example:
        >>> from apollo_bench.config.schema import QuickSettings
        >>> try:
        ...     QuickSettings.model_validate({"seeds": 0})
        ... except ValidationError as error:
        ...     print(describe(error, QuickSettings))
        seeds: is 0: Input should be greater than or equal to 1

    Args:
        error: what pydantic raised for a table.
        schema: class of the table.
    """
    lines = []
    for item in error.errors():
        shown, owner = _locate(schema, item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
            if owner is not None:
                message += f", allowed are {', '.join(owner.model_fields)}"
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] == "union_tag_invalid":
            shown.append(item["ctx"]["discriminator"].strip("'()"))
            allowed = item["ctx"]["expected_tags"]
            if shown[-1] == "method":  # pydantic expects names of classes
                allowed = allowed_methods()
            message = f"is {item['ctx']['tag']!r}, allowed are {allowed}"
        elif item["type"] == "union_tag_not_found":
            shown.append(item["ctx"]["discriminator"].strip("'()"))
            message = "missing"
            if shown[-1] == "method":
                message += f", allowed are {allowed_methods()}"
        elif item["type"] != "value_error" or len(str(item["input"])) < 40:
            message = f"is {item['input']!r}: {message}"
        lines.append(f"{'.'.join(shown) or 'recipe'}: {message}")
    return "; ".join(dict.fromkeys(lines))


def _locate(
    schema: type[ConfigSection], location: tuple[int | str, ...]
) -> tuple[list[str], type[ConfigSection] | None]:
    """Return the keys that the user wrote, and the table of the last of them.

    A location of pydantic also names the branch that it chose in every union.
    """
    shown: list[str] = []
    owner: type[ConfigSection] | None = schema
    there: Any = schema
    for part in location:
        there = _bare(there)
        if get_origin(there) in (Union, UnionType):
            there = next((one for one in get_args(there) if _is_branch(one, part)), None)
            continue
        owner = there if isinstance(there, type) and issubclass(there, ConfigSection) else None
        shown.append(str(part))
        if owner is not None:
            field = owner.model_fields.get(str(part))
            there = None if field is None else field.annotation
        else:
            # a key of a dict, or an index of a list
            there = get_args(there)[-1] if get_args(there) else None
    return shown, owner


def _bare(there: Any) -> Any:
    """Return a type without its annotations and without None."""
    while True:
        if get_origin(there) is Annotated:
            there = get_args(there)[0]
            continue
        if get_origin(there) not in (Union, UnionType):
            return there
        kinds = [kind for kind in get_args(there) if kind is not NoneType]
        if len(kinds) > 1:
            return there
        there = kinds[0]


def _is_branch(member: Any, tag: int | str) -> bool:
    member = _bare(member)
    if not (isinstance(member, type) and issubclass(member, ConfigSection)):
        return False
    literals = [get_args(field.annotation) for field in member.model_fields.values()]
    return member.__name__ == tag or any(tag in values for values in literals)
