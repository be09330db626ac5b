"""Checks of the user's own optimizers and models before any run is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.optimizers.custom import parameter_shapes, try_steps
from apollo_bench.user_code import describe_source, origin_of
from apollo_bench.workloads.custom_model import CustomModel
from apollo_bench.workloads.workload import Workload

Remarks = dict[tuple[str, str], list[str]]  # by task and optimizer


def check(
    specs: Sequence[RunSpec], workloads: Mapping[str, Workload], execution: Execution
) -> Remarks:
    """Take steps with every optimizer that is named by its class, on small parameters.

    Raises:
        ExperimentError: a model cannot be trained, or an optimizer cannot be made, cannot take a
            step without a closure, has a state that cannot be saved, or cannot be executed so.
    """
    _check_models(specs, workloads)
    remarks: Remarks = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    tried: list[tuple[str, CustomSettings]] = []
    gpu = execution.accelerator == "gpu" and torch.cuda.is_available()
    for spec in specs:
        settings = spec.optimizer
        if not isinstance(settings, CustomSettings) or (spec.task, settings) in tried:
            continue
        tried.append((spec.task, settings))
        if spec.task not in shapes:
            shapes[spec.task] = parameter_shapes(_model(workloads[spec.task]))
        key = f"optimizers.{spec.name}"
        abilities = try_steps(settings, shapes[spec.task], key, "cuda" if gpu else "cpu")
        if abilities.needs_graph and execution.processes > 1:
            raise ExperimentError(
                f"{key}.class is {settings.class_path!r}: it takes second derivatives, which "
                f"{execution.processes} processes per run do not have; use --devices 1"
            )
        remarks[spec.task, spec.name] = abilities.remarks
    return remarks


def _check_models(specs: Sequence[RunSpec], workloads: Mapping[str, Workload]) -> None:
    """Compute a loss and its gradient with every model of the user, on two examples."""
    for spec in {spec.task: spec for spec in specs}.values():
        if not isinstance(spec.model, CustomModel):
            continue
        workload = workloads[spec.task]
        with torch.random.fork_rng(devices=[]):
            network = workload.model()
            batch = next(iter(workload.batches(spec.seed, 0, 0)))
            try:
                loss, _ = workload.loss(network, tuple(column[:2] for column in batch), batch, ())
                torch.autograd.backward(loss)
            except ExperimentError:
                raise
            except Exception as error:  # the user's code may raise any type
                raise ExperimentError(
                    f"model.factory is {spec.model.factory!r}: a training step raised "
                    f"{type(error).__name__}: {first_line(error)}{origin_of(error)}"
                ) from error


def _model(workload: Workload) -> torch.nn.Module:
    """Return a model, if possible without memory for its parameters."""
    try:
        with torch.device("meta"):
            return workload.model()
    except Exception:  # the model reads its parameters
        return workload.model()


def code_of(spec: RunSpec) -> list[dict[str, Any]]:
    """Return the sources of the user's own parts of a run, for ``run.json``."""
    found = []
    if isinstance(spec.optimizer, CustomSettings):
        found.append(describe_source(spec.optimizer.class_path))
    if isinstance(spec.model, CustomModel):
        found.append(describe_source(spec.model.factory))
    return found
