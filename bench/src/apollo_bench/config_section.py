"""The base class of a recipe's tables, and the types of their values."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from apollo_bench.seeds import MAX_SEED

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Fraction = Annotated[float, Field(ge=0, lt=1)]


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


PositiveInt = Annotated[int, Field(ge=1)]


def _is_increasing(interval: list[float]) -> list[float]:
    low, high = interval
    if low >= high:
        raise ValueError(f"[low, high] must have low < high, got {interval}")
    return interval


Interval = Annotated[
    list[Positive], Field(min_length=2, max_length=2), AfterValidator(_is_increasing)
]  # smallest and largest value


class ConfigSection(BaseModel):
    """A table of a recipe; unknown keys and values of the wrong type are errors.

    Example:
        >>> class Settings(ConfigSection):
        ...     renamed_keys: ClassVar[dict[str, str]] = {"tries": "trials"}
        ...     trials: PositiveInt = 7
        >>> Settings.model_validate({"tries": 3}).trials
        3
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    # former name of a key: its present name; older recipes, runs and archives have the former
    renamed_keys: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_former_keys(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        return {cls.renamed_keys.get(key, key): value for key, value in table.items()}


class EqualStrength(ConfigSection):
    """Weight decay coupled to another optimizer's by eq. (14).

    In a recipe: ``weight_decay = { equal_strength_to = "apollo" }``. ``coupled_decay`` resolves it.
    """

    equal_strength_to: str


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


def check_name(name: str, what: str) -> None:
    """Check a name that becomes part of paths and of texts.

    Args:
        name: the name.
        what: for example ``"optimizers"``; the error begins with it.

    Raises:
        ValueError: the name has other characters than letters, digits and ``-_.+``, begins with
            another than a letter or digit, or has more than 64.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what}: the name {name!r} is not allowed; use letters, digits and -_.+, a letter or "
            "digit first, 64 at most"
        )


def _is_name(name: str) -> str:
    check_name(name, "name")
    return name


Name = Annotated[str, AfterValidator(_is_name)]
