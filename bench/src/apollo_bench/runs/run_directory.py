"""A run is a directory: ``run.json``, ``metrics.jsonl``, ``checkpoint/``, ``result.json``.

``checkpoint/newest.pt`` holds all that the training goes on from, ``checkpoint/best.pt`` the
weights of the best evaluation, for those who want to use them (no table of ours does), and
``checkpoint/averaged.pt`` the mean of the last ones, where the recipe asks for it.
``diagnostics.jsonl`` is there where ``--diagnostics`` has been asked for. ``tensorboard/`` shows
both.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import ValidationError

import apollo_qn
from apollo_bench.atomic_write import write_atomically
from apollo_bench.config.config_errors import describe
from apollo_bench.config.execution import Placement, cores
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError

Record = dict[str, Any]


class RunDirectory:
    """The paths of one run, and what they say about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.diagnostics = path / "diagnostics.jsonl"  # where they were asked for
        self.checkpoint = path / "checkpoint" / "newest.pt"
        self.best = path / "checkpoint" / "best.pt"
        self.averaged = path / "checkpoint" / "averaged.pt"
        self.events = path / "tensorboard"
        self.result = path / "result.json"
        self.log = path / "worker.log"
        self.lock = path / "lock"  # held while it is trained

    def evaluated(self, step: int) -> Path:
        """The weights of the evaluation after a step, kept where those of several are averaged."""
        return self.checkpoint.with_name(f"evaluated-{step:09}.pt")

    def all_evaluated(self, step: int) -> list[Path]:
        """Those that there are up to a step, in order."""
        last = self.evaluated(step)
        return sorted(path for path in last.parent.glob("evaluated-*.pt") if path.name <= last.name)

    def prepare(
        self,
        spec: RunSpec,
        fingerprint: str,
        data: Path | None,
        command: list[str],
        placement: Placement = Placement(),  # noqa: B008  (frozen)
        remarks: Sequence[str] = (),
        keep_threads: bool = True,
        diagnose_every: int | None = None,
    ) -> None:
        """Create the run, or make sure that what is there is this very run.

        Args:
            spec: the resolved recipe.
            fingerprint: of the data.
            data: folder of local data, or None; the same data may have moved.
            command: the command line, kept for the record.
            placement: where it is trained, or goes on.
            remarks: of the task, for the report.
            keep_threads: a run that is there goes on with as many threads as it began with, for
                the order of sums depends on them; False: with those of ``placement``.
            diagnose_every: steps between diagnostics, from here on; None: no more of them.

        Raises:
            ExperimentError: as ``check`` does.
        """
        if self.check(spec, fingerprint, placement):
            if self.verdict() is None:
                self._move(data, placement, keep_threads, diagnose_every)
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        manifest = {
            "recipe": spec.model_dump(),
            "seed": spec.seed,
            "data": {
                "fingerprint": fingerprint,
                "folder": _absolute(data),
                "remarks": list(remarks),
            },
            "versions": {
                "apollo_qn": getattr(apollo_qn, "__version__", "unknown"),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "python": platform.python_version(),
            },
            "machine": machine(placement),
            "placement": placement.model_dump(),
            "diagnose_every": diagnose_every,
            "command": command,
        }
        self._write(manifest)

    def check(self, spec: RunSpec, fingerprint: str, placement: Placement) -> bool:
        """Whether this very run is there; writes nothing.

        Raises:
            ExperimentError: the directory holds a run with another recipe or other data, or an
                unfinished one of another number of processes, each of which has its own part of
                the checkpoint.
        """
        if not self.manifest.exists():
            return False
        there = self.read()
        task = there["recipe"].get("task")
        if task != spec.task:
            raise ExperimentError(
                f"{self.path}: holds a run of the task {task!r}; choose another --out"
            )
        # read as a recipe: a setting that is younger than the run has its default there
        differing = _differences(self.spec().model_dump(), spec.model_dump())
        if there["data"]["fingerprint"] != fingerprint:
            differing.append("the data")
        if differing:
            raise ExperimentError(
                f"{self.path}: holds a run with other settings ({', '.join(differing)}); "
                "choose another --out, or remove it"
            )
        own = self.placement()
        begun = self.checkpoint.exists() and self.verdict() is None
        if begun and (own.devices, own.nodes) != (placement.devices, placement.nodes):
            raise ExperimentError(
                f"{self.path}: holds an unfinished run of {own.processes} "
                f"process{'es' if own.processes > 1 else ''} (--devices {own.devices}), "
                f"{placement.processes} asked for; go on with as many, or remove it"
            )
        return True

    def _move(
        self,
        data: Path | None,
        placement: Placement,
        keep_threads: bool,
        diagnose_every: int | None,
    ) -> None:
        """Let an unfinished run go on with data in another place, or on other devices."""
        manifest = self.read()
        if keep_threads:
            placement = placement.model_copy(update={"threads": self.placement().threads})
        now = {
            **manifest,
            "data": {**manifest["data"], "folder": _absolute(data)},
            "placement": placement.model_dump(),
            "machine": machine(placement),
            "diagnose_every": diagnose_every,
        }
        if now != manifest:
            self._write(now)

    def _write(self, manifest: Record) -> None:
        write_atomically(self.manifest, json.dumps(manifest, indent=2).encode() + b"\n")

    def read(self) -> Record:
        """The content of run.json.

        Raises:
            ExperimentError: this is no run directory, or its run.json is damaged.
        """
        try:
            manifest: Record = json.loads(self.manifest.read_text())
            if not isinstance(manifest["recipe"], dict) or "fingerprint" not in manifest["data"]:
                raise ValueError("recipe or data are missing")
        except FileNotFoundError:
            raise ExperimentError(f"{self.path}: not a run, it has no run.json") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExperimentError(f"{self.manifest}: damaged ({error})") from None
        return manifest

    def spec(self) -> RunSpec:
        """The resolved recipe; raises ExperimentError as ``read`` does."""
        try:
            return RunSpec.model_validate(self.read()["recipe"])
        except ValidationError as error:
            raise ExperimentError(f"{self.manifest}: {describe(error, RunSpec)}") from None

    def placement(self) -> Placement:
        """Where it is trained; raises ExperimentError as ``read`` does."""
        try:
            return Placement.model_validate(self.read()["placement"])
        except (KeyError, ValidationError) as error:
            raise ExperimentError(f"{self.manifest}: placement is damaged ({error})") from None

    def diagnose_every(self) -> int | None:
        """Steps between diagnostics; None: there are none. Raises as ``read`` does."""
        every = self.read().get("diagnose_every")
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ExperimentError(f"{self.manifest}: diagnose_every is damaged ({every!r})")
        return every

    def verdict(self) -> Record | None:
        """How the run ended; None: it has not."""
        try:
            verdict: Record = json.loads(self.result.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ExperimentError(f"{self.result}: damaged ({error})") from None
        return verdict

    def records(self) -> Iterator[Record]:
        """The lines of metrics.jsonl; a last line that is still being written is left out."""
        return _lines(self.metrics)

    def diagnosed(self) -> Iterator[Record]:
        """Likewise the lines of diagnostics.jsonl."""
        return _lines(self.diagnostics)


def _lines(path: Path) -> Iterator[Record]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise ExperimentError(f"{path}, line {number}: damaged") from None


def _absolute(folder: Path | None) -> str | None:
    return None if folder is None else str(folder.resolve())


def machine(placement: Placement | None = None) -> Record:
    """CPU model, cores and platform of this machine; for a run on GPUs their model too."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass  # not Linux
    found: Record = {"cpu": model, "cores": cores(), "platform": platform.platform()}
    if placement is not None and placement.accelerator == "gpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _differences(left: Record, right: Record, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(left.keys() | right.keys()):
        one, other = left.get(key), right.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}: {one!r} there, {other!r} asked for")
    return found
