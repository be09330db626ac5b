"""Share of the optimizer's step in a training step, and its effect on the passes around it.

    python benchmarks/training_step.py [--batch 32] [--repeats 20] [--json FILE]

The model is ResNet-110, on random images of CIFAR-10's size. Each round does a forward pass, a
backward pass and a step with every optimizer, in an order that rotates; "none" takes no step. The
first columns show whether the passes take longer beside an optimizer, whose threads might compete
with torch's. The last columns show the time of the step.
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
from torch.nn import functional

import apollo_qn
from apollo_bench.workloads.image_classification.resnet import resnet
from apollo_qn import Apollo

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make | None] = {
    "none": None,
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Apollo fused": lambda p: Apollo(p, fused=True),
    "Apollo foreach": lambda p: Apollo(p, foreach=True),
}


def measure(batch: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return the times of the passes and of the steps in milliseconds, by optimizer."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    models, optimizers = {}, {}
    for name, make in OPTIMIZERS.items():
        models[name] = resnet(110)
        optimizers[name] = make(list(models[name].parameters())) if make else None
    times: dict[str, dict[str, list[float]]] = {n: {"passes": [], "step": []} for n in OPTIMIZERS}
    names = list(OPTIMIZERS)
    warmup = 2
    for round_ in range(repeats + warmup):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            models[name].zero_grad()
            functional.cross_entropy(models[name](x), y).backward()  # type: ignore[no-untyped-call]
            middle = time.perf_counter()
            optimizer = optimizers[name]
            if optimizer is not None:
                optimizer.step()
            if round_ >= warmup:
                times[name]["passes"].append(1e3 * (middle - start))
                times[name]["step"].append(1e3 * (time.perf_counter() - middle))
        print(f"\r{round_ + 1}/{repeats + warmup}", end="", file=sys.stderr)
    print("\r        \r", end="", file=sys.stderr)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for every measured time")
    arguments = parser.parse_args()
    times = measure(arguments.batch, arguments.repeats)
    alone = times["none"]["passes"]
    print(f"{'':16}{'passes, ms':>12}{'/ none':>9}{'step, ms':>11}{'share of both':>15}")
    for name, taken in times.items():
        passes, step = (statistics.median(taken[part]) for part in ("passes", "step"))
        ratio = statistics.median(a / b for a, b in zip(taken["passes"], alone, strict=True))
        print(f"{name:16}{passes:12.1f}{ratio:9.3f}{step:11.2f}{step / (passes + step):15.2%}")
    if arguments.json:
        about = {
            "command": " ".join(["python", "benchmarks/training_step.py", *sys.argv[1:]]),
            "torch": torch.__version__,
            "apollo_qn": apollo_qn.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "seed": 0,
            "unit": "milliseconds",
        }
        partial = arguments.json.with_suffix(".partial")
        partial.write_text(json.dumps({**about, "times": times}, indent=1) + "\n")
        partial.replace(arguments.json)


if __name__ == "__main__":
    main()
