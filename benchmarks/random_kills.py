"""Kill a small training run at random moments with SIGKILL, and compare it with one never killed.

    python benchmarks/random_kills.py [--seconds 280] [--kills N] [--seed 0] [--method apollo]

A run is trained, killed and resumed until it ends; then the next one begins, until the time or the
number of kills is over. Each attempt is a process of its own, forked from this one, so that it
imports nothing again. Checkpoints are written after every step. At the end of each run the
weights, the optimizer's state, the random numbers, all records and the result must be bit-identical
to those of the run that was never killed; only times may differ. The exit status is 1 if they are
not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning_fabric  # noqa: F401  (imported before the processes are forked)
import torch
import torch.utils.tensorboard

from apollo_bench.config import recipe
from apollo_bench.config.recipe import RunSpec
from apollo_bench.launch.worker import train_prepared_run
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.checkpoint_files import read_checkpoint
from apollo_bench.workloads import tasks

RECIPE = """
task = "fashion-mnist"
seeds = [3]
model = { family = "resnet", depth = 8, width = 2 }
data = { train_examples = 384 }
train = { batch_size = 32, log_every = 1, checkpoint_every = 1e-9, average_checkpoints = 2 }
schedules.cosine = { kind = "cosine", epochs = 3 }
optimizers.sgd = { method = "sgd", lr = 0.1, momentum = 0.9 }
optimizers.adam = { method = "adam", lr = 0.01 }
optimizers.apollo = { method = "apollo", lr = 0.5, warmup_steps = 6, weight_decay = 4e-4 }
quick = { epochs = 1, seeds = 1 }
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=280.0, help="no new run after this time")
    parser.add_argument("--kills", type=int, default=10**9, help="no more kills than this")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--method", default="apollo", choices=("sgd", "adam", "apollo"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.toml").write_text(RECIPE)
        spec = recipe.load(str(folder / "tiny.toml")).run(options.method, 3)
        whole = prepared(folder / "whole", spec)
        before = time.monotonic()
        assert attempt(whole, None)
        span = time.monotonic() - before
        wanted = digests(whole)
        steps: Counter[str] = Counter()
        kills = runs = 0
        while kills < options.kills and time.monotonic() - started < options.seconds:
            directory = prepared(folder / f"run{runs}", spec)
            # while there are kills left: later ones let the run end
            while not attempt(directory, moments.uniform(0, span)):
                kills += 1
                steps[where(directory)] += 1
            runs += 1
            found = digests(directory)
            if found != wanted:
                differing = ", ".join(part for part in wanted if found[part] != wanted[part])
                print(f"After {kills} kills run {runs} differs in {differing}")
                return 1
    print(
        f"{kills} kills with SIGKILL (seed {options.seed}), {runs} runs of {options.method} "
        f"resumed to the end, all bit-identical to the run never killed; "
        f"{time.monotonic() - started:.0f} s"
    )
    print("Killed " + ", ".join(f"{place}: {count}" for place, count in sorted(steps.items())))
    return 0


def prepared(path: Path, spec: RunSpec) -> RunDirectory:
    directory = RunDirectory(path)
    directory.prepare(spec, tasks.make(spec).fingerprint, None, ["random_kills"])
    return directory


def attempt(directory: RunDirectory, seconds: float | None) -> bool:
    """Train in a process of its own; kill it after a while. Return whether it ended before."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if train_prepared_run(directory, lambda: False) == "finished" else 1
        finally:
            os._exit(status)
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.001)
        else:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return not os.WIFSIGNALED(status) and checked(status)
        return checked(status)
    return checked(os.waitpid(child, 0)[1])


def checked(status: int) -> bool:
    if status:
        raise SystemExit(f"a resumed run failed with status {status}")
    return True


def where(directory: RunDirectory) -> str:
    """Return in which state a kill left the run."""
    if any(directory.path.rglob("*.tmp")):
        return "while a file was written"
    if not directory.checkpoint.exists():
        return "before the first checkpoint"
    return "between two writes"


def digests(directory: RunDirectory) -> dict[str, str]:
    """Return a checksum of each part of a finished run that must be equal in two runs."""
    state = read_checkpoint(directory.checkpoint)
    parts: dict[str, Any] = {key: state[key] for key in ("model", "optimizer", "processes", "best")}
    parts["average"] = read_checkpoint(directory.averaged)
    parts["best weights"] = read_checkpoint(directory.best)
    parts["records"] = [without_times(record) for record in directory.records()]
    parts["result"] = without_times(directory.verdict() or {})
    return {name: hashlib.sha256(plain(part).encode()).hexdigest() for name, part in parts.items()}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "time"}


def plain(value: Any) -> str:
    """Return nested tensors and values as text."""

    def bits(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{type(tensor).__name__} in a checkpoint")
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()
        return [str(tensor.dtype), list(tensor.shape), content]

    return json.dumps(value, default=bits, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main())
