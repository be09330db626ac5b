"""Run the command line as ``python -m apollo_bench``, for torchrun."""

from apollo_bench.entry import main

main()
