"""The training loop of one run, from its directory to its directory.

Every batch is a function of (seed, epoch, step), and a checkpoint holds all the rest: so a run that
was killed and resumed writes the same weights and the same metrics as one that never was.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

import torch
from torch import nn

from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.optimizers import build, rate_factor
from apollo_qn.experiments.recipe import RunSpec
from apollo_qn.experiments.runs import Record, RunDirectory, write_atomically
from apollo_qn.experiments.tasks.base import Task

Outcome = Literal["finished", "diverged", "stopped"]


def train(
    directory: RunDirectory, spec: RunSpec, task: Task, stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Train a prepared run to its end, from its checkpoint where it has one.

    Args:
        directory: prepared for this ``spec``.
        spec: the resolved recipe.
        task: data, model, loss and metric.
        stop: asked after every step; True writes a checkpoint and returns ``"stopped"``.

    Returns:
        How it ended. ``"finished"`` and ``"diverged"`` (a loss that is not finite) are recorded in
        result.json; such a run is not trained again.

    Raises:
        ExperimentError: the checkpoint cannot be read.
    """
    verdict = directory.verdict()
    if verdict is not None:
        return "diverged" if verdict["verdict"] == "diverged" else "finished"
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(spec.seed)
    with _Run(directory, spec, task) as run:
        return run.to_the_end(stop)


class _Run:
    """What lives as long as one call of ``train``: everything that a checkpoint must hold."""

    def __init__(self, directory: RunDirectory, spec: RunSpec, task: Task) -> None:
        self.directory, self.spec, self.task = directory, spec, task
        self.steps = spec.train.epochs * task.steps_per_epoch
        self.model: nn.Module = task.model()
        self.optimizer = build(spec.optimizer, self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, rate_factor(spec.train.schedule, self.steps)
        )
        self.step = 0
        # of this epoch, and of the steps since the last line: the sum stays where the loss is, so
        # that no step waits for it; a loss that is not finite stays in the sum
        self.epoch_loss = torch.zeros((), dtype=torch.float64)
        self.line_loss = torch.zeros((), dtype=torch.float64)
        self.line_steps = 0
        self.optimizer_times: list[float] = []  # seconds, of this epoch
        self.last: Record = {}
        self.seconds_before = 0.0  # spent in the processes before this one
        self.started = time.perf_counter()
        self.metrics: BinaryIO

    def __enter__(self) -> _Run:
        offset = self._restore()
        self.metrics = self.directory.metrics.open("ab")
        # lines written after the checkpoint will be written again
        self.metrics.truncate(offset)
        self.saved_at = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.metrics.close()

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def to_the_end(self, stop: Callable[[], bool]) -> Outcome:
        per_epoch = self.task.steps_per_epoch
        while self.step < self.steps:
            epoch, start = divmod(self.step, per_epoch)
            self.model.train()
            for batch in self.task.batches(self.spec.seed, epoch, start):
                self._train_step(batch)
                ends_epoch = self.step % per_epoch == 0
                if self.step % self.spec.train.log_every == 0 or ends_epoch:
                    if not math.isfinite(float(self.line_loss)):
                        return self._finish("diverged")
                    self._log_line(epoch)
                if ends_epoch:
                    self._end_epoch(epoch)
                due = time.perf_counter() - self.saved_at > self.spec.train.checkpoint_every
                stopping = stop()
                if due or ends_epoch or stopping:
                    self._save()
                if stopping and self.step < self.steps:
                    return "stopped"
        return self._finish("finished")

    def _train_step(self, batch: tuple[torch.Tensor, ...]) -> None:
        loss = self.task.loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        before = time.perf_counter()
        self.optimizer.step()
        self.optimizer_times.append(time.perf_counter() - before)
        self.schedule.step()
        value = loss.detach().double()
        self.epoch_loss += value
        self.line_loss += value
        self.line_steps += 1
        self.step += 1

    def _write(self, record: Record) -> None:
        self.metrics.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.metrics.flush()

    def _log_line(self, epoch: int) -> None:
        self._write(
            {
                "kind": "step",
                "epoch": epoch,
                "step": self.step,
                "loss": float(self.line_loss) / self.line_steps,
                "lr": self.optimizer.param_groups[0]["lr"],
                # all that differs between two runs of one seed stands under this key
                "time": {"seconds": self.seconds()},
            }
        )
        self.line_loss.zero_()
        self.line_steps = 0

    def _end_epoch(self, epoch: int) -> None:
        self.model.eval()
        with torch.no_grad():
            measured = self.task.evaluate(self.model)
        self.last = {
            "train_loss": float(self.epoch_loss) / self.task.steps_per_epoch,
            # JSON knows no NaN
            **{name: value if math.isfinite(value) else None for name, value in measured.items()},
        }
        self._write(
            {
                "kind": "epoch",
                "epoch": epoch + 1,
                "step": self.step,
                **self.last,
                "time": {
                    "seconds": self.seconds(),
                    "optimizer_ms": 1e3 * statistics.median(self.optimizer_times),
                },
            }
        )
        self.epoch_loss.zero_()
        self.optimizer_times.clear()

    def _finish(self, outcome: Literal["finished", "diverged"]) -> Outcome:
        verdict: Record = {"verdict": outcome, "step": self.step, "steps": self.steps}
        if outcome == "finished":
            verdict |= self.last
        verdict["time"] = {"seconds": self.seconds()}
        write_atomically(self.directory.result, json.dumps(verdict, indent=2).encode() + b"\n")
        return outcome

    def _save(self) -> None:
        self.metrics.flush()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "epoch_loss": self.epoch_loss,
            "line_loss": self.line_loss,
            "line_steps": self.line_steps,
            "optimizer_times": self.optimizer_times,
            "last": self.last,
            "seconds": self.seconds(),
            "metrics_bytes": self.metrics.tell(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.directory.checkpoint, buffer.getvalue())
        self.saved_at = time.perf_counter()

    def _restore(self) -> int:
        """Load the checkpoint if there is one; how many bytes of the metrics are valid."""
        path = self.directory.checkpoint
        if not path.exists():
            return 0
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state["random"])
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.PickleError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ExperimentError(
                f"{path}: the checkpoint cannot be read ({first}); remove the run's directory "
                "to train it anew"
            ) from None
        self.step = state["step"]
        self.epoch_loss = state["epoch_loss"]
        self.line_loss = state["line_loss"]
        self.line_steps = state["line_steps"]
        self.optimizer_times = state["optimizer_times"]
        self.last = state["last"]
        self.seconds_before = state["seconds"]
        return int(state["metrics_bytes"])
