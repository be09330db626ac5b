"""Peak memory and time of a training step with the gradients released in the backward pass.

    python benchmarks/gradient_release.py [--layers 16] [--width 512] [--rounds 3] [--threads N]
        [--json FILE]

A Transformer of some 50 million parameters on random words. Every measurement is a process of its
own, the contenders in turn, in an order that rotates: it makes the model, takes some steps, and
reads its largest resident memory from VmHWM of /proc/self/status (Linux). What the process held
before the first step (torch, the model) is given beside it. Time is the median of the steps but the
first two, forward and backward pass and step together; the processor's time stands beside it, since
that of the clock says little on a machine that others use.

How much of what was freed glibc's allocator keeps varies. So each is measured
twice: as it is, and with MALLOC_MMAP_THRESHOLD_=65536, with which every tensor above 64 KiB goes
back to the system when it is freed; then the peak is that of the tensors that are alive.
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

WORDS = 4000
ALLOCATORS = {"as it is": {}, "giving back": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
Params = Any
CONTENDERS: dict[str, tuple[Callable[[Params], torch.optim.Optimizer], bool]] = {
    "Apollo": (lambda p: Apollo(p), False),
    "Apollo, released": (lambda p: Apollo(p), True),
    "AdamW fused": (lambda p: torch.optim.AdamW(p, fused=True), False),
}


class Model(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.layers(self.words(words)), self.words.weight)


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def work(name: str, layers: int, width: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(layers, width)
    make, release = CONTENDERS[name]
    optimizer = make(model.parameters())
    if release:
        assert isinstance(optimizer, Apollo)
        GradientRelease(optimizer)
    words = torch.randint(WORDS, (2, 32))
    before = resident("VmRSS")
    times, busy = [], []
    for _ in range(steps):
        start, start_busy = time.perf_counter(), time.process_time()
        functional.cross_entropy(model(words).flatten(0, 1), words.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - start))
        busy.append(1e3 * (time.process_time() - start_busy))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(list(model.parameters())),
        "before_MiB": before,
        "peak_MiB": resident("VmHWM"),
        "step_ms": statistics.median(times[2:]),
        "processor_ms": statistics.median(busy[2:]),
        "all_steps_ms": times,
        "all_processor_ms": busy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = (arguments.layers, arguments.width, arguments.steps)
    if arguments.work:
        print(json.dumps(work(arguments.work, *size)))
        return

    names = list(CONTENDERS)
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

    about = found["as it is"]["Apollo"][0]
    whole = about["parameters"] * 4 / 2**20
    print(
        f"{about['parameters']:,} parameters in {about['tensors']} tensors; the gradients, as the "
        f"parameters, are {whole:.0f} MiB"
    )
    for allocator, of_names in found.items():

        def median(name: str, what: str, of_names: dict[str, Any] = of_names) -> float:
            return statistics.median(one[what] for one in of_names[name])

        print(
            f"{'allocator ' + allocator:30}{'before, MiB':>13}{'peak, MiB':>11}{'- Apollo':>10}"
            f"{'step, ms':>10}{'/ Apollo':>10}{'processor, ms':>15}{'/ Apollo':>10}"
        )
        for name in names:
            peak, taken = median(name, "peak_MiB"), median(name, "step_ms")
            busy = median(name, "processor_ms")
            print(
                f"{name:30}{median(name, 'before_MiB'):13.0f}{peak:11.0f}"
                f"{peak - median('Apollo', 'peak_MiB'):10.0f}{taken:10.0f}"
                f"{taken / median('Apollo', 'step_ms'):10.2f}"
                f"{busy:15.0f}{busy / median('Apollo', 'processor_ms'):10.2f}"
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
            "gradients_MiB": whole,
            "results": found,
        }
        partial = arguments.json.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(arguments.json)


if __name__ == "__main__":
    main()
