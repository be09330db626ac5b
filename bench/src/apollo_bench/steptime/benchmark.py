"""Run the step-time benchmark and write its files."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import apollo_qn
from apollo_bench.atomic_write import write_atomically
from apollo_bench.available_cores import available_cores
from apollo_bench.errors import ExperimentError
from apollo_bench.interrupts import Interrupted, catch_signals
from apollo_bench.progress_callback import ProgressCallback
from apollo_bench.runs.run_directory import describe_machine
from apollo_bench.steptime import presentation, timing
from apollo_bench.steptime.candidates import choose_candidates
from apollo_bench.steptime.measurement import SetResult, measure
from apollo_bench.steptime.parameter_sets import choose_sets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the benchmark; None for sets or optimizers means all."""

    sets: list[str] | None
    optimizers: list[str] | None
    repeats: int
    seconds: float  # for each set
    threads: int | None  # None: torch's own choice
    dtype: str
    seed: int
    device: str = "cpu"


def run(
    options: BenchmarkOptions,
    out: Path,
    command: str,
    report_progress: ProgressCallback,
    finished: Callable[[SetResult], None],
) -> None:
    """Measure one set after the other; after each, all files in ``out`` are written again.

    Args:
        options: options, checked before the first measurement.
        out: output folder, created if it is missing.
        command: command line, for the record.
        report_progress: called with a title, the rounds done and all rounds.
        finished: called with each result.

    Raises:
        ExperimentError: an option is invalid.
        Interrupted: on SIGINT or SIGTERM; complete results have been written.
    """
    timer = timing.timer_for(options.device)
    kind = timer.device.type
    sets, candidates = choose_sets(options.sets, kind), choose_candidates(options.optimizers, kind)
    if options.dtype not in DTYPES:
        raise ExperimentError(f"--dtype is {options.dtype!r}, allowed are {', '.join(DTYPES)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    about = _about(options, command, timer)
    out.mkdir(parents=True, exist_ok=True)
    results: list[SetResult] = []
    with catch_signals() as received:
        for chosen in sets:
            result = measure(
                chosen,
                candidates,
                repeats=options.repeats,
                budget=options.seconds,
                dtype=DTYPES[options.dtype],
                seed=options.seed,
                report_progress=report_progress,
                stop=lambda: bool(received),
                timer=timer,
            )
            if result.copy_times:
                results.append(result)
                _write(results, about, out)
                finished(result)
            if received:
                raise Interrupted(received[0])


def _write(results: list[SetResult], about: dict[str, Any], out: Path) -> None:
    record = {**about, "sets": [result.as_record() for result in results]}
    files = {
        "steptime.json": json.dumps(record, indent=1).encode() + b"\n",
        "steptime.md": presentation.markdown(results, about).encode(),
        "steptime.png": presentation.draw(results, about, "png"),
        "steptime.svg": presentation.draw(results, about, "svg"),
    }
    for name, content in files.items():
        write_atomically(out / name, content)


def _about(options: BenchmarkOptions, command: str, timer: timing.CpuTimer) -> dict[str, Any]:
    its, device = describe_machine(), timer.about()
    on_gpu = f"{device.pop('title')}; " if device else ""
    return {
        "command": command,
        **({"device": device} if device else {}),
        "machine": f"{on_gpu}{its['cpu']}, {torch.get_num_threads()} of {available_cores()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {options.dtype}",
        "platform": its["platform"],
        "torch": torch.__version__,
        "apollo_qn": apollo_qn.__version__,
        "python": platform.python_version(),
        "seed": options.seed,
        "unit": "milliseconds",
    }
