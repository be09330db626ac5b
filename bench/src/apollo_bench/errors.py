"""The error that a user can mend, told in one line."""

from __future__ import annotations


class ExperimentError(Exception):
    """Something that the user can put right: the message names what is wrong and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
