"""The settings of each optimizer in a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from apollo_bench.config.custom_optimizer import CustomSettings, short_names
from apollo_bench.config_section import (
    ConfigSection,
    EqualStrength,
    Fraction,
    NonNegative,
    Positive,
)


class SGDSettings(ConfigSection):
    """Settings of torch.optim.SGD; L2 decay."""

    method: Literal["sgd"]
    lr: Positive
    momentum: Fraction = 0.0
    weight_decay: NonNegative = 0.0


class AdamLikeSettings(ConfigSection):
    """Settings that Adam and its variants share; decoupled decay."""

    lr: Positive
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.999]
    )
    eps: Positive = 1e-8
    weight_decay: NonNegative | EqualStrength = 0.0


class AdamSettings(AdamLikeSettings):
    """Settings of torch.optim.AdamW, the paper's Adam."""

    method: Literal["adam"]


class RAdamSettings(AdamLikeSettings):
    """Settings of torch.optim.RAdam."""

    method: Literal["radam"]


class NAdamSettings(AdamLikeSettings):
    """Settings of torch.optim.NAdam with decoupled decay, NAdamW."""

    method: Literal["nadamw"]


class MuonSettings(AdamLikeSettings):
    """Settings of torch.optim.Muon for hidden matrices and of AdamW for all other parameters.

    Both have the same rate and decay: a step of Muon is scaled to the size of one of AdamW.
    """

    method: Literal["muon"]
    momentum: Fraction = 0.95


class ApolloSettings(ConfigSection):
    """Settings of apollo_qn.Apollo (L2 decay, as in the paper) or ApolloW (decoupled)."""

    method: Literal["apollo", "apollow"]
    lr: Positive
    beta: Fraction = 0.9
    eps: Positive = 1e-4
    sigma: Positive = 1.0
    rebound: Literal["constant", "belief"] = "constant"
    weight_decay: NonNegative | EqualStrength = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    warmup_init_lr: NonNegative | None = None


class AveragedSettings(ConfigSection):
    """Settings of Apollo with a moving average of B, an experiment; L2 decay."""

    method: Literal["apollo-averaged"]
    lr: Positive
    beta: Fraction = 0.9
    hessian_beta: Fraction = 0.9
    eps: Positive = 1e-4
    sigma: Positive = 1.0
    weight_decay: NonNegative | EqualStrength = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    warmup_init_lr: NonNegative | None = None


_OWN: tuple[type[ConfigSection], ...] = (
    *(SGDSettings, AdamSettings, RAdamSettings, NAdamSettings, MuonSettings),
    *(ApolloSettings, AveragedSettings),
)
_BY_METHOD = {
    method: settings
    for settings in _OWN
    for method in get_args(settings.model_fields["method"].annotation)
}
METHODS = tuple(_BY_METHOD)  # those with settings of their own


def method(table: Any) -> Any:
    """Return the tag of the settings class for the table of an optimizer.

    Messages of pydantic contain the name of this function, so it is named as the key.
    """
    if not isinstance(table, dict):
        return type(table).__name__
    if "class" in table:
        return CustomSettings.__name__
    name = table.get("method")
    if not isinstance(name, str):
        return None if name is None else str(name)
    if name in METHODS:
        return _BY_METHOD[name].__name__
    return CustomSettings.__name__ if name in short_names() else name


def allowed_methods() -> str:
    """Return the names that ``method`` may have, as text."""
    names = dict.fromkeys([*METHODS, *sorted(short_names())])
    return f"{', '.join(map(repr, names))}; or class = 'module:Class' in its place"


OptimizerSettings = Annotated[
    Annotated[SGDSettings, Tag("SGDSettings")]
    | Annotated[AdamSettings, Tag("AdamSettings")]
    | Annotated[RAdamSettings, Tag("RAdamSettings")]
    | Annotated[NAdamSettings, Tag("NAdamSettings")]
    | Annotated[MuonSettings, Tag("MuonSettings")]
    | Annotated[ApolloSettings, Tag("ApolloSettings")]
    | Annotated[AveragedSettings, Tag("AveragedSettings")]
    | Annotated[CustomSettings, Tag("CustomSettings")],
    Discriminator(method),
]
