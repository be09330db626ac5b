"""The curvature log of a run with ``--diagnostics``: ``diagnostics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from torch import nn

from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.config.optimizer_settings import ApolloSettings
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_qn import Apollo
from apollo_qn.diagnostics import Recorder, TensorDiagnostics, overall, to_tensorboard

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Curvature(NamedTuple):
    """Apollo's curvature at a step."""

    step: int
    epoch: float
    tensors: TensorDiagnostics  # of all tensors together


def require_apollo(spec: RunSpec) -> None:
    """Raise ExperimentError if the run's optimizer has no curvature to measure."""
    if not isinstance(spec.optimizer, ApolloSettings):
        settings = spec.optimizer
        kind = settings.class_path if isinstance(settings, CustomSettings) else settings.method
        raise ExperimentError(
            f"--diagnostics measures Apollo's curvature, the optimizer {spec.name!r} ({kind}) has "
            "none; leave it out"
        )


class CurvatureLog:
    """Measures Apollo's curvature at an interval of steps, from the last checkpoint on.

    All processes take part, because tensors may be sharded; the main process writes. Lines after
    the checkpoint are written again.

    Args:
        path: file of the lines.
        every: interval in steps.
        optimizer: Apollo, without a wrapper.
        network: network that names the parameters.
        step: step of the checkpoint.
        epoch: function from a step to the number of epochs.
        events: TensorBoard writer of the main process; None in the others.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        optimizer: Apollo,
        network: nn.Module,
        step: int,
        epoch: Callable[[int], float],
        events: SummaryWriter | None,
    ) -> None:
        self._epoch, self._events = epoch, events
        self._file: BinaryIO | None = None
        if events is not None:
            self._file = path.open("ab")
            self._file.truncate(_bytes_until(path, step))
        self._recorder = Recorder(
            optimizer,
            None if events is None else self._write,
            every,
            names=network.named_parameters(),
            step=step,
        )

    @property
    def due(self) -> bool:
        """Whether the next step will be measured."""
        return self._recorder.due

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Stop measuring."""
        self._recorder.detach()
        if self._file is not None:
            self._file.close()

    def _write(self, step: int, tensors: list[TensorDiagnostics]) -> None:
        if self._file is None or self._events is None:
            return
        line = {
            "step": step,
            "epoch": self._epoch(step),
            "tensors": [_jsonable(asdict(tensor)) for tensor in tensors],
        }
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        to_tensorboard(self._events, step, tensors)


def read(line: Record) -> list[TensorDiagnostics]:
    """Return the tensors of a line."""
    found = []
    for tensor in line["tensors"]:
        numbers: dict[str, Any] = {k: math.nan if x is None else x for k, x in tensor.items()}
        found.append(TensorDiagnostics(**numbers))
    return found


def overall_curvature(lines: Iterable[Record]) -> list[Curvature]:
    """Return the curvature of all tensors together, for each line."""
    return [Curvature(line["step"], float(line["epoch"]), overall(read(line))) for line in lines]


def curvature_of(directory: RunDirectory) -> list[Curvature]:
    """Return the curvature that a run has measured; nothing without ``--diagnostics``.

    Raises:
        ExperimentError: diagnostics.jsonl is damaged.
    """
    try:
        return overall_curvature(directory.diagnostics_records())
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ExperimentError(f"{directory.diagnostics}: damaged ({first_line(error)})") from None


def _jsonable(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return numbers with None for NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in numbers.items()
    }


def _bytes_until(path: Path, step: int) -> int:
    """Return the size of the complete lines up to a step."""
    return sum(len(line) for line in _lines_until(path.read_bytes(), step))


def _lines_until(content: bytes, step: int) -> Iterator[bytes]:
    for line in content.splitlines(keepends=True):
        try:
            known = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            known = False  # an incomplete line
        if not known:
            return
        yield line
