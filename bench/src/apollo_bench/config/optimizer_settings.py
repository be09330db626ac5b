"""The settings of each optimizer in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
)

from apollo_bench.config_section import ConfigSection, Fraction, NonNegative, Positive


class EqualStrength(ConfigSection):
    """Weight decay coupled to another optimizer's by eq. (14).

    In a recipe: ``weight_decay = { equal_strength_to = "apollo" }``. ``recipe.coupled_decay``
    resolves it.
    """

    equal_strength_to: str


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


OptimizerSettings = Annotated[
    SGDSettings
    | AdamSettings
    | RAdamSettings
    | NAdamSettings
    | MuonSettings
    | ApolloSettings
    | AveragedSettings,
    Field(discriminator="method"),
]
