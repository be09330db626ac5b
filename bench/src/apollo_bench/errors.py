"""The error that a user can correct; it is printed as one line."""

from __future__ import annotations


class ExperimentError(Exception):
    """An error that the user can correct: the message says what is wrong, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
