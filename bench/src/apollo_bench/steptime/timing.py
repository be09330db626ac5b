"""Timers of the CPU and of GPUs: time, memory, and cache flushes between steps."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from subprocess import SubprocessError, run
from typing import Any

import torch
from torch import Tensor

from apollo_bench.errors import ExperimentError

Step = Callable[[], object]


class CpuTimer:
    """The CPU and its memory."""

    device = torch.device("cpu")
    copied = 64 << 20  # bytes of the tensor whose copying measures the bandwidth
    cache = 0  # bytes of the last cache; 0: unknown

    def milliseconds(self, work: Step) -> float:
        """Return how long the work takes."""
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def available(self) -> int | None:
        """Return the free memory in bytes; None if the system does not report it."""
        return _kilobytes("/proc/meminfo", "MemAvailable")

    def growth(self, work: Step) -> int | None:
        """Return the largest growth of memory during the work, in bytes; None if it is not known.

        Memory that the allocator keeps is returned first, because it would hide new allocations.
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

    def release_memory(self) -> None:
        """Return unused memory to the system."""
        gc.collect()

    def about(self) -> dict[str, Any]:
        """Return a description of the device for the record; ``title`` is one line."""
        return {}


class GpuTimer(CpuTimer):
    """A CUDA (or ROCm) device.

    A step begins on an idle device with cold caches. It ends with its last kernel, as events on the
    device measure. Launch time counts if it exceeds kernel time, as in a training
    loop that is bound by launches.
    """

    copied = 1 << 30

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._properties = torch.cuda.get_device_properties(self.device)
        self.cache = int(getattr(self._properties, "L2_cache_size", 0)) or 40 << 20

    @cached_property
    def _cache_flush(self) -> Tensor:
        return torch.empty(2 * self.cache // 4, device=self.device)

    def milliseconds(self, work: Step) -> float:
        """Return how long the device takes, launches included."""
        event = partial(torch.cuda.Event, enable_timing=True)
        start, end = event(), event()
        self._cache_flush.zero_()
        torch.cuda.synchronize(self.device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def available(self) -> int | None:
        """Return the device memory in bytes that is free or kept by the allocator."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + kept

    def growth(self, work: Step) -> int | None:
        """Return the largest growth of tensors on the device during the work, in bytes."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.memory_stats(self.device)["allocated_bytes.all.peak"]
        return max(int(peak) - before, 0)

    def release_memory(self) -> None:
        """Return unused memory to the device."""
        gc.collect()
        torch.cuda.empty_cache()

    def about(self) -> dict[str, Any]:
        """Return card, driver and versions; ``title`` is one line."""
        driver = _driver()
        version = torch.version.cuda or torch.version.hip
        found = {
            "gpu": self._properties.name,
            "gpu_memory": self._properties.total_memory,
            "multiprocessors": self._properties.multi_processor_count,
            "L2": self.cache,
            "driver": driver,
            "cuda": version,
            "triton": _triton(),
        }
        title = f"{found['gpu']}, driver {driver}, CUDA {version}, Triton {found['triton']}"
        return {"title": title, **found}


CPU_TIMER = CpuTimer()


def timer_for(name: str) -> CpuTimer:
    """Return the timer of a device, which becomes the current device.

    Raises:
        ExperimentError: unknown device, or this machine has none.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ExperimentError(f"--device is {name!r}, allowed are cpu, cuda, cuda:1 and so on")
    if kind == "cpu":
        return CPU_TIMER
    if torch.cuda.device_count() <= int(number or 0):
        raise ExperimentError(
            f"--device is {name!r}, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs here"
        )
    index = int(number) if number else torch.cuda.current_device()
    device = torch.device("cuda", index)  # set_device refuses a device without an index
    torch.cuda.set_device(device)
    return GpuTimer(device)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        stdout = run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, SubprocessError):
        return None
    return stdout.split()[0] if stdout.split() else None


def _triton() -> str | None:
    for name in ("triton", "pytorch-triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _kilobytes(path: str, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found.group(1)) * 1024
