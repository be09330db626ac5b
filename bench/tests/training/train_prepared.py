"""Trains prepared runs one after the other, in as many processes as torchrun asks.

torchrun --nproc-per-node=2 -m bench.tests.training.train_prepared RUN...
"""

from __future__ import annotations

import sys
from pathlib import Path

from apollo_bench.config.execution import leave
from apollo_bench.launch import worker
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training import process_group


def main() -> None:
    process_group.join("cpu")
    for run in sys.argv[1:]:
        assert worker.work(RunDirectory(Path(run)), lambda: False) == "finished"
    leave()


if __name__ == "__main__":
    main()
