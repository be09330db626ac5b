"""The tables of a recipe that every task has: their keys, types and ranges."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    model_validator,
)

from apollo_bench.config_section import (
    ConfigSection,
    Interval,
    Positive,
    PositiveInt,
    Seed,
)


class LRShape(ConfigSection):
    """How the learning rate changes after the optimizer's own warmup."""

    kind: Literal["constant", "cosine", "milestone", "inverse-sqrt"]
    milestones: list[Positive] = Field(default_factory=list)  # in the schedule's unit
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # multiplies the rate at every milestone
    # updates of linear warmup, for optimizers without a warmup of their own
    warmup_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> LRShape:
        if (self.kind == "milestone") != bool(self.milestones):
            raise ValueError("milestones are needed with kind 'milestone', and only with it")
        if self.kind == "inverse-sqrt" and self.warmup_steps is None:
            raise ValueError("warmup_steps is needed with kind 'inverse-sqrt'")
        return self

    def _scaled(self, share: float) -> dict[str, Any]:
        return {"milestones": [milestone * share for milestone in self.milestones]}


class Schedule(LRShape):
    """Length of the training in epochs or updates, and the learning rate over it.

    Example:
        >>> schedule = Schedule(kind="milestone", milestones=[40.0, 60.0], epochs=80)
        >>> schedule.steps(per_epoch=100)
        8000
        >>> short = schedule.shortened(20)
        >>> str(short), short.milestones
        ('20 epochs', [10.0, 15.0])
    """

    renamed_keys: ClassVar[dict[str, str]] = {"instead": "overrides"}

    epochs: PositiveInt | None = None
    updates: PositiveInt | None = None
    overrides: dict[str, LRShape] = Field(default_factory=dict)  # by optimizer

    @model_validator(mode="after")
    def _check_length(self) -> Schedule:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("epochs or updates are needed, and not both")
        return self

    @model_validator(mode="after")
    def _check_milestones(self) -> Schedule:
        for shape in (self, *self.overrides.values()):
            edges = [0.0, *shape.milestones, float(self.length)]
            if any(left >= right for left, right in itertools.pairwise(edges)):
                raise ValueError(
                    f"milestones are {shape.milestones}, allowed are increasing {self.unit}s "
                    f"below {self.length}"
                )
        return self

    @property
    def unit(self) -> Literal["epoch", "update"]:
        """Unit of the length and of the milestones."""
        return "update" if self.epochs is None else "epoch"

    @property
    def length(self) -> int:
        """Length in the schedule's unit."""
        return self.epochs or self.updates or 0

    def __str__(self) -> str:
        return f"{self.length} {self.unit}{'' if self.length == 1 else 's'}"

    def steps(self, per_epoch: int) -> int:
        """Return the number of updates in the whole training.

        Args:
            per_epoch: updates per epoch; it matters only for a length in epochs.
        """
        return self.length if self.epochs is None else self.length * per_epoch

    def shortened(self, length: int) -> Schedule:
        """Return the same shape over another length in the same unit; milestones move with it."""
        share = length / self.length
        overrides = {
            name: shape.model_copy(update=shape._scaled(share))
            for name, shape in self.overrides.items()
        }
        update = {f"{self.unit}s": length, "overrides": overrides, **self._scaled(share)}
        return self.model_copy(update=update)


class TrainSettings(ConfigSection):
    """Batches, precision, and intervals of records, evaluations and checkpoints."""

    renamed_keys: ClassVar[dict[str, str]] = {"average_last": "average_checkpoints"}

    batch_size: PositiveInt  # examples (sentence pairs: tokens) per step, over all processes
    evaluate_every: PositiveInt | None = None  # steps; None: one epoch
    log_every: PositiveInt = 25  # steps
    checkpoint_every: Positive = 20.0  # seconds; also after every evaluation
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    clip_norm: Positive | None = None  # gradient clipping: largest norm
    accumulate: PositiveInt = 1  # gradient accumulation: micro-batches per step and process
    compile: bool = False  # whether torch.compile compiles the model
    average_checkpoints: PositiveInt = (
        1  # number of last evaluations whose weights are averaged into the final model
    )


class RunTrainSettings(TrainSettings):
    """How one run is trained."""

    schedule: Schedule


class QuickSettings(ConfigSection):
    """The changes that ``--quick`` makes."""

    epochs: PositiveInt | None = None  # either this or updates
    updates: PositiveInt | None = None
    evaluate_every: PositiveInt | None = None
    seeds: PositiveInt  # number of the recipe's seeds
    train_examples: PositiveInt | None = None


SweepKind = Literal["lr-robustness", "weight-decay"]


Analysis = Literal["lr-robustness", "weight-decay", "tuning"]


class SweepSettings(ConfigSection):
    """An analysis: the same runs at several values of one setting."""

    values: Annotated[list[Positive], Field(min_length=1)]
    optimizers: list[str] | None = None  # None: all
    schedules: list[str] | None = None  # None: all

    @model_validator(mode="after")
    def _check_increasing(self) -> SweepSettings:
        if any(left >= right for left, right in itertools.pairwise(self.values)):
            raise ValueError(f"values are {self.values}, allowed are increasing values")
        return self


class SearchSettings(ConfigSection):
    """A search for the settings of each optimizer on held-out data, with equally many trials."""

    renamed_keys: ClassVar[dict[str, str]] = {"tries": "trials"}

    trials: PositiveInt  # per optimizer
    # by optimizer and setting: smallest and largest value; sampled log-uniformly
    ranges: Annotated[dict[str, dict[str, Interval]], Field(min_length=1)]
    seed: Seed = 101  # first seed of the trials; not a seed of a comparison
    schedules: list[str] | None = None  # None: all


class CompareSettings(ConfigSection):
    """The optimizers and schedules of a comparison, unless the command line selects others."""

    optimizers: list[str] | None = None  # None: all
    schedules: list[str] | None = None  # None: all


class SweepPoint(ConfigSection):
    """The place of a run in a sweep."""

    kind: Analysis
    value: Positive  # of a search: the number of the trial

    def __str__(self) -> str:
        # "try": earlier searches have it in the names of their directories, and may be resumed
        prefix = {"lr-robustness": "lr-x", "weight-decay": "decay-", "tuning": "try"}
        return f"{prefix[self.kind]}{self.value:g}"


class PaperResult(ConfigSection):
    """A result in the paper: mean over its runs and standard deviation."""

    mean: float
    std: float | None = None
