"""APOLLO, the adaptive parameter-wise diagonal quasi-Newton optimizer (Ma, 2020), for PyTorch."""

from apollo_qn.advice import ApolloWarning as ApolloWarning
from apollo_qn.advice import LearningRateWarning as LearningRateWarning
from apollo_qn.functional import apollo
from apollo_qn.gradient_release import GradientRelease
from apollo_qn.optimizer import Apollo, ApolloW

__all__ = ["Apollo", "ApolloW", "GradientRelease", "apollo"]
__version__ = "0.2.0"  # pyproject.toml reads it
