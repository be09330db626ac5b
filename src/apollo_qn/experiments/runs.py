"""A run is a directory: ``run.json``, ``metrics.jsonl``, ``checkpoint/``, ``result.json``.

``checkpoint/newest.pt`` holds all that the training goes on from, ``checkpoint/best.pt`` the
weights after the epoch of the best metric, for those who want to use them (no table of ours does).
``tensorboard/`` shows the metrics there.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import ValidationError

import apollo_qn
from apollo_qn.experiments.complaints import describe
from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.files import write_atomically
from apollo_qn.experiments.placement import Placement, cores
from apollo_qn.experiments.recipe import RunSpec

Record = dict[str, Any]


class RunDirectory:
    """The paths of one run, and what they say about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint" / "newest.pt"
        self.best = path / "checkpoint" / "best.pt"
        self.events = path / "tensorboard"
        self.result = path / "result.json"
        self.log = path / "worker.log"

    def prepare(
        self,
        spec: RunSpec,
        fingerprint: str,
        data: Path | None,
        command: list[str],
        placement: Placement = Placement(),  # noqa: B008  (frozen)
    ) -> None:
        """Create the run, or make sure that what is there is this very run.

        Args:
            spec: the resolved recipe.
            fingerprint: of the data.
            data: folder of local data, or None.
            command: the command line, kept for the record.
            placement: where it is trained; a run that is there keeps its own.

        Raises:
            ExperimentError: the directory holds a run with another recipe or other data.
        """
        if self.manifest.exists():
            there = self.read()
            differing = _differences(there["recipe"], spec.model_dump())
            if there["data"]["fingerprint"] != fingerprint:
                differing.append("the data")
            if differing:
                raise ExperimentError(
                    f"{self.path}: holds a run with other settings ({', '.join(differing)}); "
                    "choose another --out, or remove it"
                )
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        manifest = {
            "recipe": spec.model_dump(),
            "seed": spec.seed,
            "data": {
                "fingerprint": fingerprint,
                "folder": None if data is None else str(data.resolve()),
            },
            "versions": {
                "apollo_qn": getattr(apollo_qn, "__version__", "unknown"),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "python": platform.python_version(),
            },
            "machine": machine(),
            "placement": placement.model_dump(),
            "command": command,
        }
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
        try:
            content = self.metrics.read_bytes()
        except FileNotFoundError:
            return
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise ExperimentError(f"{self.metrics}, line {number}: damaged") from None


def machine() -> Record:
    """CPU model, cores and platform of this machine."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass  # not Linux
    return {"cpu": model, "cores": cores(), "platform": platform.platform()}


def _differences(left: Record, right: Record, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(left.keys() | right.keys()):
        one, other = left.get(key), right.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}: {one!r} there, {other!r} asked for")
    return found
