"""Step time of Apollo and torch.optim.AdamW on the same tensors, where overhead dominates.

The sets have many small tensors, many groups, or gradients or memory that change at each step. The
optimizers step alternately in one process. The table has the median times and their ratio.

    python benchmarks/step_overhead.py --threads 2

Run it on an idle machine; other work distorts the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apollo_qn
from apollo_bench.steptime.parameter_sets import ParameterSet

Shapes = list[tuple[int, ...]]
Change = Callable[[list[torch.nn.Parameter], list[torch.Tensor], int], None]


def unchanged(params: list[torch.nn.Parameter], grads: list[torch.Tensor], step: int) -> None:
    pass


def move_missing_gradient(
    params: list[torch.nn.Parameter], grads: list[torch.Tensor], step: int
) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    params[step % len(params)].grad = None


def replace_memory(params: list[torch.nn.Parameter], grads: list[torch.Tensor], step: int) -> None:
    for p in params:
        p.data = p.data.clone()


FUSED: Any = ({"fused": True}, {})
FOREACH: Any = ({"foreach": True}, {"foreach": True})
SETS: dict[str, tuple[str, int, bool, Change, Any]] = {
    # name: shapes, steps, whether each tensor has a group, change before a step, options of AdamW
    # and of Apollo
    "ResNet-110, 335 tensors": ("resnet-110", 300, False, unchanged, FUSED),
    "10,000 tensors of 64": ("64 x 10000", 40, False, unchanged, FUSED),
    "300 groups of one tensor of 64": ("64 x 300", 150, True, unchanged, FUSED),
    "300 groups, both foreach": ("64 x 300", 100, True, unchanged, FOREACH),
    "300 tensors of 256, a changing gradient None": (
        "256 x 300",
        300,
        False,
        move_missing_gradient,
        FUSED,
    ),
    "300 tensors of 256, p.data replaced": ("256 x 300", 300, False, replace_memory, FUSED),
    "64 M elements in one tensor": ("64000000 x 1", 12, False, unchanged, FUSED),
}


def shapes_of(text: str) -> Shapes:
    if " x " in text:
        size, count = map(int, text.split(" x "))
        return [(size,)] * count
    return ParameterSet(text).shapes()


def measure(text: str, steps: int, grouped: bool, change: Change, options: Any) -> list[float]:
    """Return the median time of a step of AdamW and of Apollo, in seconds."""
    optimizers: list[Any] = []
    for kind, settings in zip((torch.optim.AdamW, apollo_qn.Apollo), options, strict=True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes_of(text)]
        grads = [torch.randn_like(p) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        groups: Any = [{"params": [p]} for p in params] if grouped else params
        optimizers.append((kind(groups, lr=0.1, **settings), params, grads, []))
    for step in range(steps):
        for optimizer, params, grads, seconds in optimizers:
            change(params, grads, step)
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[steps // 10 :]) for *_, seconds in optimizers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads\n")
    print("| set | AdamW, ms | Apollo, ms | ratio |\n|---|---|---|---|")
    rows = {}
    for name, settings in SETS.items():
        adamw, apollo = (1e3 * x for x in measure(*settings))
        rows[name] = {"adamw_ms": adamw, "apollo_ms": apollo, "ratio": apollo / adamw}
        print(f"| {name} | {adamw:.2f} | {apollo:.2f} | {apollo / adamw:.2f} |", flush=True)
    if arguments.out:
        found = {"torch": torch.__version__, "threads": arguments.threads, "sets": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
