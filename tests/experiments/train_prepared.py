"""Trains prepared runs one after the other, in as many processes as torchrun asks.

torchrun --nproc-per-node=2 -m tests.experiments.train_prepared RUN...
"""

from __future__ import annotations

import sys
from pathlib import Path

from apollo_qn.experiments import ranks, worker
from apollo_qn.experiments.placement import leave
from apollo_qn.experiments.runs import RunDirectory


def main() -> None:
    ranks.join("cpu")
    for run in sys.argv[1:]:
        assert worker.work(RunDirectory(Path(run)), lambda: False) == "finished"
    leave()


if __name__ == "__main__":
    main()
