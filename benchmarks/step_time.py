"""Step time of Apollo's back ends and of torch.optim's, taken alternately in one process.

    python benchmarks/step_time.py [--repeats 30] [--json FILE]

Each round steps every optimizer once, in an order that rotates; the table gives medians, their
quartiles and the ratio to AdamW foreach. Gradients are random and stay as they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.optimizer import Optimizer

import apollo_qn
from apollo_qn import Apollo, ApolloW

Shapes = list[tuple[int, ...]]


def resnet110() -> Shapes:
    """Parameters of ResNet-110 for CIFAR-10: 335 tensors, 1.73 M elements."""
    shapes: Shapes = [(16, 3, 3, 3), (16,), (16,)]
    before = 16
    for width in (16, 32, 64):
        for block in range(18):
            shapes += [(width, before, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if block == 0 and width != before:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return [*shapes, (10, 64), (10,)]


def transformer_base(vocabulary: int = 37_000) -> Shapes:
    """Parameters of Transformer-base with shared embeddings: 253 tensors, 63 M elements."""
    attention: Shapes = [(512, 512), (512,)] * 4
    feed_forward: Shapes = [(2048, 512), (2048,), (512, 2048), (512,)]
    encoder = attention + feed_forward + [(512,)] * 4
    decoder = attention * 2 + feed_forward + [(512,)] * 6
    return [(vocabulary, 512), *(encoder * 6), *(decoder * 6)]


SETS: dict[str, Callable[[], Shapes]] = {
    "ResNet-110": resnet110,
    "Transformer-base": transformer_base,
}
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adam (default)": torch.optim.Adam,
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Apollo foreach": lambda p: Apollo(p, foreach=True),
    "Apollo foreach, L2": lambda p: Apollo(p, foreach=True, weight_decay=5e-4),
    "ApolloW foreach": lambda p: ApolloW(p, foreach=True, weight_decay=5e-4),
    "Apollo foreach, belief": lambda p: Apollo(p, foreach=True, rebound="belief"),
    "Apollo rule": lambda p: Apollo(p, foreach=False),
}
PEER = "AdamW foreach"


def measure(shapes: Shapes, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step of each optimizer."""
    generator = torch.Generator().manual_seed(0)
    optimizers = {}
    gradients = [torch.randn(s, generator=generator) * 0.01 for s in shapes]  # shared: read only
    for name, make in OPTIMIZERS.items():
        params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.05) for s in shapes]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizers[name] = make(params)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    names = list(optimizers)
    warm_up = 3
    for round_ in range(repeats + warm_up):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            optimizers[name].step()
            if round_ >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
        print(f"\r{round_ + 1}/{repeats + warm_up}", end="", file=sys.stderr)
    print("\r        \r", end="", file=sys.stderr)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write every measured time to this file")
    arguments = parser.parse_args()
    results = {}
    for title, shapes in SETS.items():
        times = results[title] = measure(shapes(), arguments.repeats)
        numel = sum(torch.Size(s).numel() for s in shapes())
        print(f"\n{title}: {len(shapes())} tensors, {numel:,} parameters")
        print(f"{'':24}{'median ms':>10}{'quartiles':>18}{'/ ' + PEER:>18}")
        for name, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            ratio = middle / statistics.median(times[PEER])
            print(f"{name:24}{middle:10.2f}{low:9.2f}{high:9.2f}{ratio:17.2f}x")
    if arguments.json:
        about = {
            "command": " ".join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
            "torch": torch.__version__,
            "apollo_qn": apollo_qn.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "seed": 0,
            "unit": "milliseconds",
        }
        partial = arguments.json.with_suffix(".partial")
        partial.write_text(json.dumps({**about, "times": results}, indent=1) + "\n")
        partial.replace(arguments.json)


if __name__ == "__main__":
    main()
