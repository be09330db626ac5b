"""Read IDX files by hand, which spares a dependency and lets errors name the damaged file.

The format of MNIST and its kin: big-endian header, then unsigned bytes; gzip around it.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from apollo_bench.errors import ExperimentError
from apollo_bench.regular_files import open_regular
from apollo_bench.workloads.gzip_files import unpack

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int, remedy: str) -> Tensor:
    """Read one gzipped IDX file of unsigned bytes.

    Args:
        path: the file.
        dimensions: how many the array must have: 3 for images, 1 for labels.
        remedy: what the user should do about a bad file; ends the error message.

    Returns:
        A uint8 tensor, shape as the header says: (count, height, width) or (count,).

    Raises:
        ExperimentError: the file is missing, truncated, corrupt or of another format.
    """
    try:
        with open_regular(path) as file:
            content = unpack(file).read()
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file; {remedy}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(f"{path}: not a whole gzip file ({error}); {remedy}") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise ExperimentError(
            f"{path}: not an IDX file of {dimensions}-dimensional unsigned bytes; {remedy}"
        )
    shape = [
        int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big", signed=False)
        for i in range(dimensions)
    ]
    expected = 1
    for size in shape:
        expected *= size
    if len(content) - header != expected or expected == 0:
        raise ExperimentError(
            f"{path}: the header promises {expected} values of shape {tuple(shape)}, "
            f"there are {len(content) - header}; {remedy}"
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
    return values.reshape(shape).clone()
