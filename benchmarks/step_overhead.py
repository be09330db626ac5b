"""Step time of Apollo against torch.optim.AdamW on the same tensors, where overhead counts.

The sets are many small tensors, many groups, and gradients or memory that change at each step. Both
optimizers take their steps in turn, in one process; the table has medians and their ratio.

    python benchmarks/step_overhead.py --threads 2

Run it with nothing else on the machine: on a busy one the ratio says little.
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


def nothing(params: list[torch.nn.Parameter], grads: list[torch.Tensor], step: int) -> None:
    pass


def another_gradient_is_none(
    params: list[torch.nn.Parameter], grads: list[torch.Tensor], step: int
) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    params[step % len(params)].grad = None


def all_memory_is_new(
    params: list[torch.nn.Parameter], grads: list[torch.Tensor], step: int
) -> None:
    for p in params:
        p.data = p.data.clone()


FUSED, FOREACH = ({"fused": True}, {}), ({"foreach": True}, {"foreach": True})
SETS: dict[str, tuple[str, int, bool, Change, Any]] = {
    # name: shapes, steps, a group per tensor, what changes, options of AdamW and of Apollo
    "ResNet-110, 335 tensors": ("resnet-110", 300, False, nothing, FUSED),
    "10,000 tensors of 64": ("64 x 10000", 40, False, nothing, FUSED),
    "300 groups of one tensor of 64": ("64 x 300", 150, True, nothing, FUSED),
    "300 groups, both foreach": ("64 x 300", 100, True, nothing, FOREACH),
    "300 tensors of 256, another gradient None": (
        "256 x 300",
        300,
        False,
        another_gradient_is_none,
        FUSED,
    ),
    "300 tensors of 256, all p.data new": ("256 x 300", 300, False, all_memory_is_new, FUSED),
    "64 M elements in one tensor": ("64000000 x 1", 12, False, nothing, FUSED),
}


def shapes_of(text: str) -> Shapes:
    if " x " in text:
        size, count = map(int, text.split(" x "))
        return [(size,)] * count
    return ParameterSet(text).shapes()


def measure(text: str, steps: int, grouped: bool, change: Change, options: Any) -> list[float]:
    """Return the median seconds of a step of AdamW and of Apollo."""
    made = []
    for kind, settings in zip((torch.optim.AdamW, apollo_qn.Apollo), options, strict=True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes_of(text)]
        grads = [torch.randn_like(p) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        groups: Any = [{"params": [p]} for p in params] if grouped else params
        made.append((kind(groups, lr=0.1, **settings), params, grads, []))
    for step in range(steps):
        for optimizer, params, grads, seconds in made:
            change(params, grads, step)
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[steps // 10 :]) for *_, seconds in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
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
