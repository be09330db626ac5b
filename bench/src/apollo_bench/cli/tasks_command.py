"""``apollo-bench tasks``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from apollo_bench.cli import runtime


def list_tasks() -> None:
    """List the tasks: optimizers, data, size and where the data come from."""
    with runtime.one_line_errors():
        from apollo_bench.config import recipe
        from apollo_bench.workloads.tasks import TASKS

        table = Table("task", box=None, pad_edge=False)
        for title in ("optimizers", "data", "from"):
            table.add_column(title, overflow="fold")  # a path that is cut cannot be copied
        for name, entry in TASKS.items():
            table.add_row(name, ", ".join(recipe.load(name).optimizers), entry.data, entry.source)
        Console().print(table)
