"""The command line ``apollo-bench``: one module per command."""

from __future__ import annotations

import typer

from apollo_bench.cli.archive_command import archive
from apollo_bench.cli.compare_command import compare
from apollo_bench.cli.prepare_command import prepare
from apollo_bench.cli.report_command import report
from apollo_bench.cli.steptime_command import steptime
from apollo_bench.cli.sweep_command import sweep
from apollo_bench.cli.tasks_command import list_tasks
from apollo_bench.cli.train_command import train

app = typer.Typer(
    help="Train with Apollo and other optimizers, and report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich takes [quick] and [default: ...] in a help text for markup
)
for _command in (compare, sweep, train, report, archive, prepare, steptime):
    app.command()(_command)
app.command("tasks")(list_tasks)
