"""Good learning rates of small models, and how near ``apollo_qn.lr_range_test`` comes to them.

    python benchmarks/learning_rates.py [--out runs/learning_rates] [--limit SECONDS]

Every training run is kept in OUT/runs.json, so that the script can be stopped and started again;
all of it takes about a quarter of an hour on one core. docs/finetuning.md and docs/choosing.md show
the tables. The runs and all tables are committed in benchmarks/results/.

A search trains each model for 300 steps with a warmup of a tenth and a cosine, once per seed and
rate of a grid of factors of 2, and compares the loss on held-out data. The range test is
``lr_range_test`` with its defaults. It sees other batches than the search.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import small_tasks  # beside this script
import torch

from apollo_qn import Apollo, ApolloWarning, lr_range_test

STEPS, WARMUP = 300, 30
SEEDS = (1, 2)
RANGE_TEST_SEED = 1000  # of the batches
# exponents of 2, lowest and highest
GRIDS = {
    "cnn": (-3, 4),
    "mlp": (-3, 4),
    "lstm": (2, 9),
    "transformer": (-2, 5),
    "lora": (-2, 5),
    "finetuning": (-4, 3),
}
NAMES = {
    "cnn": "convolutional network",
    "mlp": "MLP",
    "lstm": "LSTM",
    "transformer": "Transformer",
    "lora": "LoRA",
    "finetuning": "fine-tuning of all weights",
}
OTHERWISE_CLIPPED = ("mlp", "lora", "finetuning")  # searched with the other choice of clipping too
ADAMW = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # rates, for what is trained with AdamW as a rule
NEAR = 1.02

Key = tuple[Any, ...]


class Runs:
    """Results of training runs by key, kept in a file."""

    def __init__(self, file: Path, limit: float) -> None:
        self._file, self._end = file, time.monotonic() + limit
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.missing = 0

    def get(self, key: Key, make: Callable[[], Any]) -> Any:
        """Return a result; make it if it is missing and there is time, else return None."""
        name = " ".join(map(str, key))
        if name not in self.results:
            if time.monotonic() > self._end:
                self.missing += 1
                return None
            self.results[name] = make()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.results, indent=0))
        return self.results[name]


def cosine(t: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * t / STEPS))


def warmup_and_cosine(t: int) -> float:
    return min(1.0, (t + 1) / WARMUP) * cosine(t)


# the optimizer, and the factor of its rate at each step; Apollo warms up by itself
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[[int], float]]] = {
    "apollo": (partial(Apollo, warmup_steps=WARMUP), cosine),
    "adamw": (torch.optim.AdamW, warmup_and_cosine),
}


def held_out(
    task: small_tasks.Task, optimizer: str, lr: float, clip: float | None, seed: int
) -> float:
    """Return the held-out loss of a training run, infinite if the run diverged."""
    make, factor = OPTIMIZERS[optimizer]
    torch.manual_seed(seed)
    model = task.make_model()
    made = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, factor)
    finite = small_tasks.train(model, made, task.batches(seed, STEPS), clip, schedule)
    loss = task.held_out_loss(model) if finite else math.inf
    return round(loss, 4) if math.isfinite(loss) else math.inf


def proposal(task: small_tasks.Task) -> list[Any]:
    """Return the proposal, and the loss of each rate."""
    torch.manual_seed(RANGE_TEST_SEED)
    batches = task.batches(RANGE_TEST_SEED, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApolloWarning)
        found = lr_range_test(task.make_model(), small_tasks.loss_of, batches, clip_norm=task.clip)
    return [found.proposal, dict(zip(map(str, found.rates), found.losses, strict=True))]


def search(
    runs: Runs,
    task: small_tasks.Task,
    rates: Sequence[float],
    clip: float | None,
    optimizer: str = "apollo",
) -> dict[float, float]:
    """Return the mean held-out loss over the seeds of each rate that has been measured."""
    losses = {}
    for rate in rates:
        found = []
        for seed in SEEDS:
            key = (task.name, optimizer, f"lr={rate:.4g}", f"clip={clip}", f"seed={seed}")
            found.append(runs.get(key, partial(held_out, task, optimizer, rate, clip, seed)))
        if None not in found:
            losses[rate] = sum(found) / len(found)
    return losses


def grid(name: str) -> list[float]:
    low, high = GRIDS[name]
    return [2.0**k for k in range(low, high + 1)]


def shown(loss: float) -> str:
    return f"{loss:.3f}" if loss < 100 else "diverged"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def losses_by_rate(runs: Runs, tasks: dict[str, small_tasks.Task], names: Sequence[str]) -> str:
    """Return the table of some searches, with and without clipping where both were tried."""
    columns = []
    for name in names:
        task = tasks[name]
        other = [None if task.clip else 1.0] if name in OTHERWISE_CLIPPED else []
        for clip in (task.clip, *other):
            heading = NAMES[name] if clip is None else f"{NAMES[name]}, clipped to {clip:g}"
            columns.append((heading, search(runs, task, grid(name), clip)))
    rows = []
    for rate in sorted({rate for _, found in columns for rate in found}):
        cells = [f"{rate:g}"]
        for _, found in columns:
            cell = shown(found[rate]) if rate in found else ""
            best = rate in found and found[rate] == min(found.values())
            cells.append(f"**{cell}**" if best else cell)
        rows.append(cells)
    return table(["lr", *(heading for heading, _ in columns)], rows)


def range_tests(runs: Runs, tasks: dict[str, small_tasks.Task]) -> str:
    """Return the table of the proposals beside the best rates."""
    rows = []
    for name, task in tasks.items():
        proposed = runs.get((name, "range test"), partial(proposal, task))
        found = search(runs, task, grid(name), task.clip)
        if proposed is None or not found:
            continue
        rate = proposed[0]
        there = search(runs, task, [rate], task.clip)
        best = min(found, key=lambda r: found[r])
        good = [r for r, loss in found.items() if loss <= NEAR * found[best]]
        rows.append([
            NAMES[name], f"{rate:.2g}", f"{best:g}", f"{max(rate / best, best / rate):.2f}",
            f"{min(good):g} to {max(good):g}" if len(good) > 1 else f"{best:g}",
            shown(there[rate]) if there else "", shown(found[best]),
        ])  # fmt: skip
    head = [
        "model",
        "proposal",
        "best of the search",
        "factor",
        "rates within 2 % of the best loss",
    ]
    return table([*head, "loss at the proposal", "loss at the best"], rows)


def beside_adamw(runs: Runs, tasks: dict[str, small_tasks.Task]) -> str:
    """Return the table of Apollo and AdamW, each at its best rate of the search."""
    rows = []
    for name in OTHERWISE_CLIPPED:
        task = tasks[name]
        start = runs.get((name, "start"), partial(before, task))
        cells = []
        for optimizer, rates in (("apollo", grid(name)), ("adamw", ADAMW)):
            found = search(runs, task, rates, task.clip, optimizer)
            best = min(found, key=lambda r: found[r]) if found else None
            cells.append("" if best is None else f"{shown(found[best])} at {best:g}")
        rows.append([NAMES[name], "" if start is None else shown(start), *cells])
    return table(["model", "before training", "Apollo", "AdamW"], rows)


def before(task: small_tasks.Task) -> float:
    torch.manual_seed(SEEDS[0])
    return round(task.held_out_loss(task.make_model()), 4)


def report(runs: Runs, tasks: dict[str, small_tasks.Task]) -> str:
    """Return the tables of all that has been measured, after measuring what there is time for."""
    return f"""# Learning rates of small models

Written by `python benchmarks/learning_rates.py`: {STEPS} steps, loss on held-out data, mean of
{len(SEEDS)} seeds, torch {torch.__version__}, one thread.

## Loss by lr

{losses_by_rate(runs, tasks, [name for name in tasks if name not in OTHERWISE_CLIPPED])}

{losses_by_rate(runs, tasks, OTHERWISE_CLIPPED)}

## The range test beside the search

{range_tests(runs, tasks)}

## Apollo and AdamW, each at its best rate

{beside_adamw(runs, tasks)}
"""


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rates"))
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(options.out / "runs.json", options.limit)
    text = report(runs, small_tasks.tasks(options.out))
    (options.out / "learning_rates.md").write_text(text)
    print(text)
    print(
        f"{runs.missing} runs are missing: start the script again" if runs.missing else "complete"
    )


if __name__ == "__main__":
    main()
