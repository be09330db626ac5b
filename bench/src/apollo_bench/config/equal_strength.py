"""Weight decay of equal strength, eq. (14) of the paper: its product with the rate is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apollo_bench.config_section import EqualStrength


def scale_lr(settings: Any, factor: float) -> Any:
    """Return settings at ``factor`` times the learning rate, with equally strong decay, eq. (14).

    Apollo's warmup_init_lr is multiplied too.

    Example:
        >>> from apollo_bench.config.recipe import load
        >>> scale_lr(load("wordnet").optimizers["apollo"], 2.0).lr
        200.0

    Args:
        settings: settings of an optimizer, whose decay is a number.
        factor: positive.
    """
    update = {"lr": settings.lr * factor}
    if settings.weight_decay is not None:
        update["weight_decay"] = settings.weight_decay / factor
    if getattr(settings, "warmup_init_lr", None) is not None:
        update["warmup_init_lr"] = settings.warmup_init_lr * factor
    return settings.model_copy(update=update)


def coupled_decay(name: str, optimizers: Mapping[str, Any]) -> float | None:
    """Return the weight decay gamma of an optimizer as a number, by eq. (14) if it is coupled.

    Decay of equal strength shrinks the weights equally per step: gamma * eta is the same. So gamma
    = gamma_reference * eta_reference / eta. Optimizers that state a number keep it: the paper gives
    SGD and Apollo the same gamma. None: a class without weight decay.

    Example:
        >>> from apollo_bench.config.recipe import load
        >>> optimizers = load("fashion-mnist").optimizers
        >>> round(coupled_decay("radam-adj", optimizers), 6)  # 5e-4 of Apollo, times 10 / 0.2
        0.025

    Args:
        name: name of an optimizer of the recipe.
        optimizers: settings of all optimizers, by name.

    Raises:
        ValueError: the reference is missing, is itself coupled or has no decay, or a class's
            learning rate is not stated.
    """
    this = optimizers[name]
    if not isinstance(this.weight_decay, EqualStrength):
        return None if this.weight_decay is None else float(this.weight_decay)
    numbers = [
        other
        for other, settings in optimizers.items()
        if not isinstance(settings.weight_decay, EqualStrength | None)
    ]
    if this.weight_decay.equal_strength_to not in numbers:
        raise ValueError(
            f"optimizers.{name}.weight_decay.equal_strength_to is "
            f"{this.weight_decay.equal_strength_to!r}, allowed are the optimizers that state a "
            f"number: {', '.join(numbers) or 'none here'}"
        )
    for other in (name, this.weight_decay.equal_strength_to):
        if optimizers[other].lr is None:
            raise ValueError(
                f"optimizers.{other}.lr is missing; the weight decay of {name} depends on it"
            )
    reference = optimizers[this.weight_decay.equal_strength_to]
    return float(reference.weight_decay * reference.lr / this.lr)
