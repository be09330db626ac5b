"""APOLLO, the adaptive parameter-wise diagonal quasi-Newton optimizer (Ma, 2020), for PyTorch."""

from apollo_qn.functional import apollo
from apollo_qn.optimizer import Apollo, ApolloW

__all__ = ["Apollo", "ApolloW", "apollo"]
__version__ = "0.1.0"
