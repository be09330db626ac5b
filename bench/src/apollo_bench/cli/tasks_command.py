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

        table = Table("task", "optimizers", "data", "from", box=None, pad_edge=False)
        for name, entry in TASKS.items():
            table.add_row(name, ", ".join(recipe.load(name).optimizers), entry.data, entry.source)
        Console().print(table)
