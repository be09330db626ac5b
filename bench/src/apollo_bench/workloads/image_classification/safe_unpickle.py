"""Unpickle arrays by hand, because ``pickle.load`` runs any code that a file names.

NumPy's own classes are not handed to the pickle either: ``numpy.ndarray`` makes an array of Python
objects from addresses in the file.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy

_NUMBERS = "buif"  # kinds of dtypes that hold numbers and nothing else


class _Latin1:
    """A stand-in for ``_codecs.encode``, with which Python 3 writes bytes in protocol 2."""

    __slots__ = ()  # the pickle cannot set attributes

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"a string in the encoding {encoding!r}")
        return text.encode("latin1")


class _NumberType:
    """A stand-in for ``numpy.dtype`` while the pickle is read."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, align: int = 0, copy: int = 0) -> None:
        # other arguments than text describe records, which may have objects in them
        if not isinstance(code, str) or numpy.dtype(code).kind not in _NUMBERS:
            raise pickle.UnpicklingError(f"it asks for an array of {code!r}, not of numbers")
        self.dtype = numpy.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # version, byte order, and what only records have
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array(numpy.ndarray[Any, Any]):
    """An array of numbers, which is empty until the pickle sets its state."""

    def __new__(cls, base: None, shape: tuple[int, ...], code: bytes) -> _Array:
        return super().__new__(cls, 0, numpy.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if isinstance(content, str):  # of Python 2
            content = content.encode("latin1")
        if (
            not isinstance(kind, _NumberType)
            or not isinstance(content, bytes)
            or any(size < 0 for size in shape)
            or math.prod(shape) * kind.dtype.itemsize != len(content)
        ):
            raise pickle.UnpicklingError("it holds an array without the bytes of its numbers")
        super().__setstate__((1, shape, kind.dtype, is_fortran, content))


# NumPy moved this function between modules; older pickles name the older module
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _NumberType,
    ("numpy", "ndarray"): None,  # only named, as the first argument of _reconstruct
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _Latin1(),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def unpickle_arrays(content: bytes) -> Any:
    """Rebuild plain values and arrays of numbers, also of Python 2's pickles, and nothing else.

    Raises:
        Exception: of almost any type for damaged content, as ``pickle`` does; ``UnpicklingError``
            if the pickle asks for anything but arrays of numbers.
    """
    return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
