"""``apollo-bench archive``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apollo_bench.cli import options, runtime
from apollo_bench.errors import ExperimentError


def archive(
    runs: options.RunFolders,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the archive.")],
) -> None:
    """Write finished runs as two small text files, and the report beside them.

    `report` reads an archive as it reads runs. The archive holds recipes, versions, machine,
    command, evaluations and results. It holds no weights and no paths of this machine.
    """
    with runtime.one_line_errors():
        from apollo_bench.runs import archive as archives
        from apollo_bench.runs import compatibility

        directories = [
            directory for folder in runs for directory in compatibility.find_run_directories(folder)
        ]
        for folder in runs:
            if archives.is_archive(folder):
                raise ExperimentError(
                    f"{folder}: an archive already; `apollo-bench report {folder}` reads it"
                )
        if not directories:
            raise ExperimentError(f"{runs[0]}: contains no runs; `apollo-bench compare` makes some")
        compatibility.check(compatibility.identity_of(directory) for directory in directories)
        count = archives.write(directories, out)
        typer.echo(f"Archived {count} runs in {out}")
        runtime.keep_caches_in(runs[0])
        runtime.write_report([out], out)
