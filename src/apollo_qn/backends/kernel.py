"""``kernel.c`` as Python functions: where it lies, how it is called, whose threads it uses."""

from __future__ import annotations

import ctypes
import os
from array import array
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from apollo_qn.backends import memory

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class Table(ctypes.Structure):
    """The kernel's ``table``: columns with an entry for each tensor."""

    _fields_ = [
        ("count", _NUMBER),
        *((name, _POINTER) for name in ("p", "g", "m", "B", "step", "previous_lr", "threshold")),
        *((name, _POINTER) for name in ("low", "n", "kind", "which", "stream")),
        *((name, _POINTER) for name in ("scalars", "shared")),
    ]


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel's functions; ``kernel.c`` says what each does.

    ``describe`` is DLPack's function that describes a tensor; None where torch has none (before
    2.10).
    """

    step: Any
    numbers: Any
    record: Any
    overlap: Any
    look: Any
    describe: int | None
    openmp: tuple[int | None, ...]


@cache
def load() -> Kernel | str:
    """The kernel, or why there is none."""
    found = find_spec("apollo_qn.backends._kernel")
    if found is None or found.origin is None:
        return (
            "the fused kernel was not compiled when apollo-qn was installed (reinstall it where a "
            "C compiler is at hand)"
        )
    try:
        library, holding_gil = ctypes.CDLL(found.origin), ctypes.PyDLL(found.origin)
    except OSError as error:
        return f"the fused kernel cannot be loaded ({error})"
    step, numbers = library.apollo_qn_step, library.apollo_qn_numbers
    record = library.apollo_qn_record
    record.argtypes, record.restype = [_NUMBER, *[_POINTER] * 4], None
    overlap, look = library.apollo_qn_overlap, holding_gil.apollo_qn_look
    step.argtypes, step.restype = [_POINTER, *[ctypes.c_int] * 2, *[_POINTER] * 3], ctypes.c_int
    numbers.argtypes, numbers.restype = [_NUMBER, *[_POINTER] * 7], _NUMBER
    overlap.argtypes, overlap.restype = [*[_POINTER] * 3, _NUMBER], _NUMBER
    look.argtypes = [_POINTER, _NUMBER, _POINTER, _NUMBER, *[_POINTER] * 4, _NUMBER]
    look.restype = _NUMBER
    return Kernel(step, numbers, record, overlap, look, _describe(), _openmp())


def available() -> bool:
    """Whether there is one."""
    return isinstance(load(), Kernel)


def loaded() -> Kernel:
    """The kernel.

    Raises:
        RuntimeError: there is none.
    """
    kernel = load()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    return kernel


def address(values: array[Any]) -> int:
    """Where an array's numbers lie."""
    where: int = values.buffer_info()[0]
    return where


def threads() -> tuple[int | None, ...]:
    """OpenMP's functions for ``step``; None for each: it starts threads of its own."""
    return (None, None, None) if _forked else loaded().openmp


def _openmp() -> tuple[int | None, ...]:
    """Functions of the GNU OpenMP that torch has loaded; None for each where it has another.

    Its threads are torch's own, so that no second pool competes for the cores.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    paths = dict.fromkeys(region.path for region in memory.regions() if "libgomp" in region.path)
    home = os.path.dirname(torch.__file__)
    # other packages bring one of their own; torch's lies with torch, or is the first to be loaded
    for path in sorted(paths, key=lambda path: not path.startswith(home)):
        try:
            library = ctypes.CDLL(path)
            return tuple(ctypes.cast(getattr(library, name), _POINTER).value for name in names)
        except (OSError, AttributeError):
            continue
    return None, None, None


class _Exchange(ctypes.Structure):
    """DLPack's ``DLPackExchangeAPI``, version 1 of its ABI."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("before", _POINTER),
        *((name, _POINTER) for name in ("allocate", "manage", "to_object", "describe", "stream")),
    ]


def _describe() -> int | None:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], _POINTER
    exchange = _Exchange.from_address(pointer(capsule, b"dlpack_exchange_api"))
    return exchange.describe if exchange.major == 1 else None


_forked = False


def _note_fork() -> None:
    # the child has none of its parent's threads: OpenMP would wait for them for ever
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
