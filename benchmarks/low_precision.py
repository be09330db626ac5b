"""Loss and memory of training in 16 bits, against float32.

    python benchmarks/low_precision.py [--updates 300] [--hidden 64] [--batch 16] [--seeds 3]
        [--rates 100 5] [--json FILE]

The task is the embedded language task, WordNet's definitions, with a smaller network than its
recipe's. Weights, gradients and activations are all in float32, or all in bfloat16 without master
weights. The softmax computes in float32 from bfloat16 weights, as losses do.

There are two learning rates: the recipe's, and one so small that most updates are below the last
place of a bfloat16 number, as they are late in a long training. The tables show, in nats per word,
the mean training loss of the last eighth of the steps, the validation loss, and the difference from
float32 with the same seed. A last table shows the bytes per parameter of parameter, gradient and
state after a step, beside torch.optim.AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import apollo_qn
from apollo_bench.config.optimizer_settings import ApolloSettings
from apollo_bench.config.recipe import RunSpec, load
from apollo_bench.optimizers.registry import lr_factor
from apollo_bench.workloads import tasks
from apollo_qn import Apollo

F32, BF16 = torch.float32, torch.bfloat16
# name: dtype of the model, settings of Apollo; the others are compared with the first
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (F32, {}),
    "float32, bfloat16 state": (F32, {"state_dtype": BF16}),
}
for _rounding in ("nearest", "stochastic", "kahan"):
    MODES[f"bfloat16 {_rounding}"] = (BF16, {"rounding": _rounding})
    MODES[f"bfloat16 {_rounding}, bfloat16 state"] = (
        BF16,
        {"rounding": _rounding, "state_dtype": BF16},
    )


class _Float32Compute(nn.Module):
    """A module that computes in float32 from weights of fewer bits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        weights = {name: p.float() for name, p in self.inner.named_parameters()}
        return functional_call(self.inner, weights, inputs)


class _Bfloat16(nn.Module):
    """The language model in bfloat16, except for the arithmetic of the softmax."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network.to(BF16)
        self.network.softmax = _Float32Compute(self.network.softmax)

    def forward(self, tokens: Tensor, targets: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        return self.network(tokens, targets, tuple(x.to(BF16) for x in state))


def train(spec: RunSpec, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, float]:
    """Train once, and return the losses at the end and the time in seconds."""
    task = tasks.make(spec)
    torch.manual_seed(spec.seed)
    model = task.model()
    if dtype is BF16:
        model = _Bfloat16(model)
    assert isinstance(spec.optimizer, ApolloSettings)
    chosen = spec.optimizer.model_dump(exclude={"method"})
    optimizer = Apollo(model.parameters(), **chosen, **settings)
    steps = spec.train.schedule.steps(task.steps_per_epoch)
    factor = lr_factor(spec.train.schedule, spec.name, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    hidden_state: tuple[Tensor, ...] = ()
    for batch in _batches(task, spec.seed, steps):
        loss, hidden_state = task.loss(model, batch, batch, hidden_state)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.train.clip_norm or math.inf)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        perplexity = task.metrics(task.evaluate(model))[task.monitored.name]
    return {
        "train": statistics.fmean(losses[-steps // 8 :]),
        "valid": math.log(perplexity),
        "seconds": time.perf_counter() - start,
    }


def _batches(task: Any, seed: int, steps: int) -> Iterator[Any]:
    """Yield the batches of the first epoch, as the training loop does; exit if it is too short."""
    if steps > task.steps_per_epoch:
        sys.exit(
            f"--updates is {steps}, allowed are at most the {task.steps_per_epoch} of an epoch"
        )
    for _, batch in zip(range(steps), task.batches(seed, 0, 0), strict=False):
        yield batch


Losses = dict[str, list[dict[str, float]]]  # by mode; one entry per seed


def losses(changed: list[str], rates: list[float], seeds: list[int]) -> dict[float, Losses]:
    """Train with every rate, mode and seed, and return the losses by rate.

    Args:
        changed: changed settings of the recipe, as ``--set`` takes them.
        rates: learning rates.
        seeds: seeds of the runs.
    """
    found: dict[float, Losses] = {rate: {name: [] for name in MODES} for rate in rates}
    for seed in seeds:
        for rate in rates:
            recipe = load("wordnet", [*changed, f"optimizers.apollo.lr={rate}"])
            for name, (dtype, settings) in MODES.items():
                found[rate][name].append(train(recipe.run("apollo", seed), dtype, settings))
                print(f"{seed}, {rate}, {name}: {found[rate][name][-1]}", file=sys.stderr)
    return found


def _bytes(tensors: list[Tensor | None]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def memory() -> dict[str, dict[str, float]]:
    """Return the bytes per parameter after a step, by purpose, for each optimizer and mode."""
    n = 1 << 20

    def count(
        dtype: torch.dtype,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        master_weights: bool,
    ) -> dict[str, float]:
        weight = nn.Parameter(torch.ones(n, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        stepped = weight
        if master_weights:
            stepped = nn.Parameter(weight.detach().float())
            stepped.grad = weight.grad.float()
        optimizer = make([stepped])
        optimizer.step()
        state = [x for x in optimizer.state[stepped].values() if isinstance(x, Tensor)]
        parts = {
            "parameter": _bytes([weight]),
            "gradient": _bytes([weight.grad]),
            "master weights": _bytes([stepped] if master_weights else []),
            "state": _bytes([*state]),
        }
        sizes = {name: round(size / n, 3) for name, size in parts.items()}
        return {**sizes, "all": round(sum(parts.values()) / n, 3)}

    result = {
        "AdamW, float32": count(F32, torch.optim.AdamW, False),
        "AdamW, bfloat16 with float32 master weights": count(BF16, torch.optim.AdamW, True),
        "AdamW, bfloat16": count(BF16, torch.optim.AdamW, False),
    }
    for name, (dtype, settings) in MODES.items():
        result[f"Apollo, {name}"] = count(dtype, partial(Apollo, **settings), False)
    return result


def show(found: dict[float, Losses], sizes: dict[str, dict[str, float]]) -> None:
    """Print the tables as Markdown."""
    for rate, by_mode in found.items():
        first = next(iter(by_mode.values()))
        print(f"| lr {rate:g} | training loss | / float32 | validation loss | / float32 |")
        print("|---|---|---|---|---|")
        for name, runs in by_mode.items():
            cells = [name]
            for split in ("train", "valid"):
                changes = [
                    100 * (a[split] / b[split] - 1) for a, b in zip(runs, first, strict=True)
                ]
                cells.append(f"{statistics.fmean(run[split] for run in runs):.4f}")
                spread = f"{min(changes):+.2f} to {max(changes):+.2f}"
                cells.append(f"{statistics.fmean(changes):+.2f} % ({spread})")
            print(f"| {' | '.join(cells)} |")
        print()
    print("| bytes per parameter | parameter | gradient | master weights | state | all |")
    print("|---|---|---|---|---|---|")
    for name, parts in sizes.items():
        print(f"| {name} | {' | '.join(f'{size:.3g}' for size in parts.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=64, help="units; the recipe has 128")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 5.0])
    parser.add_argument("--batch", type=int, default=16, help="sentences; the recipe has 32")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for every number")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(1, arguments.seeds + 1))
    sizes = memory()
    changed = [
        f"train.batch_size={arguments.batch}",
        f"schedules.cosine.updates={arguments.updates}",
        f"model.hidden={arguments.hidden}",
        f"model.embedding={arguments.hidden // 2}",
    ]
    found = losses(changed, arguments.rates, seeds)
    show(found, sizes)
    if arguments.json:
        about = {
            "command": " ".join(["python", "benchmarks/low_precision.py", *sys.argv[1:]]),
            "torch": torch.__version__,
            "apollo_qn": apollo_qn.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "seeds": seeds,
            "recipe": ["wordnet", *changed],
            "unit": "nats per word; bytes per parameter",
        }
        partial = arguments.json.with_suffix(".partial")
        text = json.dumps({**about, "losses": found, "bytes": sizes}, indent=1)
        partial.write_text(text + "\n")
        partial.replace(arguments.json)


if __name__ == "__main__":
    main()
