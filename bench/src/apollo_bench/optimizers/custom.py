"""Optimizers that a recipe names by their class: build one, and try it before any training."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apollo_bench.config.custom_optimizer import CustomSettings, import_optimizer
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.signatures import call_arguments, name_of, takes, unknown_arguments
from apollo_bench.user_code import origin_of

_STEPS = 3  # trial steps before the optimizer's state is saved
_LARGEST = 3  # largest size of a dimension in a trial


class Abilities(NamedTuple):
    """Properties of an optimizer that its trial steps have shown."""

    needs_graph: bool  # whether backward needs create_graph, for second derivatives
    remarks: list[str]  # shown to the user, and in the report


def build_custom(
    settings: CustomSettings, parameters: Iterable[nn.Parameter], key: str = "optimizer"
) -> torch.optim.Optimizer:
    """Make an optimizer from its class; those of torch.optim on their fastest back end.

    Args:
        settings: settings of one run.
        parameters: parameters of the network.
        key: table of the recipe; errors begin with it.

    Raises:
        ExperimentError: the class cannot be imported, or its constructor raises.
    """
    target = import_optimizer(settings, key)
    arguments = call_arguments(target, settings.arguments)
    chosen = {"foreach", "fused", "differentiable"} & arguments.keys()
    if settings.class_path.startswith("torch.optim:") and not chosen:
        faster = next((name for name in ("fused", "foreach") if takes(target, name)), None)
        if faster is not None:
            arguments[faster] = True
    try:
        optimizer = target(list(parameters), **arguments)
    except (Exception, SystemExit) as error:  # its own errors are of any type
        raise _refused(key, settings, f"making {name_of(target)}", error) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ExperimentError(
            f"{key}.class is {settings.class_path!r}: it must return a torch.optim.Optimizer, "
            f"got a {type(optimizer).__name__}"
        )
    return optimizer


def set_mode(optimizer: Any, training: bool) -> None:
    """Call ``train()`` or ``eval()`` of an optimizer that has both, as schedule-free ones do.

    Args:
        optimizer: optimizer without Fabric's wrapper.
        training: whether steps follow, not an evaluation.
    """
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        optimizer.train() if training else optimizer.eval()


def try_steps(
    settings: CustomSettings,
    shapes: Iterable[tuple[int, ...]],
    key: str,
    device: torch.device | str = "cpu",
) -> Abilities:
    """Take steps on small parameters, and save and load the optimizer's state.

    Args:
        settings: settings of one run.
        shapes: shapes of the network's parameters; the small ones have as many dimensions.
        key: table of the recipe; errors begin with it.
        device: device of the parameters.

    Raises:
        ExperimentError: the optimizer cannot be made, needs a closure or sparse gradients, or has a
            state that cannot be saved.
    """
    small = sorted({tuple(min(size, _LARGEST) for size in shape) for shape in shapes})
    name = settings.class_path.rpartition(":")[2]
    device = torch.device(device)
    gpus = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(0)
        problem = _Problem(small, device)
        optimizer = build_custom(settings, problem.parameters, key)
        if not all("lr" in group for group in optimizer.param_groups):
            raise ExperimentError(
                f"{key}.class is {settings.class_path!r}: its parameter groups have no lr, which "
                "the learning rate schedule changes"
            )
        needs_graph = _needs_graph(settings, problem, optimizer, key)
        try:
            restored, twin = _restored(settings, problem, optimizer, key)
        except ExperimentError:
            raise
        except pickle.UnpicklingError:
            raise ExperimentError(
                f"{key}.class is {settings.class_path!r}: the state dict of {name} must hold "
                "tensors, numbers, strings, lists and dicts only, got other objects"
            ) from None
        except (Exception, SystemExit) as error:
            raise _refused(key, settings, f"saving the state of {name}", error) from error
        remarks = []
        for one, where in ((optimizer, problem), (restored, twin)):
            torch.manual_seed(1)
            where.step(one, needs_graph)
        pairs = zip(problem.parameters, twin.parameters, strict=True)
        if not all(torch.equal(left, right) for left, right in pairs):
            remarks.append(
                f"The state dict of {name} does not hold its whole state: a run that is "
                "interrupted and resumed differs from an uninterrupted one."
            )
    if needs_graph:
        remarks.append(f"{name} takes second derivatives: backward passes keep their graph.")
    if unknown := unknown_arguments(import_optimizer(settings, key), settings.arguments):
        remarks.append(f"{name} does not name the arguments {', '.join(unknown)}; it takes any.")
    return Abilities(needs_graph, remarks)


class _Problem:
    """A small convex problem in parameters of given shapes."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], device: torch.device) -> None:
        self.parameters = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        self._targets = [torch.randn_like(p) for p in self.parameters]

    def copy(self) -> _Problem:
        """Return the same problem with parameters of its own."""
        twin = _Problem((), torch.device("cpu"))
        twin.parameters = [nn.Parameter(p.detach().clone()) for p in self.parameters]
        twin._targets = self._targets
        return twin

    def step(self, optimizer: torch.optim.Optimizer, create_graph: bool) -> None:
        """Take a step."""
        optimizer.zero_grad()
        loss: Tensor = torch.zeros((), device=self._targets[0].device)
        for p, target in zip(self.parameters, self._targets, strict=True):
            loss = loss + (p - target).pow(2).sum() + (p - target).pow(4).sum()
        with warnings.catch_warnings():
            # zero_grad() drops the graph that torch warns of, once per process
            warnings.filterwarnings("ignore", message="Using backward.* with create_graph=True")
            torch.autograd.backward(loss, create_graph=create_graph)
        optimizer.step()


def _needs_graph(
    settings: CustomSettings, problem: _Problem, optimizer: torch.optim.Optimizer, key: str
) -> bool:
    """Take steps; return whether they need the graph of the backward pass."""
    set_mode(optimizer, training=True)
    needs_graph = False
    for number in range(_STEPS):
        try:
            problem.step(optimizer, needs_graph)
        except (Exception, SystemExit) as error:  # its own errors are of any type
            # message of torch.autograd.grad for gradients without a graph
            if needs_graph or number or "does not require grad" not in str(error):
                what = f"{type(optimizer).__name__}.step() without a closure"
                raise _refused(key, settings, what, error) from error
            needs_graph = True
    return needs_graph


def _restored(
    settings: CustomSettings, problem: _Problem, optimizer: torch.optim.Optimizer, key: str
) -> tuple[torch.optim.Optimizer, _Problem]:
    """Return an optimizer with the saved state of another, as a resumed run has it."""
    set_mode(optimizer, training=False)
    set_mode(optimizer, training=True)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    twin = problem.copy()
    restored = build_custom(settings, twin.parameters, key)
    set_mode(restored, training=True)
    for p, own in zip(twin.parameters, problem.parameters, strict=True):
        p.data.copy_(own)
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    return restored, twin


def _refused(
    key: str, settings: CustomSettings, what: str, error: BaseException
) -> ExperimentError:
    return ExperimentError(
        f"{key}.class is {settings.class_path!r}: {what} raised {type(error).__name__}: "
        f"{first_line(error)}{origin_of(error)}"
    )


def parameter_shapes(network: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of a network's parameters."""
    return [tuple(p.shape) for p in network.parameters()]
