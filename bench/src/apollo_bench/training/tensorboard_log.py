"""The TensorBoard events of a run."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from apollo_bench.runs.run_directory import Record


def make_event_writer(folder: Path, step: int) -> SummaryWriter:
    """Return a writer that continues after ``step``; events of later steps are hidden.

    Args:
        folder: folder of the events.
        step: step of the checkpoint that the run continues from; 0 for a new run.
    """
    after = step + 1 if step else None
    return SummaryWriter(str(folder), purge_step=after)


def add_record(events: SummaryWriter, record: Record) -> None:
    """Add the measured numbers of a record, with tags such as "evaluation/accuracy"."""
    for name, value in record.items():
        if isinstance(value, float) and name != "epoch":
            events.add_scalar(f"{record['kind']}/{name}", value, record["step"])
