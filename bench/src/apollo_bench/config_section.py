"""The types that the tables of a recipe are made of."""

from __future__ import annotations

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
        raise ValueError("the first is to be less than the second")
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
