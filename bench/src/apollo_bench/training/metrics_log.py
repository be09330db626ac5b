"""The records of a run while it trains: ``metrics.jsonl``, and their text for the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from apollo_bench.atomic_write import write_atomically
from apollo_bench.runs.run_directory import Record


class MetricsLog:
    """Writes metrics.jsonl from the text of a checkpoint on, whatever is left of the file.

    After a power cut the file may be shorter than at the checkpoint, or hold zero bytes. Records
    after the checkpoint will be written again. So the file is replaced by the checkpoint's text.

    Args:
        path: file of the records.
        text: records at the checkpoint, one line each; "" without a checkpoint.
    """

    def __init__(self, path: Path, text: str) -> None:
        write_atomically(path, text.encode())
        self._lines = [text]
        self._file = path.open("ab")

    @property
    def text(self) -> str:
        """All records so far, for the checkpoint."""
        return "".join(self._lines)

    def write(self, record: Record) -> None:
        """Append a record."""
        line = json.dumps(record, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        self._lines.append(line)

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
