"""Libraries that only some data or ways to train need."""

from __future__ import annotations

import importlib
from typing import Any

from apollo_qn.experiments.errors import ExperimentError


def library(name: str, purpose: str, alternative: str = "", extra: str = "data") -> Any:
    """Import a library of an extra.

    Args:
        name: of the module.
        purpose: what needs it; begins the error message.
        alternative: what to do without it; ends the message.
        extra: of the package, that installs it.

    Raises:
        ExperimentError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ExperimentError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"pip install 'apollo-qn[experiments,{extra}]'{alternative}"
        ) from None
