"""What a step costs on sharded parameters, and what it sends: Apollo beside AdamW, as under FSDP2.

    python benchmarks/sharded_step.py [--ranks 1 2 4] [--widths 64 256 512] [--json FILE]

The parameters of 12 Transformer layers, each a DTensor sharded over all ranks along its first
dimension as ``fully_shard`` does it, with random gradients. Every rank is a process of one thread;
they meet by gloo on loopback. In each round every contender takes one step, in an order that
rotates, between two barriers; a round's time is that of the slowest rank. Bytes are those of the
buffer of each all-reduce, and what the loopback device has carried for all ranks together during a
step (both directions of every message, with TCP's headers), less what the barriers alone carry.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import apollo_qn
from apollo_qn import Apollo

LAYERS = 12
PEER = "AdamW fused"
CONTENDERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    PEER: lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "Apollo": Apollo,
    "Apollo belief": lambda p: Apollo(p, rebound="belief"),
}


def shapes(width: int) -> list[tuple[int, ...]]:
    """Attention, feed-forward and norms of each layer, weights and biases."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)] + [(width,)] * 4
    return layer * LAYERS


def on_loopback() -> int:
    """Bytes that it has received so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


class Counted:
    """Bytes in the buffers of this rank's all-reduces."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0
        self.original = dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.bytes += tensor.numel() * tensor.itemsize
        return self.original(tensor, *args, **kwargs)


def work(rank: int, world: int, store: str, widths: list[int], repeats: int, out: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for width in widths:
        params: dict[str, list[nn.Parameter]] = {}
        for name in CONTENDERS:
            generator = torch.Generator().manual_seed(0)
            params[name] = []
            for shape in shapes(width):
                x = torch.randn(shape, generator=generator)
                p = nn.Parameter(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))
                p.grad = distribute_tensor(x / 8, mesh, [Shard(0)], src_data_rank=None)
                params[name].append(p)
        optimizers = {name: make(params[name]) for name, make in CONTENDERS.items()}
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        counted = {name: Counted() for name in CONTENDERS}
        carried: dict[str, list[int]] = {name: [] for name in (*CONTENDERS, "nothing")}
        names = list(carried)
        for round_ in range(repeats + 3):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                dist.barrier()
                before, start = on_loopback(), time.perf_counter()
                if name in CONTENDERS:
                    dist.all_reduce = counted[name]
                    optimizers[name].step()
                    dist.all_reduce = counted[name].original
                taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                dist.barrier()
                sent = on_loopback() - before
                dist.all_reduce(taken, op=dist.ReduceOp.MAX)
                if round_ >= 3:
                    carried[name].append(sent)
                    if name in CONTENDERS:
                        times[name].append(1e3 * float(taken))
        steps = repeats + 3
        results.append(
            {
                "ranks": world,
                "width": width,
                "parameters": sum(p.numel() for p in params[PEER]),
                "tensors": len(params[PEER]),
                "step_ms": times,
                "all_reduces_a_step": {n: c.calls / steps for n, c in counted.items()},
                "buffer_bytes": {n: c.bytes / steps for n, c in counted.items()},
                "carried_bytes": {
                    n: max(0, statistics.median(carried[n]) - statistics.median(carried["nothing"]))
                    for n in CONTENDERS
                },
            }
        )
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def table(results: list[dict[str, Any]]) -> None:
    print(
        f"{'ranks':>5} {'parameters':>12} {'tensors':>8}  {'':14}{'step, ms':>9}{'/ ' + PEER:>15}"
        f"{'all-reduces':>13}{'buffer, B':>11}{'carried, B':>12}"
    )
    for row in results:
        peer = row["step_ms"][PEER]
        for name, taken in row["step_ms"].items():
            ratio = statistics.median(a / b for a, b in zip(taken, peer, strict=True))
            print(
                f"{row['ranks']:5} {row['parameters']:12,} {row['tensors']:8}  {name:14}"
                f"{statistics.median(taken):9.2f}{ratio:15.2f}"
                f"{row['all_reduces_a_step'][name]:13.0f}{row['buffer_bytes'][name]:11,.0f}"
                f"{row['carried_bytes'][name]:12,.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write every measured time to this file")
    arguments = parser.parse_args()
    results = []
    for world in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "out.json")
            given = (world, f"{folder}/store", arguments.widths, arguments.repeats, out)
            torch.multiprocessing.spawn(work, given, world)
            results += json.loads(Path(out).read_text())
    table(results)
    if arguments.json:
        content = {
            "command": " ".join(["python", *sys.argv]),
            "versions": {"apollo_qn": apollo_qn.__version__, "torch": torch.__version__},
            "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
            "seed": 0,
            "results": results,
        }
        arguments.json.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
