"""Prepare the directories of many runs and train them: here, under torchrun or on Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console

from apollo_bench.config.execution import Execution, plan_execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.launch import custom_code_checks, ray_cluster, run_scheduler, torchrun
from apollo_bench.launch.progress import display
from apollo_bench.launch.run_scheduler import RunState
from apollo_bench.runs import compatibility, curvature_log
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_bench.training import process_group
from apollo_bench.workloads import tasks
from apollo_bench.workloads.workload import Workload


class Machines(NamedTuple):
    """Options on devices and processes, as ``plan_execution`` takes them."""

    accelerator: str
    devices: int
    jobs: int | None
    threads: int | None
    strategy: str
    cluster: str | None = None


class Request(NamedTuple):
    """The runs that a command asks for."""

    specs: list[RunSpec]
    out: Path
    data: Path | None  # folder of local data
    machines: Machines
    one_report: bool = False  # whether all runs below ``out`` must fit into one report
    diagnose_every: int | None = None  # steps
    # functions that take the fingerprints of the data, by task, and raise ExperimentError for
    # data that do not fit
    data_checks: tuple[Callable[[dict[str, str]], None], ...] = ()
    compared_with: Sequence[compatibility.RunIdentity] = ()  # finished runs of the same report
    # cost of the search that chose the settings, by task, schedule and optimizer
    search_costs: Mapping[tuple[str, str, str], Record] = MappingProxyType({})


def run_folder(out: Path, spec: RunSpec) -> Path:
    """Return the folder of a run's directory.

    Example:
        >>> from apollo_bench.config import recipe
        >>> run_folder(Path("runs/mine"), recipe.load("wordnet").run("apollo", seed=1)).as_posix()
        'runs/mine/runs/wordnet-apollo-cosine-seed1'
    """
    return out / "runs" / spec.label


def train_runs(request: Request, warn: Callable[[str], None]) -> list[RunState]:
    """Train all runs that are not finished.

    Example:
        >>> from apollo_bench.config import recipe
        >>> machines = Machines("cpu", devices=1, jobs=2, threads=1, strategy="ddp")
        >>> specs = recipe.load("fashion-mnist", quick=True).runs(["sgd", "apollo"])
        >>> train_runs(Request(specs, Path("runs/mine"), None, machines), print)  # doctest: +SKIP
        []

    Args:
        request: the runs.
        warn: called with advice for the user.

    Returns:
        The runs that failed. Under torchrun only the main process returns any.

    Raises:
        ExperimentError: an option, a run or its data cannot be used.
        Interrupted: on SIGINT or SIGTERM, after every run has written a checkpoint.
    """
    _check_out(request.out)
    _check_labels(request.specs)
    machines = request.machines
    under_torchrun = process_group.launched_by_torchrun()
    jobs, execution = _plan(machines, under_torchrun)
    if under_torchrun and (advice := process_group.restart_advice()):
        warn(advice)
    for spec in request.specs:
        execution.check(spec)
        if request.diagnose_every is not None:
            curvature_log.require_apollo(spec)
    console = Console(stderr=True)
    if under_torchrun:
        return _train_under_torchrun(request, execution, console, warn)
    runs = _prepare(request, execution, warn)
    with display(console) as shown:
        if machines.cluster is None:
            run_scheduler.run_all(runs, jobs, shown)
        else:
            ray_cluster.run_all(runs, machines.jobs, shown)
    return [run for run in runs if run.status == "failed"]


def _check_out(out: Path) -> None:
    try:
        os.path.realpath(out).encode()
    except UnicodeEncodeError:
        raise ExperimentError(
            f"--out is {str(out)!r}, which is not UTF-8, as TensorBoard needs; choose another"
        ) from None


def _check_labels(specs: Sequence[RunSpec]) -> None:
    """Raise ExperimentError if two runs would have one directory."""
    by_label: dict[str, RunSpec] = {}
    for spec in specs:
        other = by_label.setdefault(spec.label, spec)
        if other is not spec and other != spec:
            raise ExperimentError(
                f"two runs have the name {spec.label}: {other.name} with schedule "
                f"{other.schedule}, and {spec.name} with schedule {spec.schedule}; rename an "
                "optimizer or a schedule"
            )


def _plan(machines: Machines, under_torchrun: bool) -> tuple[int, Execution]:
    """Return the number of runs at a time, and how each is executed."""
    cluster = machines.cluster
    if cluster not in (None, *ray_cluster.ENGINES):
        allowed = ", ".join(ray_cluster.ENGINES)
        raise ExperimentError(f"--cluster is {cluster!r}, allowed are {allowed}")
    if under_torchrun and cluster is not None:
        raise ExperimentError(f"--cluster {cluster} starts runs itself, not by torchrun")
    jobs, execution = plan_execution(
        machines.accelerator,
        machines.devices,
        machines.jobs,
        machines.threads,
        machines.strategy,
        cluster is not None,
    )
    return (1, process_group.torchrun_execution(execution)) if under_torchrun else (jobs, execution)


def _train_under_torchrun(
    request: Request, execution: Execution, console: Console, warn: Callable[[str], None]
) -> list[RunState]:
    folders = [run_folder(request.out, spec) for spec in request.specs]
    with process_group.translate_lost_connection():
        process_group.init_process_group(execution.accelerator)
        runs = process_group.run_on_all(
            lambda: _prepare(request, execution, warn) if process_group.is_main_process() else []
        )
        with display(console) if runs else nullcontext() as shown:
            torchrun.run_all(folders, runs, shown)
    return [run for run in runs if run.status == "failed"]


def _prepare(request: Request, execution: Execution, warn: Callable[[str], None]) -> list[RunState]:
    """Create the run directories.

    Nothing is written before all runs are known to be trainable. Where they share a report, they
    must also be compatible with the runs that are already there.
    """
    specs = request.specs
    # one workload per task, because reading data takes a while
    first = {spec.task: spec for spec in reversed(specs)}
    workloads = {name: tasks.make(spec, request.data) for name, spec in first.items()}
    if request.data is not None:  # say what was read from the user's files
        for made in workloads.values():
            for remark in made.remarks:
                warn(remark)
    for check_data in request.data_checks:
        check_data({name: made.fingerprint for name, made in workloads.items()})
    remarks = custom_code_checks.check(specs, workloads, execution)
    new = {}
    for spec in specs:
        directory = RunDirectory(run_folder(request.out, spec))
        fingerprint, code = workloads[spec.task].fingerprint, custom_code_checks.code_of(spec)
        directory.check(spec, fingerprint, execution, code)
        new[directory.path.resolve()] = compatibility.RunIdentity(
            directory.path, spec, fingerprint, compatibility.code_versions(code)
        )
    if request.one_report:
        there = []
        for directory in compatibility.find_run_directories(request.out):
            if directory.path.resolve() not in new:
                with suppress(ExperimentError):  # damaged: the report leaves it out, and says so
                    there.append(compatibility.identity_of(directory))
        compatibility.check([*request.compared_with, *there, *new.values()])
    for text in dict.fromkeys(text for texts in remarks.values() for text in texts):
        warn(text)
    runs = [
        _prepare_run(
            request, execution, spec, workloads[spec.task], remarks.get((spec.task, spec.name), [])
        )
        for spec in specs
    ]
    for run in runs:
        if run.directory.result.exists() and run.directory.usable_verdict() is None:
            warn(
                f"{run.directory.path}: its result or its records are damaged; it continues from "
                "its checkpoint"
            )
    return runs


def _prepare_run(
    request: Request,
    execution: Execution,
    spec: RunSpec,
    workload: Workload,
    remarks: list[str],
) -> RunState:
    directory = RunDirectory(run_folder(request.out, spec))
    directory.prepare(
        spec,
        workload.fingerprint,
        request.data,
        sys.argv,
        execution,
        [*workload.remarks, *remarks],
        keep_threads=request.machines.threads is None,
        diagnose_every=request.diagnose_every,
        published=workload.published or request.data is None,
        code=custom_code_checks.code_of(spec),
        search=request.search_costs.get((spec.task, spec.schedule, spec.name)),
    )
    return RunState(
        directory,
        spec,
        spec.train.schedule.steps(workload.steps_per_epoch),
        workload.monitored,
        workload.unit,
        workload.units_per_step,
    )
