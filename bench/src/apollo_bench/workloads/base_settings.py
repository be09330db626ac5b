"""Base classes of the tables [model] and [data]."""

from __future__ import annotations

from typing import ClassVar

from apollo_bench.config_section import ConfigSection, PositiveInt


class ModelSettings(ConfigSection):
    """The table [model]."""

    can_be_sharded: ClassVar[bool] = False  # whether --strategy fsdp2 trains it

    family: str  # a literal, by which a recipe chooses the class


class DataSettings(ConfigSection):
    """The table [data].

    Data without a validation split of their own have a key ``validation``: the number of training
    examples to hold out.
    """

    model_arguments: ClassVar[tuple[str, ...]] = ()  # those that a custom model gets from the data
    is_custom: ClassVar[bool] = False  # whether the user brings the data, which name the task

    kind: str  # a literal, by which a recipe chooses the class
    train_examples: PositiveInt | None = None  # size of the subset, from the start; None: all

    @classmethod
    def has_validation_split(cls) -> bool:
        """Return whether the data have a validation split of their own."""
        return "validation" not in cls.model_fields

    @property
    def held_out(self) -> int:
        """Number of training examples that are held out and evaluated on instead of the test set.

        0 if the data have a validation split of their own.
        """
        return int(getattr(self, "validation", 0))

    def holding_out(self, examples: int) -> DataSettings:
        """Return the settings with this many held-out examples.

        Data with a validation split of their own are returned unchanged.

        Example:
            >>> from apollo_bench.workloads.workload_settings import DEFAULT_DATA
            >>> DEFAULT_DATA.holding_out(5000).held_out
            5000
        """
        if self.has_validation_split():
            return self
        return self.model_copy(update={"validation": examples})
