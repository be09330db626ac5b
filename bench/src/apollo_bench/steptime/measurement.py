"""Measure the steps of many optimizers on one parameter set, alternately in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from apollo_bench.errors import ExperimentError
from apollo_bench.progress_callback import ProgressCallback
from apollo_bench.steptime.candidates import PEER, REFERENCE, Candidate
from apollo_bench.steptime.parameter_sets import ParameterSet, numel
from apollo_bench.steptime.timing import CPU_TIMER, CpuTimer

COPY = "copy"
WARM_UP = 3  # steps that do not count
FEWEST = 5  # minimum number of rounds
_MIN_VALUES = 3  # values that every optimizer moves: the gradient, and the parameter twice
_SLOW = 8  # times the reference's step; a slower candidate takes part in FEWEST rounds only
_SHARE_OF_MEMORY = 0.7  # of the free memory, used at the same time


@dataclass
class Timings:
    """The measurements of one candidate on one set; times in milliseconds.

    ``peer`` holds the reference's times in the same rounds. ``state_bytes`` is the size of the
    whole state. ``peak_bytes`` is the growth of memory in one step, None if the system does not
    report it. ``unavailable`` says why nothing was measured.
    """

    name: str
    family: str
    values_moved: int  # per parameter
    times: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    state_bytes: int | None = None
    peak_bytes: int | None = None
    unavailable: str | None = None

    @property
    def milliseconds(self) -> float:
        """Median step time."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the step times."""
        if len(self.times) < 2:
            return self.times[0], self.times[0]
        first, _, third = statistics.quantiles(self.times, n=4)
        return first, third

    @property
    def ratio(self) -> float:
        """Median of the ratios to the reference's step of the same round."""
        return statistics.median(a / b for a, b in zip(self.times, self.peer, strict=True))


@dataclass
class SetResult:
    """The measurements of all candidates on one set.

    ``copied`` is the size in bytes of the tensor that each of ``copy_times`` copied.
    ``reads_twice`` says that a tensor's gradient and state exceed every cache of the device;
    Apollo, which reads them twice, then reads them twice from memory.
    """

    name: str
    title: str
    tensors: int
    parameters: int
    element_bytes: int
    copy_times: list[float]
    taken: list[Timings]  # also the key in written results
    interrupted: bool = False
    copied: int = CPU_TIMER.copied
    reads_twice: bool = False

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second that a large copy reads and writes."""
        return 2 * self.copied / (statistics.median(self.copy_times) / 1e3)

    def bandwidth(self, timings: Timings, twice: bool = False) -> float:
        """Return the bytes per second of a candidate, if it moved no more than it must.

        That is gradient and parameter read, the parameter written, and all of the state read and
        written; with ``twice`` gradient and state are read once more.
        """
        moved = _MIN_VALUES * self.parameters * self.element_bytes
        if timings.state_bytes is None:
            moved += (timings.values_moved - _MIN_VALUES) * self.parameters * self.element_bytes
        else:
            moved += 2 * timings.state_bytes
        if twice:
            states = (
                (timings.values_moved - _MIN_VALUES) // 2 * self.parameters * self.element_bytes
            )
            moved += self.parameters * self.element_bytes + (timings.state_bytes or states)
        return moved / (timings.milliseconds / 1e3)

    def speedup_over_reference(self, timings: Timings) -> float | None:
        """Return the speedup over the reference back end; None if that was not measured."""
        found = [t for t in self.taken if t.name == REFERENCE and t.times]
        return found[0].milliseconds / timings.milliseconds if found else None

    def as_record(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)


class _Entry:
    """A candidate with its own parameters, and the gradients that all share."""

    def __init__(
        self, candidate: Candidate, values: list[Tensor], gradients: list[Tensor], timer: CpuTimer
    ) -> None:
        self._timer = timer
        self.timings = Timings(candidate.name, candidate.family, candidate.values_moved)
        self.optimizer: Optimizer | None = None
        params = [nn.Parameter(value.clone()) for value in values]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        try:
            self.optimizer = candidate.make(params)
            for _ in range(WARM_UP):
                self.milliseconds = self.step()
        except (RuntimeError, ValueError, ImportError) as error:
            self.optimizer = None
            self.timings.unavailable = str(error).splitlines()[0]

    def step(self) -> float:
        """Return the time of a step in milliseconds."""
        assert self.optimizer is not None
        return self._timer.milliseconds(self.optimizer.step)

    def measure_memory(self) -> None:
        """Measure the size of the state, and the growth of memory in a step."""
        assert self.optimizer is not None
        self.timings.state_bytes = sum(
            x.numel() * x.element_size()
            for state in self.optimizer.state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        )
        self.timings.peak_bytes = self._timer.growth(self.optimizer.step)


def measure(
    chosen: ParameterSet,
    candidates: list[Candidate],
    *,
    repeats: int,
    budget: float,
    dtype: torch.dtype,
    seed: int,
    report_progress: ProgressCallback,
    stop: Callable[[], bool],
    timer: CpuTimer = CPU_TIMER,
) -> SetResult:
    """Step all candidates alternately; every round starts with another one.

    A candidate that takes more than 8 times as long as the reference takes part in 5 rounds only.
    If not all fit into memory, they are measured in several groups, each with the reference.

    Args:
        chosen: parameter set; a part of it is used if the whole does not fit into memory.
        candidates: candidates, with the reference.
        repeats: maximum number of rounds.
        budget: seconds after which no round begins, except for the first 5.
        dtype: type of parameters and gradients.
        seed: seed of the random parameters and gradients.
        report_progress: called with a title, the rounds done and all rounds.
        stop: called after each step; True ends the measurement.
        timer: timer of the device.

    Raises:
        ExperimentError: not even two candidates fit into memory.
    """
    chosen, groups = fit_into_memory(chosen, candidates, dtype, timer)
    shapes = chosen.shapes()
    generator = torch.Generator(timer.device).manual_seed(seed)

    def drawn(size: float) -> list[Tensor]:
        made = (torch.randn(s, generator=generator, device=timer.device) for s in shapes)
        return [one.mul_(size).to(dtype) for one in made]

    values, gradients = drawn(0.05), drawn(0.01)
    result = SetResult(
        chosen.name, chosen.title, len(shapes), numel(shapes), dtype.itemsize, [], []
    )
    result.copied = timer.copied
    largest = max(map(math.prod, shapes)) * (dtype.itemsize + 2 * max(4, dtype.itemsize))
    result.reads_twice = bool(timer.cache) and largest > timer.cache
    source = torch.ones(timer.copied // 4, device=timer.device)
    target = torch.empty_like(source)
    for number, group in enumerate(groups):
        report_progress(f"{chosen.title}: making the optimizers", 0, 0)
        entries = []
        for candidate in group:
            entries.append(_Entry(candidate, values, gradients, timer))
            if stop():
                result.interrupted = True
                return result
        done = _rounds(
            chosen.title,
            [entry for entry in entries if entry.optimizer is not None],
            lambda: timer.milliseconds(lambda: target.copy_(source)),
            result.copy_times,
            repeats=repeats,
            budget=budget / len(groups),
            report_progress=report_progress,
            stop=stop,
        )
        for entry in entries:
            if done and entry.optimizer is not None:
                entry.measure_memory()
            measured = bool(entry.timings.times or entry.timings.unavailable)
            # the peer is in all groups; its times in the first are reported
            if measured and (number == 0 or entry.timings.name != PEER):
                result.taken.append(entry.timings)
        del entries, entry
        timer.release_memory()
        if not done:
            result.interrupted = True
            break
    order = [candidate.name for candidate in candidates]
    result.taken.sort(key=lambda timings: order.index(timings.name))
    return result


def _rounds(
    title: str,
    entries: list[_Entry],
    copy: Callable[[], float],
    copy_times: list[float],
    *,
    repeats: int,
    budget: float,
    report_progress: ProgressCallback,
    stop: Callable[[], bool],
) -> bool:
    """Step the entries for several rounds; return False if ``stop`` ended it.

    A round that is not complete does not count.
    """
    peer = next(entry for entry in entries if entry.timings.name == PEER)
    start = time.perf_counter()
    for done in range(repeats):
        if done >= FEWEST and time.perf_counter() - start > budget:
            break
        report_progress(title, done, repeats)
        part = [e for e in entries if done < FEWEST or e.milliseconds <= _SLOW * peer.milliseconds]
        first = done % len(part)
        times: dict[str, float] = {}
        for entry in part[first:] + part[:first]:
            times[entry.timings.name] = entry.step()
            if stop():
                return False
        copy_times.append(copy())
        for entry in part:
            entry.timings.times.append(times[entry.timings.name])
            entry.timings.peer.append(times[PEER])
    return True


def fit_into_memory(
    chosen: ParameterSet,
    candidates: list[Candidate],
    dtype: torch.dtype,
    timer: CpuTimer = CPU_TIMER,
) -> tuple[ParameterSet, list[list[Candidate]]]:
    """Return the largest part of the set that two optimizers fit with, and groups that fit.

    Each group has the reference. With enough memory the part is the whole set.

    Raises:
        ExperimentError: not even the smallest part fits.
    """
    available = timer.available()
    if available is None:
        return chosen, [candidates]
    while True:
        parameters = numel(chosen.shapes())
        # each optimizer: parameters and two states of at least 4 bytes; shared: values, gradients
        each = parameters * (dtype.itemsize + 2 * max(4, dtype.itemsize))
        shared = parameters * 2 * max(4, dtype.itemsize) + 2 * timer.copied
        fit = int((_SHARE_OF_MEMORY * available - shared) // each)
        if fit >= 2:
            break
        smaller = chosen.smaller()
        if smaller is None:
            raise ExperimentError(
                f"{chosen.title}: two optimizers need {(shared + 2 * each) / 1e9:.2g} GB, "
                f"{available / 1e9:.2g} GB are free"
            )
        chosen = smaller
    if fit >= len(candidates):
        return chosen, [candidates]
    peer = [candidate for candidate in candidates if candidate.name == PEER]
    others = [candidate for candidate in candidates if candidate.name != PEER]
    return chosen, [peer + others[i : i + fit - 1] for i in range(0, len(others), fit - 1)]
