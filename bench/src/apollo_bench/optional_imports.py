"""Libraries that only some data or ways to train need."""

from __future__ import annotations

import importlib
from typing import Any

from apollo_bench.errors import ExperimentError


def library(name: str, purpose: str, alternative: str = "") -> Any:
    """Import a library that only some runs need.

    Args:
        name: of the module.
        purpose: what needs it; begins the error message.
        alternative: what to do without it; ends the message.

    Raises:
        ExperimentError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ExperimentError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"pip install {package}{alternative}"
        ) from None
