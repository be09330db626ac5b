"""The evaluation: recipe -> workload -> training -> run directory -> report; nothing flows back."""

__version__ = "0.2.0"  # pyproject.toml reads it
