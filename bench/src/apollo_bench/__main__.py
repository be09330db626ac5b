"""Run the command line as ``python -m apollo_bench``, for torchrun."""

from apollo_bench.cli import app

app(prog_name="apollo-bench")
