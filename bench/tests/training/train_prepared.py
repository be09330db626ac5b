"""Trains prepared runs one after the other, in as many processes as torchrun asks.

torchrun --nproc-per-node=2 -m bench.tests.training.train_prepared RUN...
"""

from __future__ import annotations

import sys
from pathlib import Path

from apollo_bench.launch import worker
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training import process_group
from apollo_bench.training.fabric_setup import destroy_process_group


def main() -> None:
    process_group.init_process_group("cpu")
    for run in sys.argv[1:]:
        assert worker.train_prepared_run(RunDirectory(Path(run)), lambda: False) == "finished"
    destroy_process_group()


if __name__ == "__main__":
    main()
