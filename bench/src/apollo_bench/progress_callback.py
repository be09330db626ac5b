"""The type of the function that long work reports its progress to."""

from __future__ import annotations

from collections.abc import Callable

# arguments: what is being done, how much of it is done, how much there is (0: unknown)
ProgressCallback = Callable[[str, int, int], None]
