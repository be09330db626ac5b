"""Run functions of ``work.py`` and ``models.py`` on several ranks, each a separate process."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds, a bound for hangs; the longest takes some 60 on two idle cores
DONE = "done: "


def on_ranks(world: int, *calls: str) -> tuple[list[str], str]:
    """Call functions one after the other, each ``"name"`` or ``"name argument"``.

    Returns:
        The calls that succeeded on all ranks, and the output of ranks that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(world)]
        environment = {
            **os.environ,
            "WORLD_SIZE": str(world),
            "STORE": str(Path(folder) / "store"),
            "OMP_NUM_THREADS": "1",
            "MALLOC_PERTURB_": "165",  # fills freed memory, so that reading it gives other numbers
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
            ),
        }
        command = [sys.executable, "-m", __name__, *calls]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        command, env={**environment, "RANK": str(rank)}, stdout=out, stderr=out
                    )
                )
        try:
            deadline = time.monotonic() + TIMEOUT
            while any(process.poll() is None for process in processes):
                if time.monotonic() > deadline or any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
            time.sleep(0.2 if any(process.poll() for process in processes) else 0)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
        printed = [log.read_text() for log in logs]
    done = [line.removeprefix(DONE) for line in printed[0].splitlines() if line.startswith(DONE)]
    failed = [
        f"rank {rank}, {f'exit status {code}' if code else 'too late'}:\n{text}"
        for rank, (code, text) in enumerate(zip(codes, printed, strict=True))
        if code != 0
    ]
    return done, "\n".join(failed)


def main() -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=world
    )
    modules = [importlib.import_module(f"tests.distributed.{name}") for name in ("work", "models")]
    for call in sys.argv[1:]:
        name, *arguments = call.split()
        function = next(found for one in modules if (found := getattr(one, name, None)))
        function(*arguments)
        dist.barrier()
        if rank == 0:
            print(f"{DONE}{call}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
