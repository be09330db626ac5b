"""What ``--diagnostics`` adds to a run: ``diagnostics.jsonl``, and its curves in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from torch import nn

from apollo_bench.config.recipe import RunSpec
from apollo_bench.config.schema import ApolloSettings
from apollo_bench.errors import ExperimentError
from apollo_bench.runs.run_directory import Record
from apollo_qn import Apollo
from apollo_qn.diagnostics import Recorder, TensorDiagnostics, overall, to_tensorboard

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Curvature(NamedTuple):
    """Apollo's at a step."""

    step: int
    epoch: float
    tensors: TensorDiagnostics  # all together


def check(spec: RunSpec) -> None:
    """Raise ExperimentError where the run's optimizer has no curvature to measure."""
    if not isinstance(spec.optimizer, ApolloSettings):
        raise ExperimentError(
            f"--diagnostics measures Apollo's curvature, the optimizer {spec.name!r} "
            f"({spec.optimizer.method}) has none; leave it out"
        )


class CurvatureLog:
    """Measures every so many steps of a run, from its last checkpoint on.

    All processes take part, for the numbers of sharded tensors; the first one writes. What was
    written of steps after the checkpoint will be written again.

    Args:
        path: of the lines.
        every: steps.
        optimizer: Apollo itself.
        network: gives the parameters' names.
        step: of the checkpoint.
        epoch: how far the training is at a step.
        events: of the first process; None: another one.
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
        """Whether the coming step will be measured."""
        return self._recorder.due

    def close(self) -> None:
        """Measure no more."""
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
    """The tensors of a line."""
    found = []
    for tensor in line["tensors"]:
        numbers: dict[str, Any] = {k: math.nan if x is None else x for k, x in tensor.items()}
        found.append(TensorDiagnostics(**numbers))
    return found


def measured(lines: Iterable[Record]) -> list[Curvature]:
    """What a run's lines say of all tensors together."""
    return [Curvature(line["step"], float(line["epoch"]), overall(read(line))) for line in lines]


def _jsonable(numbers: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity."""
    return {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in numbers.items()
    }


def _bytes_until(path: Path, step: int) -> int:
    """How many bytes the whole lines up to a step take."""
    return sum(len(line) for line in _lines_until(path.read_bytes(), step))


def _lines_until(content: bytes, step: int) -> Iterator[bytes]:
    for line in content.splitlines(keepends=True):
        try:
            known = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            known = False  # cut short
        if not known:
            return
        yield line
