"""Steps of many optimizers on one set of parameters, taken in turn in one process."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from apollo_qn.experiments.bench.contenders import PEER, RULE, Contender
from apollo_qn.experiments.bench.parameter_sets import ParameterSet, numel
from apollo_qn.experiments.errors import ExperimentError

COPY = "copy"
WARM_UP = 3  # steps before the first that counts
FEWEST = 5  # rounds, whatever they take
_WORDS = 3  # that every optimizer moves: the gradient, and the parameter twice
_SLOW = 8  # times the peer's step: such a contender takes part in FEWEST rounds only
_COPIED = 64 << 20  # bytes of the tensor whose copying measures the bandwidth
_SHARE_OF_MEMORY = 0.7  # of what is free, that may be used at once


@dataclass
class Taken:
    """What was measured of one contender on one set; times in milliseconds.

    ``peer`` has the peer's time in the same rounds. ``state_bytes`` are of all tensors of the
    state together, ``peak_bytes`` what one step made the process grow by, None where the system
    does not tell. ``unavailable`` says why nothing was measured.
    """

    name: str
    family: str
    words: int
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
        """Median of the ratios to the peer's step of the same round."""
        return statistics.median(a / b for a, b in zip(self.times, self.peer, strict=True))


@dataclass
class Result:
    """All contenders on one set."""

    name: str
    title: str
    tensors: int
    parameters: int
    element_bytes: int
    copy_times: list[float]
    taken: list[Taken]
    interrupted: bool = False

    @property
    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a large copy."""
        return 2 * _COPIED / (statistics.median(self.copy_times) / 1e3)

    def bandwidth(self, taken: Taken) -> float:
        """Bytes a second that a contender moved, if it moved no more than it must.

        That is gradient and parameter read, the parameter written, all of the state both.
        """
        moved = _WORDS * self.parameters * self.element_bytes
        if taken.state_bytes is None:
            moved += (taken.words - _WORDS) * self.parameters * self.element_bytes
        else:
            moved += 2 * taken.state_bytes
        return moved / (taken.milliseconds / 1e3)

    def faster_than_rule(self, taken: Taken) -> float | None:
        """How many times faster than a Python loop of the rule; None: that was not measured."""
        rule = next((t for t in self.taken if t.name == RULE and t.times), None)
        return None if rule is None else rule.milliseconds / taken.milliseconds

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Entry:
    """A contender with parameters of its own and the gradients of all."""

    def __init__(self, contender: Contender, values: list[Tensor], gradients: list[Tensor]) -> None:
        self.taken = Taken(contender.name, contender.family, contender.words)
        self.optimizer: Optimizer | None = None
        params = [nn.Parameter(value.clone()) for value in values]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        try:
            self.optimizer = contender.make(params)
            for _ in range(WARM_UP):
                self.seconds = self._step()
        except (RuntimeError, ValueError, ImportError) as error:
            self.optimizer = None
            self.taken.unavailable = str(error).splitlines()[0]

    def _step(self) -> float:
        assert self.optimizer is not None
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def step(self) -> float:
        """Milliseconds of a step."""
        return 1e3 * self._step()

    def weigh(self) -> None:
        """Measure the memory."""
        assert self.optimizer is not None
        self.taken.state_bytes = sum(
            x.numel() * x.element_size()
            for state in self.optimizer.state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        )
        self.taken.peak_bytes = _growth(self._step)


def measure(
    chosen: ParameterSet,
    contenders: list[Contender],
    *,
    repeats: int,
    budget: float,
    dtype: torch.dtype,
    seed: int,
    tell: Callable[[str, int, int], None],
    stop: Callable[[], bool],
) -> Result:
    """Step all contenders in turn, round after round, each round from another one on.

    A contender that takes more than 8 times as long as the peer takes part in 5 rounds only. Where
    not all fit into memory at once they come in several lots, each with the peer.

    Args:
        chosen: the shapes; a part of them where the whole does not fit into memory.
        contenders: the peer among them.
        repeats: rounds at most.
        budget: seconds after which no round is begun, but for the first 5.
        dtype: of parameters and gradients.
        seed: of the random parameters and gradients.
        tell: is told what is going on, and how many rounds of how many are done.
        stop: is asked after each step; True ends the measurement with what there is.

    Raises:
        ExperimentError: not even two contenders fit into memory.
    """
    chosen, lots = fitting(chosen, contenders, dtype)
    shapes = chosen.shapes()
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator).mul_(0.05).to(dtype) for s in shapes]
    gradients = [torch.randn(s, generator=generator).mul_(0.01).to(dtype) for s in shapes]
    result = Result(chosen.name, chosen.title, len(shapes), numel(shapes), dtype.itemsize, [], [])
    source = torch.ones(_COPIED // 4)
    target = torch.empty_like(source)
    for number, lot in enumerate(lots):
        tell(f"{chosen.title}: making", 0, 0)
        entries = []
        for contender in lot:
            entries.append(_Entry(contender, values, gradients))
            if stop():
                result.interrupted = True
                return result
        done = _rounds(
            chosen.title,
            [entry for entry in entries if entry.optimizer is not None],
            lambda: target.copy_(source),
            result.copy_times,
            repeats=repeats,
            budget=budget / len(lots),
            tell=tell,
            stop=stop,
        )
        for entry in entries:
            if done and entry.optimizer is not None:
                entry.weigh()
            measured = bool(entry.taken.times or entry.taken.unavailable)
            # the peer is in all lots: its times of the first are its own
            if measured and (number == 0 or entry.taken.name != PEER):
                result.taken.append(entry.taken)
        del entries, entry
        gc.collect()
        if not done:
            result.interrupted = True
            break
    order = [contender.name for contender in contenders]
    result.taken.sort(key=lambda taken: order.index(taken.name))
    return result


def _rounds(
    title: str,
    entries: list[_Entry],
    copy: Callable[[], object],
    copy_times: list[float],
    *,
    repeats: int,
    budget: float,
    tell: Callable[[str, int, int], None],
    stop: Callable[[], bool],
) -> bool:
    """False: it was stopped; the round that was going on is not counted."""
    peer = next(entry for entry in entries if entry.taken.name == PEER)
    start = time.perf_counter()
    for done in range(repeats):
        if done >= FEWEST and time.perf_counter() - start > budget:
            break
        tell(title, done, repeats)
        part = [e for e in entries if done < FEWEST or e.seconds <= _SLOW * peer.seconds]
        first = done % len(part)
        times: dict[str, float] = {}
        for entry in part[first:] + part[:first]:
            times[entry.taken.name] = entry.step()
            if stop():
                return False
        before = time.perf_counter()
        copy()
        copy_times.append(1e3 * (time.perf_counter() - before))
        for entry in part:
            entry.taken.times.append(times[entry.taken.name])
            entry.taken.peer.append(times[PEER])
    return True


def fitting(
    chosen: ParameterSet, contenders: list[Contender], dtype: torch.dtype
) -> tuple[ParameterSet, list[list[Contender]]]:
    """The set, or the largest part of it of which two optimizers fit into memory, and lots that do.

    Raises:
        ExperimentError: not even the smallest part fits.
    """
    available = _available()
    if available is None:
        return chosen, [contenders]
    while True:
        parameters = numel(chosen.shapes())
        # parameter and two states of at least 4 bytes; the values and gradients that all share
        each = parameters * (dtype.itemsize + 2 * max(4, dtype.itemsize))
        shared = parameters * 2 * max(4, dtype.itemsize) + 2 * _COPIED
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
    if fit >= len(contenders):
        return chosen, [contenders]
    peer = [contender for contender in contenders if contender.name == PEER]
    others = [contender for contender in contenders if contender.name != PEER]
    return chosen, [peer + others[i : i + fit - 1] for i in range(0, len(others), fit - 1)]


def _available() -> int | None:
    """Bytes of memory that are free, or None where the system does not tell."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _growth(work: Callable[[], object]) -> int | None:
    """Bytes by which the process grows at most while it works; None where it is not Linux.

    What the allocator keeps from before is given back first, for it would hide what is asked for.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _kilobytes("/proc/self/status", "VmRSS")
    work()
    after = _kilobytes("/proc/self/status", "VmHWM")
    return None if before is None or after is None else max(after - before, 0)


def _kilobytes(path: str, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])
