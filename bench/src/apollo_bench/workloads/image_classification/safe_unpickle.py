"""Unpickle arrays by hand, because ``pickle.load`` runs any code that a file names."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy

# NumPy moved this function between modules; older pickles name the older module
_RECONSTRUCT = numpy.empty(0).__reduce__()[0]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"a string in the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): numpy.dtype,
    ("numpy", "ndarray"): numpy.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes in protocol 2
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def unpickle_arrays(content: bytes) -> Any:
    """Rebuild plain values and NumPy arrays, also of Python 2's pickles, and nothing else.

    Raises:
        Exception: of almost any type for damaged content, as ``pickle`` does; ``UnpicklingError``
            if the pickle asks for anything but arrays.
    """
    return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
