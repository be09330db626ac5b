"""Read IDX files by hand, which spares a dependency and lets errors name the damaged file.

The format of MNIST and its kin: big-endian header, then unsigned bytes; gzip around it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.gzip_files import open_binary

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int, remedy: str) -> Tensor:
    """Read one gzipped IDX file of unsigned bytes.

    Args:
        path: the file.
        dimensions: number of dimensions of the array: 3 for images, 1 for labels.
        remedy: what the user should do about a bad file; the message ends with it.

    Returns:
        A uint8 tensor, shape as the header says: (count, height, width) or (count,).

    Raises:
        ExperimentError: the file is missing, truncated, corrupt or of another format.
    """
    with open_binary(path, remedy, plain=False) as file:
        content = file.read()
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
