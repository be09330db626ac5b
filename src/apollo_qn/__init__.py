"""APOLLO, the adaptive parameter-wise diagonal quasi-Newton optimizer (Ma, 2020), for PyTorch."""

from typing import TYPE_CHECKING, Any

from apollo_qn.advice import ApolloWarning, LearningRateWarning
from apollo_qn.functional import apollo
from apollo_qn.gradient_release import GradientRelease
from apollo_qn.optimizer import Apollo, ApolloW

if TYPE_CHECKING:
    from apollo_qn.range_test import lr_range_test

__all__ = [
    "Apollo",
    "ApolloW",
    "ApolloWarning",
    "GradientRelease",
    "LearningRateWarning",
    "apollo",
    "lr_range_test",
]
__version__ = "0.2.0"  # pyproject.toml reads it


def __getattr__(name: str) -> Any:
    """Import the range test when it is first used; most programs never do."""
    if name == "lr_range_test":
        from apollo_qn.range_test import lr_range_test

        return lr_range_test
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List ``lr_range_test`` too, so that an editor completes its name before the first use."""
    return sorted({*globals(), *__all__})
