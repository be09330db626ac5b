"""The training loop of one run, from its directory to its directory.

Every batch is a function of (seed, epoch, step), and a checkpoint holds all the rest: so a run that
was killed and resumed writes the same weights and the same metrics as one that never was. Devices,
precision and processes are Lightning Fabric's business.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from apollo_bench.atomic_write import write_atomically
from apollo_bench.config.execution import Placement
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.optimizers.registry import build, rate_factor
from apollo_bench.runs import curvature_log
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_bench.seeds import derived_seed
from apollo_bench.training import process_group
from apollo_bench.training.full_state_dict import gathered, is_sharded, load_optimizer, load_weights
from apollo_bench.training.step_timer import Stopwatch
from apollo_bench.training.sync_batch_norm import over_all_processes
from apollo_bench.training.tensorboard_log import events
from apollo_bench.workloads.workload import Batch, Carried, Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.utils.tensorboard import SummaryWriter

Outcome = Literal["finished", "diverged", "stopped"]


def train(
    directory: RunDirectory,
    spec: RunSpec,
    task: Task,
    stop: Callable[[], bool] = lambda: False,
    fabric: Fabric | None = None,
    diagnose_every: int | None = None,
) -> Outcome:
    """Train a prepared run to its end, from its checkpoint where it has one.

    Args:
        directory: prepared for this ``spec``.
        spec: the resolved recipe.
        task: data, model, loss and metric.
        stop: asked after every step, with several processes at every line of the metrics; True (in
            any process) writes a checkpoint and returns ``"stopped"``.
        fabric: launched; None: this process alone, on the CPU.
        diagnose_every: steps between diagnostics of Apollo's curvature, which change nothing of
            the training; None: none.

    Returns:
        How it ended. ``"finished"`` and ``"diverged"`` (a loss that is not finite) are recorded in
        result.json; such a run is not trained again.

    Raises:
        ExperimentError: the checkpoint cannot be read; diagnostics of another optimizer.
    """
    if diagnose_every is not None:
        curvature_log.check(spec)
    # one process looks: on a shared file system the others may see it later
    verdict = process_group.from_first(directory.verdict() if process_group.speaks() else None)
    if verdict is not None:
        return "diverged" if verdict["verdict"] == "diverged" else "finished"
    fabric = Placement().fabric(spec) if fabric is None else fabric
    # some operations have no deterministic form on a GPU
    torch.use_deterministic_algorithms(True, warn_only=fabric.device.type != "cpu")
    torch.manual_seed(spec.seed)
    with _Run(directory, spec, task, fabric, diagnose_every) as run:
        return run.to_the_end(stop)


_UNREADABLE = (
    *(OSError, RuntimeError, ValueError, KeyError, IndexError, EOFError),
    pickle.PickleError,
)


class _Run:
    """What lives as long as one call of ``train``: everything that a checkpoint must hold."""

    def __init__(
        self,
        directory: RunDirectory,
        spec: RunSpec,
        task: Task,
        fabric: Fabric,
        diagnose_every: int | None = None,
    ) -> None:
        self.directory, self.spec, self.task, self.fabric = directory, spec, task, fabric
        self.diagnose_every = diagnose_every
        self.steps = spec.train.schedule.steps(task.steps_per_epoch)
        self.every = spec.train.evaluate_every or task.steps_per_epoch
        self.network: nn.Module = task.model()  # as the task knows it
        if fabric.global_rank > 0:  # dropout draws other numbers in each process
            torch.manual_seed(derived_seed(spec.seed, fabric.global_rank))
        if fabric.world_size > 1:
            self.network = over_all_processes(self.network, fabric.device)
        network: Any = torch.compile(self.network) if spec.train.compile else self.network
        self.model = fabric.setup_module(network)
        # sharded parameters are others than those before
        optimizer = build(spec.optimizer, self.network)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, rate_factor(spec.train.schedule, spec.name, self.steps)
        )
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.step = 0
        self.carried: Carried = ()
        # since the last evaluation, and since the last line: the sum stays where the loss is, so
        # that no step waits for it; a loss that is not finite stays in the sum
        self.period_loss = torch.zeros((), dtype=torch.float64, device=fabric.device)
        self.line_loss = self.period_loss.clone()
        self.line_steps = 0
        # since the last evaluation: the optimizer, and all of a step but its reading of data
        self.updates, self.steps_taken = Stopwatch(fabric.device), Stopwatch(fabric.device)
        self.last: Record = {}
        self.evaluated = 0  # the step of the last evaluation
        self.best: float | None = None  # of the task's curve, so far
        self.seconds_before = 0.0  # spent in the processes before this one
        self.started = time.perf_counter()
        self.metrics: BinaryIO | None = None  # the first process writes it
        self.events: SummaryWriter | None = None  # likewise
        self.curvature: curvature_log.CurvatureLog | None = None  # where it is asked for

    def __enter__(self) -> _Run:
        offset = self._restore()
        if self.fabric.is_global_zero:
            self.metrics = self.directory.metrics.open("ab")
            # lines written after the checkpoint will be written again
            self.metrics.truncate(offset)
            self.events = events(self.directory.events, self.step)
        if self.diagnose_every is not None:
            self.curvature = curvature_log.CurvatureLog(
                self.directory.diagnostics, self.diagnose_every, self.optimizer.optimizer,
                self.network, self.step, self._epoch, self.events,
            )  # fmt: skip
        self.saved_at = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.curvature is not None:
            self.curvature.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.events is not None:
            self.events.close()

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def to_the_end(self, stop: Callable[[], bool]) -> Outcome:
        per_epoch = self.task.steps_per_epoch
        if self._ends_period() and self.evaluated != self.step:  # interrupted while it evaluated
            if not self._end_period():
                return self._finish("diverged")
            self._save()
        alone = self.fabric.world_size == 1
        rank, world = self.fabric.global_rank, self.fabric.world_size
        while self.step < self.steps:
            epoch, start = divmod(self.step, per_epoch)
            if start == 0:
                self.carried = ()
            for batch in self.task.batches(self.spec.seed, epoch, start, rank, world):
                self.model.train()
                with self._timed(self.steps_taken):
                    self._train_step(batch)
                ends = self.step == self.steps
                ends_period = self._ends_period()
                ends_line = self.step % self.spec.train.log_every == 0 or ends_period
                if ends_line:
                    mean = self._mean(self.line_loss) / self.line_steps
                    if not math.isfinite(mean):
                        return self._finish("diverged")
                    self._log_line(mean)
                if ends_period:
                    self._save()  # what an interruption of the evaluation would lose
                    if not self._end_period():
                        return self._finish("diverged")
                if not alone and not ends_line:
                    continue  # the processes agree on no more than once a line
                late = time.perf_counter() - self.saved_at > self.spec.train.checkpoint_every
                due, stopping = self._any(late, stop())
                if due or ends_period or stopping:
                    self._save()
                if ends:
                    break
                if stopping:
                    return "stopped"
        return self._finish("finished")

    def _ends_period(self) -> bool:
        return self.step > 0 and (self.step % self.every == 0 or self.step == self.steps)

    def _train_step(self, batch: Batch) -> None:
        parts = self.spec.train.accumulate
        chunks = list(zip(*(column.chunk(parts) for column in batch), strict=True))
        carried = list(zip(*(column.chunk(parts) for column in self.carried), strict=True))
        left = []
        self.optimizer.zero_grad()
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            with nullcontext() if last else self.fabric.no_backward_sync(self.model):
                before = carried[i] if carried else ()
                loss, after = self.task.loss(self.model, chunk, batch, before)
                self.fabric.backward(loss)
            left.append(after)
            value = loss.detach().double()
            self.period_loss += value
            self.line_loss += value
        self.carried = tuple(torch.cat(rows) for rows in zip(*left, strict=True))
        if self.spec.train.clip_norm is not None:
            # what is not finite shows in the loss
            self.fabric.clip_gradients(
                self.model,
                self.optimizer,
                max_norm=self.spec.train.clip_norm,
                error_if_nonfinite=False,
            )
        with self._timed(self.updates):
            self.optimizer.step()
        self.schedule.step()
        self.line_steps += 1
        self.step += 1

    def _timed(self, watch: Stopwatch) -> AbstractContextManager[None]:
        """A step that is measured is no example of what a step takes."""
        measured = self.curvature is not None and self.curvature.due
        return nullcontext() if measured else watch.running()

    def _mean(self, x: Tensor) -> float:
        """Of all processes."""
        if self.fabric.world_size == 1:
            return float(x)
        mean: Any = self.fabric.all_reduce(x.clone(), reduce_op="mean")
        return float(mean)

    def _any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set in any process."""
        if self.fabric.world_size == 1:
            return flags
        numbers = torch.tensor([float(flag) for flag in flags], device=self.fabric.device)
        total: Any = self.fabric.all_reduce(numbers, reduce_op="sum")
        return tuple(number > 0 for number in total.tolist())

    def _write(self, record: Record) -> None:
        if self.metrics is None or self.events is None:
            return
        self.metrics.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.metrics.flush()
        for name, value in record.items():
            if isinstance(value, float) and name != "epoch":
                self.events.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    @property
    def epoch(self) -> int | float:
        """Epochs so far."""
        return self._epoch(self.step)

    def _epoch(self, step: int) -> int | float:
        whole, rest = divmod(step, self.task.steps_per_epoch)
        return whole if rest == 0 else step / self.task.steps_per_epoch

    def _log_line(self, loss: float) -> None:
        self._write(
            {
                "kind": "step",
                "epoch": self.epoch,
                "step": self.step,
                "loss": loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                # all that differs between two runs of one seed stands under this key
                "time": {"seconds": self.seconds()},
            }
        )
        self.line_loss.zero_()
        self.line_steps = 0

    def _end_period(self) -> bool:
        """Evaluate; False: what is measured is not finite, though the losses before were."""
        measured = self._evaluate()
        if not all(math.isfinite(value) for value in measured.values()):
            return False
        self.last = {
            "train_loss": self._mean(self.period_loss) / (self.step - self.evaluated),
            **measured,
        }
        self._write(
            {
                "kind": "evaluation",
                "epoch": self.epoch,
                "step": self.step,
                **self.last,
                "time": {
                    "seconds": self.seconds(),
                    "optimizer_ms": self.updates.median(),
                    "step_ms": self.steps_taken.median(),
                },
            }
        )
        self._keep_best()
        self._keep_for_average()
        self.period_loss.zero_()
        self.updates.times.clear()
        self.steps_taken.times.clear()
        self.evaluated = self.step
        return True

    def _keep_best(self) -> None:
        metric = self.task.curve
        value = self.last[metric.name]
        if self.best is not None and not metric.better(value, self.best):
            return
        self.best = value
        weights = self._weights()
        if self.fabric.is_global_zero:
            state = {"model": weights, "epoch": self.epoch, metric.name: value}
            write_atomically(self.directory.best, _saved(state))

    def _keep_for_average(self) -> None:
        count = self.spec.train.average_last
        if count == 1:
            return
        weights = self._weights()
        if not self.fabric.is_global_zero:
            return
        state = {name: value.cpu() for name, value in weights.items()}
        write_atomically(self.directory.evaluated(self.step), _saved(state))
        for path in self.directory.all_evaluated(self.step)[:-count]:
            path.unlink()

    def _average(self) -> None:
        """Put the mean of the last evaluations' weights in place of the weights."""
        mean = process_group.from_first(
            self._mean_weights() if self.fabric.is_global_zero else None
        )
        assert mean is not None
        load_weights(self.network, mean)
        if self.fabric.is_global_zero:
            write_atomically(self.directory.averaged, _saved({"model": mean}))

    def _mean_weights(self) -> dict[str, Tensor]:
        paths = self.directory.all_evaluated(self.step)[-self.spec.train.average_last :]
        states = [torch.load(path, weights_only=True) for path in paths]
        mean = {}
        for name, last in states[-1].items():
            total = torch.stack([state[name].double() for state in states]).mean(0)
            mean[name] = total.to(last.dtype) if last.is_floating_point() else last
        return mean

    def _weights(self) -> dict[str, Tensor]:
        """Whole tensors; all processes must ask."""
        weights: dict[str, Tensor] = gathered(dict(self.network.state_dict()))
        return weights

    def _whole_network(self) -> nn.Module:
        """One that each process can use by itself, as often as its part of the data needs."""
        if not is_sharded(self.network):
            return self.network
        with torch.random.fork_rng():
            network = self.task.model().to(self.fabric.device)
        network.load_state_dict(self._weights())
        return network.eval()

    def _evaluate(self, final: bool = False) -> dict[str, float]:
        """Metrics on the held-out data, of which each process takes a part."""
        rank, world = self.fabric.global_rank, self.fabric.world_size
        if world > 1:  # running means and variances are the first process's
            for buffer in self.network.buffers():
                buffer.copy_(self.fabric.broadcast(buffer))
        self.model.eval()
        with torch.no_grad(), self.fabric.autocast():
            tally = self.task.tally(self._whole_network(), rank, world, final)
        if world > 1:
            tally = self.fabric.all_reduce(tally, reduce_op="sum")  # type: ignore[assignment]
        return self.task.metrics(tally, final)

    def _finish(self, outcome: Literal["finished", "diverged"]) -> Outcome:
        verdict: Record = {"verdict": outcome, "step": self.step, "steps": self.steps}
        if outcome == "finished":
            verdict |= self.last
            if self.spec.train.average_last > 1:
                self._average()
            examined = self.task.examines and not self.spec.is_try
            if examined or self.spec.train.average_last > 1:
                measured = self._evaluate(final=examined)
                # JSON knows no NaN
                verdict |= {name: x if math.isfinite(x) else None for name, x in measured.items()}
        verdict["time"] = {"seconds": self.seconds()}
        if self.fabric.is_global_zero:
            write_atomically(self.directory.result, json.dumps(verdict, indent=2).encode() + b"\n")
        self.fabric.barrier()
        return outcome

    def _save(self) -> None:
        processes = self._of_all_processes()
        weights, optimizer = self._weights(), gathered(self.optimizer.state_dict())
        if self.metrics is not None and self.events is not None:
            self.metrics.flush()
            self.events.flush()
            state = {
                "model": weights,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "processes": processes,
                "step": self.step,
                "line_steps": self.line_steps,
                "times": [watch.collect() for watch in (self.updates, self.steps_taken)],
                "last": self.last,
                "best": self.best,
                "evaluated": self.evaluated,
                "seconds": self.seconds(),
                "metrics_bytes": self.metrics.tell(),
            }
            write_atomically(self.directory.checkpoint, _saved(state))
        self.fabric.barrier()
        self.saved_at = time.perf_counter()

    def _of_all_processes(self) -> list[dict[str, Tensor]]:
        """What differs from process to process."""
        mine = {
            "random": torch.get_rng_state(),
            "period_loss": self.period_loss.cpu(),
            "line_loss": self.line_loss.cpu(),
            **{f"carried.{i}": x.cpu() for i, x in enumerate(self.carried)},
        }
        if self.fabric.device.type == "cuda":
            mine["device_random"] = torch.cuda.get_rng_state(self.fabric.device)
        if self.fabric.world_size == 1:
            return [mine]
        gathered: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(gathered, mine)
        return gathered

    def _read_checkpoint(self) -> dict[str, Any]:
        path = self.directory.checkpoint
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            _ = state["step"]  # one that is no checkpoint lacks it
        except FileNotFoundError:
            raise ExperimentError(
                f"{path}: rank 0 sees it; all processes must see the same directory"
            ) from None
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None
        return state

    def _check_step(self, state: dict[str, Any], firsts: int) -> None:
        if state["step"] != firsts:
            raise ExperimentError(
                f"{self.directory.checkpoint}: holds step {state['step']} here and {firsts} for "
                "rank 0; all processes must see the same directory"
            )

    def _restore(self) -> int:
        """Load the checkpoint if there is one; how many bytes of the metrics are valid."""
        path = self.directory.checkpoint
        if not process_group.from_first(path.exists()):
            return 0
        try:
            state = process_group.agreed(self._read_checkpoint)
            firsts = process_group.from_first(state["step"])
            process_group.agreed(lambda: self._check_step(state, firsts))
            load_weights(self.network, state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            mine = state["processes"][self.fabric.global_rank]
            torch.set_rng_state(mine["random"])
            if self.fabric.device.type == "cuda" and "device_random" in mine:
                torch.cuda.set_rng_state(mine["device_random"], self.fabric.device)
            elif self.fabric.device.type == "cuda":  # it began on a CPU
                torch.cuda.manual_seed(derived_seed(self.spec.seed, state["step"]))
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None
        self.step = state["step"]
        self.period_loss.copy_(mine["period_loss"])
        self.carried = tuple(
            mine[f"carried.{i}"].to(self.fabric.device)
            for i in range(sum(name.startswith("carried.") for name in mine))
        )
        self.line_loss.copy_(mine["line_loss"])
        self.line_steps = state["line_steps"]
        self.updates.times, self.steps_taken.times = state["times"]
        self.last, self.best = state["last"], state["best"]
        self.evaluated = state["evaluated"]
        self.seconds_before = state["seconds"]
        return int(state["metrics_bytes"])


def _unreadable(path: Path, error: Exception) -> ExperimentError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ExperimentError(
        f"{path}: the checkpoint cannot be read ({first}); remove the run's directory to train it "
        "anew"
    )


def _saved(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
