"""Time and communication of a step on sharded parameters, as under FSDP2: Apollo and AdamW.

    python benchmarks/sharded_step.py [--ranks 1 2 4] [--widths 64 256 512] [--json FILE]

The parameters are those of 12 Transformer layers. Each is a DTensor that is sharded over all ranks
along its first dimension, as by ``fully_shard``, with random gradients. Every rank is a process of
one thread; the ranks communicate by gloo on the loopback device. In each round every optimizer
takes one step between two barriers, in an order that rotates. A round's time is that of the slowest
rank.

Two counts of bytes are given: the buffers of one rank's all-reduces, and the traffic of the
loopback device for all ranks, in both directions with TCP's headers, without that of the barriers.
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
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import apollo_qn
from apollo_qn import Apollo

LAYERS = 12
PEER = "AdamW fused"
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    PEER: lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "Apollo": Apollo,
    "Apollo belief": lambda p: Apollo(p, rebound="belief"),
}


def shapes(width: int) -> list[tuple[int, ...]]:
    """Return the shapes of attention, feed-forward and norms in all layers, biases included."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)] + [(width,)] * 4
    return layer * LAYERS


def loopback_bytes() -> int:
    """Return the number of bytes that the loopback device has received so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


class CountingAllReduce:
    """``dist.all_reduce`` that counts its calls and the bytes of their buffers."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0
        self.original = dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.bytes += tensor.numel() * tensor.itemsize
        return self.original(tensor, *args, **kwargs)


def measure_on_rank(
    rank: int, world: int, store: str, widths: list[int], repeats: int, out: str
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for width in widths:
        params: dict[str, list[nn.Parameter]] = {}
        for name in OPTIMIZERS:
            generator = torch.Generator().manual_seed(0)
            params[name] = []
            for shape in shapes(width):
                x = torch.randn(shape, generator=generator)
                p = nn.Parameter(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))
                p.grad = distribute_tensor(x / 8, mesh, [Shard(0)], src_data_rank=None)
                params[name].append(p)
        optimizers = {name: make(params[name]) for name, make in OPTIMIZERS.items()}
        times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        counters = {name: CountingAllReduce() for name in OPTIMIZERS}
        traffic: dict[str, list[int]] = {name: [] for name in (*OPTIMIZERS, "barriers")}
        names = list(traffic)
        for round_ in range(repeats + 3):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                dist.barrier()
                before, start = loopback_bytes(), time.perf_counter()
                if name in OPTIMIZERS:
                    dist.all_reduce = counters[name]
                    optimizers[name].step()
                    dist.all_reduce = counters[name].original
                taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                dist.barrier()
                received = loopback_bytes() - before
                dist.all_reduce(taken, op=dist.ReduceOp.MAX)
                if round_ >= 3:
                    traffic[name].append(received)
                    if name in OPTIMIZERS:
                        times[name].append(1e3 * float(taken))
        steps = repeats + 3
        results.append(
            {
                "ranks": world,
                "width": width,
                "parameters": sum(p.numel() for p in params[PEER]),
                "tensors": len(params[PEER]),
                "step_ms": times,
                "all_reduces_per_step": {n: c.calls / steps for n, c in counters.items()},
                "buffer_bytes": {n: c.bytes / steps for n, c in counters.items()},
                "loopback_bytes": {
                    n: max(
                        0, statistics.median(traffic[n]) - statistics.median(traffic["barriers"])
                    )
                    for n in OPTIMIZERS
                },
            }
        )
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def print_table(results: list[dict[str, Any]]) -> None:
    print(
        f"{'ranks':>5} {'parameters':>12} {'tensors':>8}  {'':14}{'step, ms':>9}{'/ ' + PEER:>15}"
        f"{'all-reduces':>13}{'buffer, B':>11}{'loopback, B':>12}"
    )
    for row in results:
        peer = row["step_ms"][PEER]
        for name, taken in row["step_ms"].items():
            ratio = statistics.median(a / b for a, b in zip(taken, peer, strict=True))
            print(
                f"{row['ranks']:5} {row['parameters']:12,} {row['tensors']:8}  {name:14}"
                f"{statistics.median(taken):9.2f}{ratio:15.2f}"
                f"{row['all_reduces_per_step'][name]:13.0f}{row['buffer_bytes'][name]:11,.0f}"
                f"{row['loopback_bytes'][name]:12,.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="file for every measured time")
    arguments = parser.parse_args()
    results = []
    for world in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "out.json")
            values = (world, f"{folder}/store", arguments.widths, arguments.repeats, out)
            mp.spawn(measure_on_rank, values, world)  # type: ignore[attr-defined, no-untyped-call]
            results += json.loads(Path(out).read_text())
    print_table(results)
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
