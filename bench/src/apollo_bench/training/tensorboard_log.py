"""What TensorBoard shows of a run."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def events(folder: Path, step: int) -> SummaryWriter:
    """A writer that goes on after ``step``; what was written of later steps is shown no more."""
    after = step + 1 if step else None
    return SummaryWriter(str(folder), purge_step=after)
