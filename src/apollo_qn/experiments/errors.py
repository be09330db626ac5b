"""The error that a user can mend, told in one line."""

from __future__ import annotations


class ExperimentError(Exception):
    """Something that the user can put right: the message names what is wrong and the remedy."""
