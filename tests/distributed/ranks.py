"""Runs a function of :mod:`tests.distributed.work` on several ranks, each a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 90  # seconds; a run takes some 10 on two idle cores


def on_ranks(world: int, function: str, *arguments: str) -> str:
    """What rank 0 printed; AssertionError with the complaints of the ranks that failed."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(world)]
        environment = {
            **os.environ,
            "WORLD_SIZE": str(world),
            "STORE": str(Path(folder) / "store"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
            ),
        }
        command = [sys.executable, "-m", __name__, function, *arguments]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        command, env={**environment, "RANK": str(rank)}, stdout=out, stderr=out
                    )
                )
        try:
            codes = [process.wait(TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        printed = [log.read_text() for log in logs]
    failed = [text for code, text in zip(codes, printed, strict=True) if code]
    assert not failed, "\n\n".join(failed)
    return printed[0]


def main() -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=world
    )
    name, *arguments = sys.argv[1:]
    getattr(importlib.import_module("tests.distributed.work"), name)(*arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
