"""Peak memory and time of a training step with the gradients released in the backward pass.

    python benchmarks/gradient_release.py [--layers 16] [--width 512] [--rounds 3] [--threads N]
        [--json FILE]

The model is a Transformer of about 50 million parameters, on random tokens. Every measurement is a
process of its own; the optimizers alternate in an order that rotates. The process makes the model,
takes some steps and reads its peak resident memory, VmHWM of /proc/self/status (Linux). The table
also has its resident memory before the first step (torch and the model).

The time of a step is that of forward pass, backward pass and optimizer step: the median of all
steps except the first two. The CPU time stands beside it, because other work on the machine
disturbs wall time.

It varies how much freed memory glibc's allocator keeps. So each optimizer is measured with the
default allocator and with MALLOC_MMAP_THRESHOLD_=65536. With the latter every tensor above 64 KiB
is returned to the system when it is freed, and the peak is that of the live tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import apollo_qn
from apollo_qn import Apollo, GradientRelease

VOCABULARY = 4000
ALLOCATORS = {"default": {}, "64 KiB threshold": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
Params = Any
OPTIMIZERS: dict[str, tuple[Callable[[Params], torch.optim.Optimizer], bool]] = {
    "Apollo": (lambda p: Apollo(p), False),
    "Apollo, released": (lambda p: Apollo(p), True),
    "AdamW fused": (lambda p: torch.optim.AdamW(p, fused=True), False),
}


class Model(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.layers(self.embedding(tokens)), self.embedding.weight)


def resident(field: str) -> float:
    """Return a field of this process's status in MiB: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(name: str, layers: int, width: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(layers, width)
    make, release = OPTIMIZERS[name]
    optimizer = make(model.parameters())
    if release:
        assert isinstance(optimizer, Apollo)
        GradientRelease(optimizer)
    tokens = torch.randint(VOCABULARY, (2, 32))
    before = resident("VmRSS")
    times, cpu_times = [], []
    for _ in range(steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - start))
        cpu_times.append(1e3 * (time.process_time() - cpu_start))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(list(model.parameters())),
        "before_MiB": before,
        "peak_MiB": resident("VmHWM"),
        "step_ms": statistics.median(times[2:]),
        "cpu_ms": statistics.median(cpu_times[2:]),
        "all_steps_ms": times,
        "all_cpu_ms": cpu_times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for every measurement")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = (arguments.layers, arguments.width, arguments.steps)
    if arguments.work:
        print(json.dumps(measure(arguments.work, *size)))
        return

    names = list(OPTIMIZERS)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        allocator: {name: [] for name in names} for allocator in ALLOCATORS
    }
    for round_ in range(arguments.rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            command = [sys.executable, *sys.argv, "--work", name]
            for allocator, settings in ALLOCATORS.items():
                printed = subprocess.run(
                    command,
                    env={**os.environ, **settings},
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
                found[allocator][name].append(json.loads(printed))

    about = found["default"]["Apollo"][0]
    size_mib = about["parameters"] * 4 / 2**20
    print(
        f"{about['parameters']:,} parameters in {about['tensors']} tensors; parameters and "
        f"gradients have {size_mib:.0f} MiB each"
    )
    for allocator, by_name in found.items():

        def median(name: str, field: str, by_name: dict[str, Any] = by_name) -> float:
            return float(statistics.median(one[field] for one in by_name[name]))

        print(
            f"{'allocator ' + allocator:30}{'before, MiB':>13}{'peak, MiB':>11}{'- Apollo':>10}"
            f"{'step, ms':>10}{'/ Apollo':>10}{'CPU, ms':>15}{'/ Apollo':>10}"
        )
        for name in names:
            peak, taken = median(name, "peak_MiB"), median(name, "step_ms")
            cpu = median(name, "cpu_ms")
            print(
                f"{name:30}{median(name, 'before_MiB'):13.0f}{peak:11.0f}"
                f"{peak - median('Apollo', 'peak_MiB'):10.0f}{taken:10.0f}"
                f"{taken / median('Apollo', 'step_ms'):10.2f}"
                f"{cpu:15.0f}{cpu / median('Apollo', 'cpu_ms'):10.2f}"
            )
    if arguments.json:
        content = {
            "command": " ".join(["python", *sys.argv]),
            "versions": {
                "apollo_qn": apollo_qn.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "machine": {
                "platform": platform.platform(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability(),
            },
            "seed": 0,
            "gradients_MiB": size_mib,
            "results": found,
        }
        partial = arguments.json.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(arguments.json)


if __name__ == "__main__":
    main()
