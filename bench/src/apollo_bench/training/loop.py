"""The training loop of one run; it reads and writes the run's directory.

Every batch is a function of (seed, epoch, step), and a checkpoint holds everything else. So a run
that was killed and resumed writes the same weights and metrics as an uninterrupted one. Lightning
Fabric handles devices, precision and processes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from apollo_bench.atomic_write import write_atomically
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.runs import curvature_log
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_bench.training import process_group
from apollo_bench.training.fabric_setup import launch_fabric
from apollo_bench.training.full_state_dict import is_sharded
from apollo_bench.training.gradient_norm import full_norm, gradient_norm
from apollo_bench.training.step_timer import StepTimer
from apollo_bench.training.tensorboard_log import add_record
from apollo_bench.training.training_state import TrainingState
from apollo_bench.workloads.workload import Batch, Workload

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Outcome = Literal["finished", "diverged", "stopped"]


def train(
    directory: RunDirectory,
    spec: RunSpec,
    workload: Workload,
    stop: Callable[[], bool] = lambda: False,
    fabric: Fabric | None = None,
    diagnose_every: int | None = None,
) -> Outcome:
    """Train a prepared run to its end, from its checkpoint if it has one.

    Example:
        >>> from pathlib import Path
        >>> from apollo_bench.config import recipe
        >>> from apollo_bench.workloads import tasks
        >>> small = ["data.train_examples=64", "model.width=1", "schedule.epochs=1"]
        >>> plan = recipe.load("fashion-mnist", small, schedules=["cosine"])
        >>> spec = plan.run("apollo", seed=1, schedule="cosine")
        >>> workload = tasks.make(spec)
        >>> directory = RunDirectory(Path("runs/example") / spec.label)
        >>> directory.prepare(spec, workload.fingerprint, None, ["example"])
        >>> train(directory, spec, workload)
        'finished'
        >>> directory.verdict()["step"]
        1

    Args:
        directory: prepared for this ``spec``.
        spec: the resolved recipe.
        workload: data, model, loss and metric.
        stop: called after every step; with several processes, after every record. If it returns
            True in any process, a checkpoint is written and training stops.
        fabric: launched; None: this process alone, on the CPU.
        diagnose_every: steps between measurements of Apollo's curvature; None: none. They do not
            change the training.

    Returns:
        The outcome: ``"finished"``, ``"diverged"`` (a loss is not finite) or ``"stopped"``. The
        first two are recorded in result.json, and such a run is not trained again.

    Raises:
        ExperimentError: the checkpoint cannot be read, or the diagnosed optimizer is not Apollo.
    """
    if diagnose_every is not None:
        curvature_log.require_apollo(spec)
    # Only one process reads: on a shared file system the others may see a file later.
    verdict = process_group.broadcast_from_main(
        directory.usable_verdict() if process_group.is_main_process() else None
    )
    if verdict is not None:
        return "diverged" if verdict["verdict"] == "diverged" else "finished"
    fabric = launch_fabric(Execution(), spec) if fabric is None else fabric
    # some operations have no deterministic form on a GPU
    torch.use_deterministic_algorithms(True, warn_only=fabric.device.type != "cpu")
    torch.manual_seed(spec.seed)
    with _TrainingRun(directory, spec, workload, fabric, diagnose_every) as run:
        return run.run_to_end(stop)


class _TrainingRun(TrainingState):
    """The training of one run: its steps, evaluations and records."""

    def run_to_end(self, stop: Callable[[], bool]) -> Outcome:
        """Train, evaluate and record until the run ends or ``stop`` returns True."""
        per_epoch = self.workload.steps_per_epoch
        if (
            self._evaluation_due() and self.evaluated != self.step
        ):  # interrupted during an evaluation
            if not self._evaluate_and_record():
                return self._finish("diverged")
            self.save()
        alone = self.fabric.world_size == 1
        rank, world = self.fabric.global_rank, self.fabric.world_size
        while self.step < self.steps:
            epoch, start = divmod(self.step, per_epoch)
            if start == 0:
                self.hidden_state = ()
            for batch in self.workload.batches(self.spec.seed, epoch, start, rank, world):
                self.model.train()
                with self._timed(self.step_timer):
                    self._train_step(batch)
                ends = self.step == self.steps
                evaluation_due, record_due = self._evaluation_due(), self._record_due()
                if record_due:
                    mean = self._mean(self.loss_since_record) / self.steps_since_record
                    if not math.isfinite(mean):
                        return self._finish("diverged")
                    self._log_step(mean)
                if evaluation_due:
                    self.save()  # an interrupted evaluation then loses no step
                    if not self._evaluate_and_record():
                        return self._finish("diverged")
                if not alone and not record_due:
                    continue  # the processes communicate only once per record
                late = time.perf_counter() - self.saved_at > self.spec.train.checkpoint_every
                due, stopping = self._any_process(late, stop())
                if due or evaluation_due or stopping:
                    self.save()
                if ends:
                    break
                if stopping:
                    return "stopped"
        return self._finish("finished")

    def _evaluation_due(self) -> bool:
        return self.step > 0 and (self.step % self.evaluate_every == 0 or self.step == self.steps)

    def _record_due(self) -> bool:
        return self.step % self.spec.train.log_every == 0 or self._evaluation_due()

    def _train_step(self, batch: Batch) -> None:
        count = self.spec.train.accumulate
        micro_batches = list(zip(*(column.chunk(count) for column in batch), strict=True))
        hidden_state = list(
            zip(*(column.chunk(count) for column in self.hidden_state), strict=True)
        )
        states_after = []
        self.optimizer.zero_grad()
        for i, micro_batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with nullcontext() if last else self.fabric.no_backward_sync(self.model):
                before = hidden_state[i] if hidden_state else ()
                loss, after = self.workload.loss(self.model, micro_batch, batch, before)
                self.fabric.backward(loss, create_graph=self.needs_graph)
            states_after.append(after)
            value = loss.detach().double()
            self.loss_since_evaluation += value
            self.loss_since_record += value
        self.hidden_state = tuple(torch.cat(rows) for rows in zip(*states_after, strict=True))
        self.step += 1
        self.steps_since_record += 1
        if self.spec.train.clip_norm is not None:
            # a gradient that is not finite shows up in the loss
            self.gradient_norm = self.fabric.clip_gradients(
                self.model,
                self.optimizer,
                max_norm=self.spec.train.clip_norm,
                error_if_nonfinite=False,
            )
        elif self._record_due():
            self.gradient_norm = gradient_norm(self.network)
        with self._timed(self.optimizer_timer):
            self.optimizer.step()
        self.schedule.step()

    def _timed(self, timer: StepTimer) -> AbstractContextManager[None]:
        """Time the body of the with statement, unless this step also measures the curvature."""
        measured = self.curvature is not None and self.curvature.due
        return nullcontext() if measured else timer.measure()

    def _mean(self, x: Tensor) -> float:
        """Return the mean over all processes."""
        if self.fabric.world_size == 1:
            return float(x)
        mean: Any = self.fabric.all_reduce(x.clone(), reduce_op="mean")
        return float(mean)

    def _any_process(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether it is set in any process."""
        if self.fabric.world_size == 1:
            return flags
        numbers = torch.tensor([float(flag) for flag in flags], device=self.fabric.device)
        total: Any = self.fabric.all_reduce(numbers, reduce_op="sum")
        return tuple(number > 0 for number in total.tolist())

    def _write(self, record: Record) -> None:
        if self.metrics is None or self.events is None:
            return
        self.metrics.write(record)
        add_record(self.events, record)

    def _log_step(self, loss: float) -> None:
        assert self.gradient_norm is not None
        norm = float(full_norm(self.gradient_norm))
        self._write(
            {
                "kind": "step",
                "epoch": self.epoch,
                "step": self.step,
                "loss": loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                # before clipping; JSON has no infinity
                "gradient_norm": norm if math.isfinite(norm) else None,
                # two runs of one seed may differ under this key only
                "time": {"seconds": self.seconds()},
            }
        )
        self.loss_since_record.zero_()
        self.steps_since_record = 0

    def _evaluate_and_record(self) -> bool:
        """Evaluate and record; return False if a metric is not finite."""
        measured = self._evaluate()
        if not all(math.isfinite(value) for value in measured.values()):
            return False
        self.last_evaluation = {
            "train_loss": self._mean(self.loss_since_evaluation) / (self.step - self.evaluated),
            **measured,
        }
        self._write(
            {
                "kind": "evaluation",
                "epoch": self.epoch,
                "step": self.step,
                **self.last_evaluation,
                "time": {
                    "seconds": self.seconds(),
                    "optimizer_ms": self.optimizer_timer.median(),
                    "step_ms": self.step_timer.median(),
                },
            }
        )
        self.keep_best()
        self.keep_for_average()
        self.set_optimizer_mode(training=True)
        self.loss_since_evaluation.zero_()
        self.optimizer_timer.times.clear()
        self.step_timer.times.clear()
        self.evaluated = self.step
        return True

    def _unsharded_network(self) -> nn.Module:
        """Return a network that each process can call by itself, any number of times."""
        if not is_sharded(self.network):
            return self.network
        with torch.random.fork_rng():
            network = self.workload.model().to(self.fabric.device)
        network.load_state_dict(self.full_weights())
        return network.eval()

    def _evaluate(self, final: bool = False) -> dict[str, float]:
        """Return the metrics on the held-out data; each process evaluates a part."""
        rank, world = self.fabric.global_rank, self.fabric.world_size
        if world > 1:  # use the running means and variances of the main process
            for buffer in self.network.buffers():
                buffer.copy_(self.fabric.broadcast(buffer))
        self.model.eval()
        self.set_optimizer_mode(training=False)
        with torch.no_grad(), self.fabric.autocast():
            sums = self.workload.evaluate(self._unsharded_network(), rank, world, final)
        if world > 1:
            sums = self.fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        return self.workload.metrics(sums, final)

    def _finish(self, outcome: Literal["finished", "diverged"]) -> Outcome:
        verdict: Record = {"verdict": outcome, "step": self.step, "steps": self.steps}
        if outcome == "finished":
            verdict |= self.last_evaluation
            if self.spec.train.average_checkpoints > 1:
                self.average_weights()
            examined = self.workload.has_final_test and not self.spec.is_trial
            if examined or self.spec.train.average_checkpoints > 1:
                measured = self._evaluate(final=examined)
                # JSON has no NaN
                verdict |= {name: x if math.isfinite(x) else None for name, x in measured.items()}
        verdict["time"] = {"seconds": self.seconds()}
        if self.metrics is not None:
            self.metrics.sync()
            write_atomically(self.directory.result, json.dumps(verdict, indent=2).encode() + b"\n")
        self.fabric.barrier()
        return outcome
