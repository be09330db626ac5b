"""A run is a directory: ``run.json``, ``metrics.jsonl``, ``checkpoint/``, ``result.json``.

``checkpoint/newest.pt`` holds everything needed to resume, including the records, which a resumed
run rewrites. ``checkpoint/best.pt`` holds the weights of the best evaluation, for use elsewhere; no
table uses them.
``checkpoint/averaged.pt`` holds the mean of the last weights, if the recipe averages.
``diagnostics.jsonl`` exists with ``--diagnostics``. ``tensorboard/`` shows metrics and diagnostics.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import ValidationError

import apollo_qn
from apollo_bench.atomic_write import write_atomically
from apollo_bench.available_cores import available_cores
from apollo_bench.config.config_errors import describe
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.runs.record_schemas import (
    check_evaluations,
    checked_manifest,
    checked_result,
    cut_short,
    is_metrics_record,
)
from apollo_bench.source_commit import source_commit
from apollo_bench.workloads import tasks

Record = dict[str, Any]


class RunDirectory:
    """The files of one run.

    Example:
        >>> from apollo_bench.config import recipe
        >>> spec = recipe.load("wordnet").run("apollo", seed=1)
        >>> directory = RunDirectory(Path("runs/train") / spec.label)
        >>> directory.prepare(spec, "fingerprint", None, ["apollo-bench", "train", "wordnet"])
        >>> directory.spec() == spec, directory.verdict()
        (True, None)

    Args:
        path: folder of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.diagnostics = path / "diagnostics.jsonl"  # with --diagnostics
        self.checkpoint = path / "checkpoint" / "newest.pt"
        self.best = path / "checkpoint" / "best.pt"
        self.averaged = path / "checkpoint" / "averaged.pt"
        self.events = path / "tensorboard"
        self.result = path / "result.json"
        self.log = path / "worker.log"
        self.lock = path / "lock"  # locked during training

    def evaluated(self, step: int) -> Path:
        """Return the file of the weights at an evaluation, kept if several are averaged."""
        return self.checkpoint.with_name(f"evaluated-{step:09}.pt")

    def kept_evaluations(self, step: int) -> list[Path]:
        """Return the files of the weights at evaluations up to a step, in order."""
        last = self.evaluated(step)
        return sorted(path for path in last.parent.glob("evaluated-*.pt") if path.name <= last.name)

    def prepare(
        self,
        spec: RunSpec,
        fingerprint: str,
        data: Path | None,
        command: list[str],
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        remarks: Sequence[str] = (),
        keep_threads: bool = True,
        diagnose_every: int | None = None,
        published: bool = False,
        code: Sequence[Record] = (),
        search: Record | None = None,
    ) -> None:
        """Create the run, or check that the existing run is the same.

        Args:
            spec: the resolved recipe.
            fingerprint: fingerprint of the data.
            data: folder of local data, or None; the same data may have moved.
            command: command line, kept for the record.
            execution: how the run is executed, or continues.
            remarks: remarks of the workload, for the report.
            keep_threads: whether an existing run keeps its number of threads, which the order of
                additions depends on; otherwise ``execution`` gives it.
            diagnose_every: steps between measurements of the curvature from now on; None: none.
            published: whether the data are known to be those that the paper used.
            code: the user's own code, as in ``user_code.describe_source``.
            search: cost of the search that chose the optimizer's settings; None: there was none.

        Raises:
            ExperimentError: as in ``check``.
        """
        if self.check(spec, fingerprint, execution, code):
            if self.usable_verdict() is None:
                self._update_manifest(data, execution, keep_threads, diagnose_every, code)
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        manifest = {
            "recipe": spec.model_dump(),
            "seed": spec.seed,
            "data": {
                "fingerprint": fingerprint,
                "folder": _absolute(data),
                "remarks": list(remarks),
                "published": published,
            },
            "versions": {
                "apollo_qn": getattr(apollo_qn, "__version__", "unknown"),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "python": platform.python_version(),
            },
            "machine": describe_machine(execution),
            "execution": execution.model_dump(),
            "diagnose_every": diagnose_every,
            "code": list(code),
            "command": command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": source_commit(),
            "search": search,
        }
        self._write(manifest)

    def check(
        self, spec: RunSpec, fingerprint: str, execution: Execution, code: Sequence[Record] = ()
    ) -> bool:
        """Return whether this run exists; write nothing.

        Raises:
            ExperimentError: the directory holds a run with another recipe, other data or other code
                of the user's, or an unfinished run of another number of processes: each process has
                its own part of the checkpoint.
        """
        if not self.manifest.exists():
            return False
        there = self.read()
        task = there["recipe"].get("task")
        if task != spec.task:
            raise ExperimentError(
                f"{self.path}: holds a run of the task {task!r}; choose another --out"
            )
        # validated as a recipe: a setting that was added after the run has its default
        differing = differences(
            self.spec().without_others().model_dump(),
            spec.without_others().model_dump(),
        )
        if there["data"]["fingerprint"] != fingerprint:
            differing.append("the data")
        for one, other in zip(there.get("code", []), code, strict=False):
            if one["version"] != other["version"] and one["path"] == other["path"]:
                differing.append(f"the code of {one['path']}")
        if differing:
            raise ExperimentError(
                f"{self.path}: holds a run with other settings ({', '.join(differing)}); "
                "choose another --out, or remove it"
            )
        own = self.execution()
        begun = self.checkpoint.exists() and self.usable_verdict() is None
        if begun and (own.devices, own.nodes) != (execution.devices, execution.nodes):
            raise ExperimentError(
                f"{self.path}: holds an unfinished run of {own.processes} "
                f"process{'es' if own.processes > 1 else ''} (--devices {own.devices}), "
                f"{execution.processes} asked for; continue with as many, or remove it"
            )
        return True

    def _update_manifest(
        self,
        data: Path | None,
        execution: Execution,
        keep_threads: bool,
        diagnose_every: int | None,
        code: Sequence[Record],
    ) -> None:
        """Update data folder, code and devices of an unfinished run."""
        manifest = self.read()
        if keep_threads:
            execution = execution.model_copy(update={"threads": self.execution().threads})
        now = {
            **manifest,
            "data": {**manifest["data"], "folder": _absolute(data)},
            "execution": execution.model_dump(),
            "machine": describe_machine(execution),
            "diagnose_every": diagnose_every,
            "code": list(code),
        }
        if now != manifest:
            self._write(now)

    def _write(self, manifest: Record) -> None:
        write_atomically(self.manifest, json.dumps(manifest, indent=2).encode() + b"\n")

    def read(self) -> Record:
        """Return the content of run.json.

        Raises:
            ExperimentError: this is no run directory, or its run.json is damaged.
        """
        try:
            return checked_manifest(_read_json(self.manifest), self.manifest)
        except FileNotFoundError:
            raise ExperimentError(f"{self.path}: not a run, it has no run.json") from None

    def spec(self) -> RunSpec:
        """Return the resolved recipe; raise ExperimentError as ``read`` does."""
        try:
            return RunSpec.model_validate(self.read()["recipe"])
        except ValidationError as error:
            raise ExperimentError(f"{self.manifest}: {describe(error, RunSpec)}") from None

    def execution(self) -> Execution:
        """Return how the run is executed; raise ExperimentError as ``read`` does."""
        try:
            return execution_of(self.read())
        except (KeyError, ValidationError) as error:
            raise ExperimentError(
                f"{self.manifest}: execution is damaged ({first_line(error)})"
            ) from None

    def diagnose_every(self) -> int | None:
        """Return the steps between measurements of the curvature; None: none.

        Raises:
            ExperimentError: as in ``read``.
        """
        every = self.read().get("diagnose_every")
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ExperimentError(f"{self.manifest}: diagnose_every is damaged ({every!r})")
        return every

    def verdict(self) -> Record | None:
        """Return how the run ended; None if it has not ended.

        Raises:
            ExperimentError: result.json is damaged.
        """
        try:
            return checked_result(_read_json(self.result), self.result)
        except FileNotFoundError:
            return None

    def usable_verdict(self) -> Record | None:
        """Return how the run ended; None if it must be trained, or its result is damaged.

        A run whose result or records are damaged continues from its checkpoint, which holds the
        records.
        """
        try:
            verdict = self.verdict()
            if verdict is not None:
                self.complete_records(verdict)
        except (ExperimentError, OSError):
            return None
        return verdict

    def records(self) -> Iterator[Record]:
        """Yield the records of metrics.jsonl, without a last line that is still being written.

        Raises:
            ExperimentError: a line is damaged.
        """
        return _records(self.metrics, is_metrics_record)

    def complete_records(self, verdict: Record | None) -> list[Record]:
        """Return the records of metrics.jsonl; those of an ended run must reach to its end.

        A finished run ends with an evaluation. A diverged run does not. Its last record is less
        than one interval of the log before its end.

        Args:
            verdict: what ``verdict`` returned before; None: the run has not ended.

        Raises:
            ExperimentError: a line is damaged, or the last lines of an ended run are missing.
        """
        spec = self.spec()
        metric = tasks.entry_of(spec).monitored.name
        records = list(self.records())
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        finished = verdict is not None and verdict["verdict"] == "finished"
        end = None if verdict is None else verdict["step"]
        check_evaluations(evaluations, metric, self.metrics, end if finished else None)
        if end is None:
            return records
        if not self._ends_with_a_line():
            raise ExperimentError(f"{self.metrics}: damaged (its last line is cut)")
        last = records[-1]["step"] if records else 0
        if not finished and end - last > spec.train.log_every:
            raise cut_short(self.metrics, last, end)
        return records

    def _ends_with_a_line(self) -> bool:
        """Return whether the last line of metrics.jsonl is complete; True for an empty file."""
        try:
            with self.metrics.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                return file.read() in (b"", b"\n")
        except OSError as error:
            raise ExperimentError(f"{self.metrics}: damaged ({error.strerror})") from None

    def first_records(self, size: int) -> str:
        """Return the first ``size`` bytes of metrics.jsonl; raise ExperimentError if damaged."""
        content = self.metrics.read_bytes()[:size]
        if len(content) < size or (content and not content.endswith(b"\n")):
            raise ExperimentError(
                f"{self.metrics}: damaged since the checkpoint; remove {self.path} to train the "
                "run again"
            )
        return content.decode()

    def diagnostics_records(self) -> Iterator[Record]:
        """Yield the records of diagnostics.jsonl, as ``records`` does."""
        return _records(self.diagnostics, lambda record: isinstance(record, dict))


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ExperimentError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ExperimentError(f"{path}: damaged ({error})") from None


def execution_of(manifest: Record) -> Execution:
    """Return how a run is executed; older manifests call it ``placement``."""
    key = "execution" if "execution" in manifest else "placement"
    return Execution.model_validate(manifest[key])


def _records(path: Path, is_record: Callable[[Any], bool]) -> Iterator[Record]:
    """Yield the records of a file with one per line, without an incomplete last line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        record = parsed(line)
        if not is_record(record):
            raise ExperimentError(f"{path}, line {number}: damaged")
        yield record


def parsed(line: bytes) -> Any:
    """Return the value of a line of JSON; None if it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _absolute(folder: Path | None) -> str | None:
    return None if folder is None else str(folder.resolve())


def describe_machine(execution: Execution | None = None) -> Record:
    """Return CPU model, cores and platform of this machine, and the GPU model of a run on GPUs."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass  # not Linux
    found: Record = {"cpu": model, "cores": available_cores(), "platform": platform.platform()}
    if execution is not None and execution.accelerator == "gpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def differences(left: Record, right: Record, prefix: str = "") -> list[str]:
    """Return the settings that differ, with the values that are there and those asked for."""
    found = []
    for key in sorted(left.keys() | right.keys()):
        one, other = left.get(key), right.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}: {one!r} there, {other!r} asked for")
    return found
