"""The command line ``apollo-bench``: read options, call, and tell errors in one line."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from apollo_bench.config.recipe import Recipe, RunSpec
from apollo_bench.config.schema import Analysis
from apollo_bench.errors import ExperimentError
from apollo_bench.interrupts import Interrupted
from apollo_bench.training import process_group

if TYPE_CHECKING:
    from apollo_bench.config.execution import Placement
    from apollo_bench.launch.run_scheduler import RunState

app = typer.Typer(
    help="Train with Apollo beside other optimizers, and report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# embedded: what `compare` trains by itself
_SMALL = ("fashion-mnist", "wordnet", "phrases")
_DIAGNOSE_EVERY = 25  # steps, where --diagnostics does not say
TaskName = Annotated[str, typer.Argument(help="A task (see `tasks`), or a recipe's .toml file.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A short look: the recipe's [quick], a minute or so.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="How many seeds.")]
Optimizers = Annotated[
    str | None, typer.Option(help="Which of the recipe's optimizers: a,b,c or all.")
]
Schedules = Annotated[str | None, typer.Option(help="Which of the recipe's schedules: a,b.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another value: train.batch_size=64, optimizer.lr=0.25, ..."),
]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Local data, in place of ours.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at a time.  [default: as many as fit]")]
Accelerator = Annotated[str, typer.Option(help="cpu or gpu.")]
Devices = Annotated[int, typer.Option(min=1, help="Processes that share each run's batches.")]
Strategy = Annotated[
    str, typer.Option(help="Of several processes: ddp, or fsdp2 (transformers only).")
]
Cluster = Annotated[
    str | None,
    typer.Option(help="ray: each run is a task of the cluster of RAY_ADDRESS, or of a local one."),
]
Tuned = Annotated[
    Path | None,
    typer.Option(help="Folder of a finished `sweep TASK tuning`, whose best settings are taken."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of each process.  [default: its part of the cores]"),
]


class _WithDiagnostics(TyperCommand):
    """A command whose option --diagnostics may stand without its number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the number in where it is missing."""
        for i, word in enumerate(args):
            if word == "--diagnostics" and not re.fullmatch(r"-?\d+", "".join(args[i + 1 : i + 2])):
                args = [*args[: i + 1], str(_DIAGNOSE_EVERY), *args[i + 1 :]]
                break
        return super().parse_args(ctx, args)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ExperimentError as error:
        if process_group.speaks_of(error):
            typer.echo(f"apollo-bench: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        typer.echo(f"apollo-bench: {what}", err=True)
        raise typer.Exit(2) from None


@app.command()
def compare(
    task: Annotated[
        str | None,
        typer.Argument(
            help="A task (see `tasks`), or a recipe's .toml file.  [default: "
            f"{', '.join(_SMALL)}, all small]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder.  [default: runs/compare]")
    ] = None,
    quick: Quick = False,
    seeds: Seeds = None,
    optimizers: Optimizers = None,
    schedules: Schedules = None,
    settings: Settings = None,
    tuned: Tuned = None,
    data: DataFolder = None,
    jobs: Jobs = None,
    accelerator: Accelerator = "cpu",
    devices: Devices = 1,
    strategy: Strategy = "ddp",
    threads: Threads = None,
    cluster: Cluster = None,
) -> None:
    """Train a task with several optimizers, schedules and seeds, and write a report.

    Without a task: images, a language model and a translator, the paper's tables 1 to 3 in small.
    Stop it with Ctrl-C; the same command goes on where it was.
    """
    with _one_line_errors():
        where = _Where(accelerator, devices, jobs, threads, strategy, cluster)
        folder = out or Path("runs") / ("compare-quick" if quick else "compare")
        if task is None and data is not None:
            raise ExperimentError(f"--data is {str(data)!r}, which task's? name one before it")
        specs = []
        for one in _SMALL if task is None else (task,):
            plan, names, chosen = _plan(one, quick, settings, optimizers, schedules, tuned=tuned)
            specs += plan.runs(names, seeds, chosen)
        failed = _train_and_report(specs, folder, data, where, tuned)
    if failed:
        raise typer.Exit(1)


@app.command()
def sweep(
    task: TaskName,
    analysis: Annotated[
        Analysis, typer.Argument(help="One of the paper's analyses, or the search for settings.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Output folder.  [default: runs/sweep-TASK-ANALYSIS]")
    ] = None,
    quick: Quick = False,
    seeds: Seeds = None,
    optimizers: Optimizers = None,
    schedules: Schedules = None,
    settings: Settings = None,
    tuned: Tuned = None,
    data: DataFolder = None,
    jobs: Jobs = None,
    accelerator: Accelerator = "cpu",
    devices: Devices = 1,
    strategy: Strategy = "ddp",
    threads: Threads = None,
    cluster: Cluster = None,
) -> None:
    """Train a task at several values of a setting, and write a report.

    lr-robustness: learning rates times the recipe's factors, weight decay divided by them (figure 2
    of the paper). weight-decay: the recipe's values, coupled by eq. (14) (figure 4). tuning: as
    many settings of each optimizer from the recipe's ranges, judged on held-out data; --tuned takes
    the best. Stop it with Ctrl-C; the same command goes on where it was.
    """
    with _one_line_errors():
        where = _Where(accelerator, devices, jobs, threads, strategy, cluster)
        plan, names, chosen = _plan(task, quick, settings, optimizers, schedules, analysis, tuned)
        if analysis == "tuning":
            from apollo_bench.search import trials

            specs = trials.tries(plan, names, seeds, chosen)
        else:
            specs = plan.sweep(analysis, names, seeds, chosen)
        name = f"sweep-{plan.task}-{analysis}{'-quick' if quick else ''}"
        folder = out or Path("runs") / name
        failed = _train_and_report(specs, folder, data, where, tuned)
    if failed:
        raise typer.Exit(1)


@app.command(cls=_WithDiagnostics)
def train(
    task: TaskName,
    optimizer: Annotated[str, typer.Option(help="Which of the recipe's optimizers.")],
    seed: Annotated[int | None, typer.Option(help="Default: the recipe's first.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Default: the first that `compare` trains.")
    ] = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/train"),
    data: DataFolder = None,
    accelerator: Accelerator = "cpu",
    devices: Devices = 1,
    strategy: Strategy = "ddp",
    threads: Threads = None,
    diagnostics: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="[EVERY]",
            help="Measure Apollo's curvature every so many steps (25), for TensorBoard, the report "
            "and diagnostics.jsonl.",
        ),
    ] = None,
) -> None:
    """Train one run.

    With the same --threads these are, bit by bit, the weights of the run that `compare` makes of
    it; with other threads sums are rounded otherwise.
    """
    with _one_line_errors():
        where = _Where(accelerator, devices, 1, threads, strategy)
        plan, _, chosen = _plan(task, False, settings, optimizer, schedule)
        seed = plan.seeds[0] if seed is None else seed
        spec = plan.run(optimizer, seed, schedule or chosen[0])
        failed = _train([spec], out, data, where, diagnose_every=diagnostics)
        _say(f"{_run_folder(out, spec)}")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or folders with runs in them.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write.  [default: the first folder]")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Metric to which times are taken.  [default: chosen by the others]"),
    ] = None,
) -> None:
    """Write tables, curves and one HTML page from finished or running runs."""
    with _one_line_errors():
        folder = out or runs[0]
        _keep_caches_in(folder)
        _report(runs, folder, target)


@app.command("archive")
def keep(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or folders with runs in them.")],
    out: Annotated[Path, typer.Option(help="Folder of the archive.")],
) -> None:
    """Write what a report needs of ended runs as two small text files, and the report beside them.

    `report` reads the archive as it does the runs. It holds recipes, versions, machine, command,
    evaluations and outcomes; no weights, and no paths of this machine.
    """
    with _one_line_errors():
        from apollo_bench.runs import archive, compatibility

        directories = [one for folder in runs for one in compatibility.directories(folder)]
        if not directories:
            raise ExperimentError(f"{runs[0]}: no runs in it; `apollo-bench compare` makes some")
        compatibility.check(compatibility.candidate(directory) for directory in directories)
        count = archive.write(directories, out)
        typer.echo(f"Kept {count} runs in {out}")
        _keep_caches_in(runs[0])
        _report([out], out)


@app.command()
def prepare(
    task: Annotated[
        str, typer.Argument(help="one-billion-word, wmt14-en-de, multi30k or cifar10.")
    ],
    raw: Annotated[Path, typer.Option(help="Folder of the raw download.")],
    out: Annotated[Path | None, typer.Option(help="Output folder.  [default: data/TASK]")] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="1b_word_vocab.txt.  [default: made of the text]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.  [default: one a core]")
    ] = None,
    subwords: Annotated[
        int | None, typer.Option(min=300, help="Of both languages.  [default: the recipe's]")
    ] = None,
) -> None:
    """Turn a raw download into the fast form that --data takes.

    Stop it with Ctrl-C; the same command goes on with the shards of one-billion-word that are
    missing. The other tasks, which take minutes, begin anew.
    """
    with _one_line_errors():
        from apollo_bench.config import recipe
        from apollo_bench.config.execution import cores
        from apollo_bench.config.schema import Sentences
        from apollo_bench.launch.progress import counter
        from apollo_bench.workloads.image_classification import cifar10
        from apollo_bench.workloads.language_modeling import one_billion_word
        from apollo_bench.workloads.translation import encoded_corpus, multi30k, wmt14

        readers = {"wmt14-en-de": wmt14.load, "multi30k": multi30k.load}
        preparable = ("one-billion-word", *readers, "cifar10")
        if task not in preparable:
            raise ExperimentError(
                f"task is {task!r}, allowed are {', '.join(preparable)}; the others need no "
                "preparation"
            )
        folder = out or Path("data") / task
        with counter(Console(stderr=True)) as tell:
            if task in readers:
                data = recipe.load(task).data
                assert isinstance(data, Sentences)
                tell("Reading sentences", 0, 0)
                size = data.subwords if subwords is None else subwords
                text = readers[task](raw)
                tell("Learning subwords and encoding", 0, 0)
                corpus = encoded_corpus.encode(text, size, clean=True)
                encoded_corpus.prepare(corpus, folder, tell)
                typer.echo(corpus.counts)
            elif task == "cifar10":
                tell("Decoding images", 0, 0)
                folder = cifar10.prepare(cifar10.load(raw), folder)
            else:
                one_billion_word.prepare(raw, folder, vocabulary, workers or cores(), tell)
        typer.echo(f"Prepared: --data {folder}")


@app.command()
def steptime(
    sets: Annotated[
        str | None, typer.Option(help="Parameter sets: a,b,c; a/8 is an eighth of one.")
    ] = None,
    optimizers: Annotated[
        str | None, typer.Option(help="Optimizers by the names of the table: a,b,c.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 40,
    seconds: Annotated[
        float, typer.Option(min=0, help="For each set; then the first rounds are enough.")
    ] = 45.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of parameters and gradients.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 and so on.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/steptime"),
) -> None:
    """Measure step time, memory and bandwidth of every back end beside PyTorch's optimizers.

    All step in turn in one process, so that what disturbs one disturbs all. A contender that is
    much slower than the peer takes part in the first rounds only.
    """
    with _one_line_errors():
        from apollo_bench.launch.progress import counter
        from apollo_bench.steptime import benchmark, presentation

        _keep_caches_in(out)
        options = benchmark.Options(
            None if sets is None else sets.split(","),
            None if optimizers is None else [name.strip() for name in optimizers.split(",")],
            repeats,
            seconds,
            threads,
            dtype,
            seed,
            device,
        )
        console = Console() if sys.stdout.isatty() else Console(width=120)
        command = shlex.join(["apollo-bench", *sys.argv[1:]])
        try:
            with counter(Console(stderr=True)) as tell:
                benchmark.run(
                    options,
                    out,
                    command,
                    tell,
                    lambda result: console.print(presentation.table(result)),
                )
        except Interrupted as interrupt:
            typer.echo(f"Stopped; what is complete lies in {out}.", err=True)
            raise typer.Exit(128 + interrupt.number) from None
        typer.echo(f"Tables and bars: {out / 'steptime.md'}, {out / 'steptime.png'}")


@app.command("tasks")
def list_tasks() -> None:
    """List what there is: data, size and where it comes from."""
    with _one_line_errors():
        from apollo_bench.config import recipe
        from apollo_bench.workloads.tasks import TASKS

        table = Table("task", "optimizers", "data", "from", box=None, pad_edge=False)
        for name, family in TASKS.items():
            table.add_row(name, ", ".join(recipe.load(name).optimizers), family.data, family.source)
        Console().print(table)


class _Where(NamedTuple):
    """What the command line says of machines."""

    accelerator: str
    devices: int
    jobs: int | None
    threads: int | None
    strategy: str
    cluster: str | None = None


def _run_folder(folder: Path, spec: RunSpec) -> Path:
    return folder / "runs" / spec.label


def _plan(
    task: str,
    quick: bool,
    settings: list[str] | None,
    optimizers: str | None,
    schedules: str | None,
    analysis: Analysis | None = None,
    tuned: Path | None = None,
) -> tuple[Recipe, list[str] | None, list[str]]:
    """The recipe, and which of its optimizers (None: it says itself) and schedules are chosen."""
    from apollo_bench.config import recipe

    as_it_stands = recipe.load(task)
    names = _chosen("--optimizers", optimizers, as_it_stands.optimizers)
    chosen = _chosen("--schedules", schedules, as_it_stands.schedules)
    chosen = chosen or as_it_stands.default_schedules(analysis)
    plan = recipe.load(task, settings or (), names, chosen, quick)
    if analysis == "tuning":
        if tuned is not None:
            raise ExperimentError(f"--tuned is {str(tuned)!r}, a tuning has none; leave it out")
    elif tuned is not None:
        from apollo_bench.search import trials

        own = plan.compare if analysis is None else plan.sweeps.get(analysis)
        trained = names or (own.optimizers if own else None) or list(plan.optimizers)
        plan = trials.apply(plan, tuned, trained, chosen, coupled=analysis == "weight-decay")
    return plan, names, chosen


def _chosen(option: str, value: str | None, there: Iterable[str]) -> list[str] | None:
    if value is None:
        return None
    names = list(there) if value == "all" else [name.strip() for name in value.split(",")]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise ExperimentError(f"{option} names none; there are {', '.join(there)}")
    return names


def _train_and_report(
    specs: list[RunSpec], folder: Path, data: Path | None, where: _Where, tuned: Path | None
) -> bool:
    failed = _train(specs, folder, data, where, in_one_report=True, tuned=tuned)
    if process_group.speaks():
        _report([folder], folder)
    return failed


def _train(
    specs: list[RunSpec],
    folder: Path,
    data: Path | None,
    where: _Where,
    in_one_report: bool = False,
    diagnose_every: int | None = None,
    tuned: Path | None = None,
) -> bool:
    """Train what is not finished; True: a run has failed."""
    from apollo_bench.config.execution import share
    from apollo_bench.launch import ray_cluster, run_scheduler, torchrun
    from apollo_bench.launch.progress import display
    from apollo_bench.runs import curvature_log

    if where.cluster not in (None, *ray_cluster.ENGINES):
        allowed = ", ".join(ray_cluster.ENGINES)
        raise ExperimentError(f"--cluster is {where.cluster!r}, allowed are {allowed}")
    on_cluster = where.cluster is not None
    if process_group.started():
        if where.cluster is not None:
            raise ExperimentError(f"--cluster {where.cluster} starts runs itself, not by torchrun")
        jobs, placement = 1, process_group.placement(share(*where[:-1], on_cluster)[1])
        if advice := process_group.advice():
            _say(f"apollo-bench: {advice}", err=True)
    else:
        jobs, placement = share(*where[:-1], on_cluster)
    for spec in specs:
        placement.check(spec)
        if diagnose_every is not None:
            curvature_log.check(spec)

    def prepare() -> list[run_scheduler.RunState]:
        if not process_group.speaks():
            return []
        keep_threads = where.threads is None
        return _prepared(
            specs, folder, data, placement, keep_threads, in_one_report, diagnose_every, tuned
        )

    console = Console(stderr=True)
    runs: list[RunState] = []
    try:
        if process_group.started():
            with process_group.losing_none():
                process_group.join(placement.accelerator)
                runs = process_group.agreed(prepare)
                with display(console) if runs else nullcontext() as shown:
                    torchrun.run_all([_run_folder(folder, spec) for spec in specs], runs, shown)
        else:
            runs = prepare()
            with display(console) as shown:
                if where.cluster is None:
                    run_scheduler.run_all(runs, jobs, shown)
                else:
                    ray_cluster.run_all(runs, where.jobs, shown)
    except Interrupted as interrupt:
        again = shlex.join(["apollo-bench", *sys.argv[1:]])
        _say(f"Stopped; nothing is lost. Go on with:  {again}", err=True)
        raise typer.Exit(128 + interrupt.number) from None
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        typer.echo(
            f"apollo-bench: {run.name} failed ({run.reason}); see {run.directory.log}; "
            "the same command tries it again",
            err=True,
        )
    return bool(failed)


def _prepared(
    specs: list[RunSpec],
    folder: Path,
    data: Path | None,
    placement: Placement,
    keep_threads: bool,
    in_one_report: bool,
    diagnose_every: int | None,
    tuned: Path | None,
) -> list[RunState]:
    """The runs with their directories.

    Nothing is written before it is clear that all can be trained, and where they are meant for one
    report, that they can stand in one with what is there.
    """
    from apollo_bench.launch import run_scheduler
    from apollo_bench.runs import compatibility
    from apollo_bench.runs.run_directory import RunDirectory
    from apollo_bench.workloads import tasks

    first = {spec.task: spec for spec in reversed(specs)}  # to read data takes a while
    made = {name: tasks.make(spec, data) for name, spec in first.items()}
    if tuned is not None:
        from apollo_bench.search import trials

        trials.check_data(tuned, {name: task.fingerprint for name, task in made.items()})
    new = {}
    for spec in specs:
        directory = RunDirectory(_run_folder(folder, spec))
        fingerprint = made[spec.task].fingerprint
        directory.check(spec, fingerprint, placement)
        new[directory.path.resolve()] = compatibility.Candidate(directory.path, spec, fingerprint)
    if in_one_report:
        there = [
            compatibility.candidate(directory)
            for directory in compatibility.directories(folder)
            if directory.path.resolve() not in new
        ]
        compatibility.check([*there, *new.values()])
    _keep_caches_in(folder)
    runs = []
    for spec in specs:
        task = made[spec.task]
        directory = RunDirectory(_run_folder(folder, spec))
        directory.prepare(
            spec, task.fingerprint, data, sys.argv, placement, task.remarks, keep_threads,
            diagnose_every,
        )  # fmt: skip
        steps = spec.train.schedule.steps(task.steps_per_epoch)
        runs.append(
            run_scheduler.RunState(
                directory, spec, steps, task.curve, task.unit, task.units_per_step
            )
        )
    return runs


def _say(text: str, err: bool = False) -> None:
    if process_group.speaks():
        typer.echo(text, err=err)


def _report(runs: list[Path], folder: Path, target: float | None = None) -> None:
    from apollo_bench.report import page

    page.show(page.write(runs, folder, target), Console())
    typer.echo(f"Report: {folder / 'report.html'}")


def _keep_caches_in(folder: Path) -> None:
    """Let matplotlib and torch write their caches into the output folder, not elsewhere."""
    for variable, name in (("MPLCONFIGDIR", "matplotlib"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(variable, str((folder / "cache" / name).resolve()))
