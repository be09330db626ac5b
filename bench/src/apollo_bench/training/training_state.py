"""The state of one training run, and its checkpoints.

Batches are functions of (seed, epoch, step). A checkpoint holds everything else.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.optimizers.custom import parameter_shapes, set_mode, try_steps
from apollo_bench.optimizers.registry import build_optimizer, lr_factor
from apollo_bench.runs import curvature_log
from apollo_bench.runs.run_directory import Record, RunDirectory
from apollo_bench.seeds import derived_seed
from apollo_bench.training import checkpoint_files, process_group
from apollo_bench.training.full_state_dict import (
    full_model_state,
    full_optimizer_state,
    load_model_state,
    load_optimizer_state,
)
from apollo_bench.training.metrics_log import MetricsLog
from apollo_bench.training.step_timer import StepTimer
from apollo_bench.training.sync_batch_norm import convert_sync_batch_norm
from apollo_bench.training.tensorboard_log import make_event_writer
from apollo_bench.workloads.workload import HiddenState, Workload

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.utils.tensorboard import SummaryWriter

S = TypeVar("S", bound="TrainingState")


class TrainingState:
    """The state of one run, restored from its checkpoint when the context is entered.

    Args:
        directory: prepared for ``spec``.
        spec: the resolved recipe.
        workload: data, model, loss and metric.
        fabric: launched.
        diagnose_every: steps between measurements of Apollo's curvature; None: none.
    """

    def __init__(
        self,
        directory: RunDirectory,
        spec: RunSpec,
        workload: Workload,
        fabric: Fabric,
        diagnose_every: int | None = None,
    ) -> None:
        self.directory, self.spec, self.fabric = directory, spec, fabric
        self.workload = workload
        self.diagnose_every = diagnose_every
        self.steps = spec.train.schedule.steps(workload.steps_per_epoch)
        self.evaluate_every = spec.train.evaluate_every or workload.steps_per_epoch
        self.network: nn.Module = workload.model()
        if fabric.global_rank > 0:  # each process draws its own dropout masks
            torch.manual_seed(derived_seed(spec.seed, fabric.global_rank))
        if fabric.world_size > 1:
            self.network = convert_sync_batch_norm(self.network, fabric.device)
        network: Any = torch.compile(self.network) if spec.train.compile else self.network
        self.model = fabric.setup_module(network)
        # after setup_module, which replaces the parameters when it shards them
        optimizer = build_optimizer(spec.optimizer, self.network)
        self._raw_optimizer, self._optimizer_trains = optimizer, False
        self.needs_graph = False  # whether backward needs create_graph
        if isinstance(spec.optimizer, CustomSettings):
            shapes, key = parameter_shapes(self.network), f"optimizers.{spec.name}"
            abilities = try_steps(spec.optimizer, shapes, key, fabric.device)
            self.needs_graph = abilities.needs_graph
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lr_factor(spec.train.schedule, spec.name, self.steps)
        )
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.step = 0
        self.hidden_state: HiddenState = ()
        # Sums of the loss since the last evaluation and since the last record. They stay on the
        # loss's device, so that no step waits for them. A loss that is not finite stays in the sum.
        self.loss_since_evaluation = torch.zeros((), dtype=torch.float64, device=fabric.device)
        self.loss_since_record = self.loss_since_evaluation.clone()
        self.steps_since_record = 0
        self.gradient_norm: Tensor | None = None  # of the last step, where it is known
        # Since the last evaluation. step_timer includes everything but the reading of data.
        self.optimizer_timer, self.step_timer = StepTimer(fabric.device), StepTimer(fabric.device)
        self.last_evaluation: Record = {}
        self.evaluated = 0  # the step of the last evaluation
        self.best: float | None = None  # best value of the monitored metric so far
        self.seconds_before = 0.0  # of training, in the processes that this one resumes
        self.started = time.perf_counter()
        self.metrics: MetricsLog | None = None  # open in the main process
        self.events: SummaryWriter | None = None  # open in the main process
        self.curvature: curvature_log.CurvatureLog | None = None  # with diagnose_every

    def __enter__(self: S) -> S:
        self.set_optimizer_mode(training=True)  # as when the checkpoint was written
        records = self._restore()
        if self.fabric.is_global_zero:
            self.metrics = MetricsLog(self.directory.metrics, records)
            self.events = make_event_writer(self.directory.events, self.step)
        if self.diagnose_every is not None:
            self.curvature = curvature_log.CurvatureLog(
                self.directory.diagnostics, self.diagnose_every, self.optimizer.optimizer,
                self.network, self.step, self.epoch_at, self.events,
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

    def set_optimizer_mode(self, training: bool) -> None:
        """Call ``train()`` or ``eval()`` of a schedule-free optimizer; both change weights."""
        if training != self._optimizer_trains:
            set_mode(self._raw_optimizer, training)
            self._optimizer_trains = training

    def seconds(self) -> float:
        """Return the training time so far, over all processes that trained the run in turn.

        Round to milliseconds, as archives do, so that both reports agree.
        """
        return round(self.seconds_before + time.perf_counter() - self.started, 3)

    @property
    def epoch(self) -> int | float:
        """The number of epochs so far."""
        return self.epoch_at(self.step)

    def epoch_at(self, step: int) -> int | float:
        """Return the number of epochs after a step."""
        whole, rest = divmod(step, self.workload.steps_per_epoch)
        return whole if rest == 0 else step / self.workload.steps_per_epoch

    def keep_best(self) -> None:
        """Write the weights if the last evaluation is the best so far."""
        metric = self.workload.monitored
        value = self.last_evaluation[metric.name]
        if self.best is not None and not metric.better(value, self.best):
            return
        self.best = value
        weights = self.full_weights()
        if self.fabric.is_global_zero:
            state = {"model": weights, "epoch": self.epoch, metric.name: value}
            checkpoint_files.write_checkpoint(self.directory.best, state)

    def keep_for_average(self) -> None:
        """Write the weights of this evaluation if the recipe averages the last evaluations."""
        count = self.spec.train.average_checkpoints
        if count == 1:
            return
        weights = self.full_weights()
        if not self.fabric.is_global_zero:
            return
        state = {name: value.cpu() for name, value in weights.items()}
        checkpoint_files.write_checkpoint(self.directory.evaluated(self.step), state)
        for path in self.directory.kept_evaluations(self.step)[:-count]:
            path.unlink()

    def average_weights(self) -> None:
        """Replace the weights by their mean over the last evaluations."""
        main = self.fabric.is_global_zero
        mean = process_group.run_on_all(lambda: self._mean_weights() if main else None)
        mean = process_group.broadcast_from_main(mean)
        assert mean is not None
        self.set_optimizer_mode(training=False)
        load_model_state(self.network, mean)
        if self.fabric.is_global_zero:
            checkpoint_files.write_checkpoint(self.directory.averaged, {"model": mean})

    def _mean_weights(self) -> dict[str, Tensor]:
        paths = self.directory.kept_evaluations(self.step)[-self.spec.train.average_checkpoints :]
        evaluations = -(-self.step // self.evaluate_every)
        if len(paths) < min(self.spec.train.average_checkpoints, evaluations):
            raise ExperimentError(
                f"{self.directory.checkpoint.parent}: weights to average are missing, "
                f"{len(paths)} are there; remove the run's directory to train it again"
            )
        states = [checkpoint_files.read_checkpoint(path) for path in paths]
        mean = {}
        for name, last in states[-1].items():
            total = torch.stack([state[name].double() for state in states]).mean(0)
            mean[name] = total.to(last.dtype) if last.is_floating_point() else last
        return mean

    def full_weights(self) -> dict[str, Tensor]:
        """Return the weights as full tensors; every process must call this."""
        return full_model_state(self.network)

    def save(self) -> None:
        """Write a checkpoint; every process must call this."""
        processes = self._gather_process_states()
        weights, optimizer = self.full_weights(), full_optimizer_state(self.optimizer)
        if self.metrics is not None and self.events is not None:
            self.metrics.sync()
            self.events.flush()
            if self.curvature is not None:
                self.curvature.sync()
            state = {
                "model": weights,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "processes": processes,
                "step": self.step,
                "line_steps": self.steps_since_record,
                "times": [timer.collect() for timer in (self.optimizer_timer, self.step_timer)],
                "last": self.last_evaluation,
                "best": self.best,
                "evaluated": self.evaluated,
                "seconds": self.seconds(),
                "metrics": self.metrics.text,
            }
            checkpoint_files.write_checkpoint(self.directory.checkpoint, state)
        self.fabric.barrier()
        self.saved_at = time.perf_counter()

    def _gather_process_states(self) -> list[dict[str, Tensor]]:
        """Return, for every process, the state that differs between processes."""
        own_state = {
            "random": torch.get_rng_state(),
            "period_loss": self.loss_since_evaluation.cpu(),
            "line_loss": self.loss_since_record.cpu(),
            # the key is that of earlier checkpoints
            **{f"carried.{i}": x.cpu() for i, x in enumerate(self.hidden_state)},
        }
        if self.fabric.device.type == "cuda":
            own_state["device_random"] = torch.cuda.get_rng_state(self.fabric.device)
        if self.fabric.world_size == 1:
            return [own_state]
        gathered: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(gathered, own_state)
        return gathered

    def _read_checkpoint(self) -> dict[str, Any]:
        path = self.directory.checkpoint
        if not path.exists():
            raise ExperimentError(
                f"{path}: rank 0 sees it; all processes must see the same directory"
            )
        state = checkpoint_files.read_checkpoint(path)
        if not isinstance(state.get("step"), int):
            raise checkpoint_files.unreadable(path, "it holds no number of steps")
        return state

    def _check_step(self, state: dict[str, Any], main_step: int) -> None:
        if state["step"] != main_step:
            raise ExperimentError(
                f"{self.directory.checkpoint}: holds step {state['step']} here and {main_step} "
                "for rank 0; all processes must see the same directory"
            )

    def _restore(self) -> str:
        """Load the checkpoint, if there is one; return the records that were written before it."""
        path = self.directory.checkpoint
        if not process_group.broadcast_from_main(path.exists()):
            return ""
        state = process_group.run_on_all(self._read_checkpoint)
        main_step = process_group.broadcast_from_main(state["step"])
        process_group.run_on_all(lambda: self._check_step(state, main_step))
        try:
            return self._load(state)
        except checkpoint_files.UNREADABLE as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
            raise checkpoint_files.unreadable(path, reason) from None

    def _load(self, state: dict[str, Any]) -> str:
        load_model_state(self.network, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        own_state = state["processes"][self.fabric.global_rank]
        torch.set_rng_state(own_state["random"])
        if self.fabric.device.type == "cuda" and "device_random" in own_state:
            torch.cuda.set_rng_state(own_state["device_random"], self.fabric.device)
        elif self.fabric.device.type == "cuda":  # the run began on a CPU
            torch.cuda.manual_seed(derived_seed(self.spec.seed, state["step"]))
        self.step = state["step"]
        self.loss_since_evaluation.copy_(own_state["period_loss"])
        self.hidden_state = tuple(
            own_state[f"carried.{i}"].to(self.fabric.device)
            for i in range(sum(name.startswith("carried.") for name in own_state))
        )
        self.loss_since_record.copy_(own_state["line_loss"])
        self.steps_since_record = state["line_steps"]
        self.optimizer_timer.times, self.step_timer.times = state["times"]
        self.last_evaluation, self.best = state["last"], state["best"]
        self.evaluated = state["evaluated"]
        self.seconds_before = state["seconds"]
        if "metrics" in state or not self.fabric.is_global_zero:
            return str(state.get("metrics", ""))
        # earlier checkpoints hold only the size of the file
        return self.directory.first_records(state["metrics_bytes"])
