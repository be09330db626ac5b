"""Import libraries that only some runs need."""

from __future__ import annotations

import importlib
from typing import Any

from apollo_bench.errors import ExperimentError


def import_optional(name: str, purpose: str, alternative: str = "") -> Any:
    """Import a library that only some runs need.

    Example:
        >>> import_optional("json", "this example").dumps([1])
        '[1]'

    Args:
        name: name of the module.
        purpose: what needs the library; the error message begins with it.
        alternative: what to do without the library; the error message ends with it.

    Raises:
        ExperimentError: the library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ExperimentError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"pip install {package}{alternative}"
        ) from None
