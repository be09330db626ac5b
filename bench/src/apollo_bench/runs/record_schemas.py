"""Schemas of a run's files: a damaged value makes one run unusable, not the whole report."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apollo_bench.errors import ExperimentError

_Number = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Content(BaseModel):
    """Values must be finite and of the right type; unknown keys are those of other versions."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Times(_Content):
    __pydantic_extra__: dict[str, float | None]
    seconds: _Number
    optimizer_ms: _Number | None = None
    step_ms: _Number | None = None


class _Step(_Content):
    kind: Literal["step"]
    step: _Count
    epoch: _Number
    loss: float
    lr: float | None = None
    gradient_norm: float | None = None
    time: _Times


class _Evaluation(_Content):
    __pydantic_extra__: dict[str, float | None]  # the metrics
    kind: Literal["evaluation"]
    step: _Count
    epoch: _Number
    train_loss: float
    time: _Times


class _Result(_Content):
    __pydantic_extra__: dict[str, float | None]  # the metrics
    verdict: Literal["finished", "diverged"]
    step: _Count
    steps: _Count
    train_loss: float | None = None
    time: _Times


class _Data(_Content):
    fingerprint: str
    folder: str | None = None
    remarks: list[str] = []
    published: bool = False


class _Versions(_Content):
    torch: str
    apollo_qn: str


class _Machine(_Content):
    cpu: str
    cores: int
    gpu: str = ""


class _Source(_Content):
    path: str
    folder: str | None
    version: str


class _Search(_Content):
    trials: int
    seconds: _Number


class _Manifest(_Content):
    recipe: dict[str, Any]
    data: _Data
    versions: _Versions
    machine: _Machine
    command: list[str]
    code: list[_Source] = []
    search: _Search | None = None
    created: str | None = None
    commit: str | None = None


_BY_KIND: dict[Any, type[_Content]] = {"step": _Step, "evaluation": _Evaluation}


def checked_manifest(manifest: Any, where: Path) -> dict[str, Any]:
    """Return the content of a run.json.

    Raises:
        ExperimentError: a value is missing or of the wrong type.
    """
    return _checked(manifest, _Manifest, where)


def checked_result(result: Any, where: Path) -> dict[str, Any]:
    """Return the content of a result.json; raise as ``checked_manifest`` does."""
    return _checked(result, _Result, where)


def check_evaluations(
    evaluations: list[dict[str, Any]], metric: str, where: Path, end: int | None
) -> None:
    """Raise ExperimentError for evaluations without ``metric``, out of order or without the last.

    Args:
        evaluations: records of metrics.jsonl, or lines of an archive.
        metric: name of the metric during training; None is allowed as its value.
        where: their file, for the error.
        end: step at which a finished run was evaluated last; None: the run has not finished.
    """
    for record in evaluations:
        found = _checked({"kind": "evaluation", **record}, _Evaluation, where)
        if metric not in found:
            raise ExperimentError(f"{where}: damaged ({metric} is missing at step {found['step']})")
    for before, after in itertools.pairwise(evaluations):
        if after["step"] <= before["step"]:
            raise ExperimentError(
                f"{where}: damaged (an evaluation at step {after['step']} follows one at step "
                f"{before['step']})"
            )
    last = evaluations[-1]["step"] if evaluations else 0
    if end is not None and last != end:
        raise cut_short(where, last, end)


def cut_short(where: Path, last: int, end: int) -> ExperimentError:
    """Return the error of a run whose records end before it does."""
    return ExperimentError(
        f"{where}: damaged (its records end at step {last}, the run at step {end})"
    )


def is_metrics_record(record: Any) -> bool:
    """Return whether a value is a record of metrics.jsonl."""
    kind = record.get("kind") if isinstance(record, dict) else None
    schema = _BY_KIND.get(kind) if isinstance(kind, str) else None
    if schema is None:
        return False
    try:
        schema.model_validate(record)
    except ValidationError:
        return False
    return True


def _checked(content: Any, schema: type[_Content], where: Path | str) -> dict[str, Any]:
    try:
        schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = f"{key}: {first['msg']}" if key else "its content is not a table"
        raise ExperimentError(f"{where}: damaged ({reason})") from None
    return dict(content)
