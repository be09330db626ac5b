"""Hugging Face Accelerate: accumulation, clipping, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from apollo_qn import Apollo, GradientRelease
from tests.helpers import same, snapshot
from tests.integrations.data import images, loss_of, network

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Reset Accelerate's state, which is shared by the process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def optimizer_of(model: nn.Module) -> Apollo:
    return Apollo(model.parameters(), lr=0.5, warmup_steps=3, weight_decay=1e-3)


class Training:
    """Prepared objects, and an epoch that continues where it was."""

    def __init__(self, release: bool = False, parts: int = 2) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model = network()
        optimizer = optimizer_of(model)
        self.release = GradientRelease(optimizer) if release else None
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        loader = DataLoader(TensorDataset(*images()), batch_size=32)
        prepared = self.accelerator.prepare(model, optimizer, schedule, loader)
        self.model, self.optimizer, self.schedule, self.loader = prepared

    def run(self, batches: range, clip: float | None = None) -> None:
        for t, (inputs, labels) in enumerate(self.loader):
            if t not in batches:
                continue
            with self.accelerator.accumulate(self.model):
                loss = functional.cross_entropy(self.model(inputs), labels)
                if self.release is None:
                    self.accelerator.backward(loss)
                else:
                    with self.release.accumulate(not self.accelerator.sync_gradients):
                        self.accelerator.backward(loss)
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()

    @property
    def inner(self) -> Any:
        return self.optimizer.optimizer


def test_accumulation_and_clipping_are_those_of_the_plain_loop() -> None:
    training = Training()
    training.run(range(12), clip=0.05)
    model = network()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for t in range(12):
        (loss_of(model, t) / 2).backward()
        if t % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert same(snapshot(training.inner), snapshot(optimizer))
    assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}


def test_saved_in_mid_run_and_resumed(tmp_path: Path) -> None:
    whole = Training()
    whole.run(range(6))
    whole.accelerator.save_state(str(tmp_path))
    whole.run(range(6, 12))
    resumed = Training()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(range(6, 12))
    assert same(snapshot(whole.inner), snapshot(resumed.inner))


def test_gradient_release() -> None:
    ordinary, released = Training(), Training(release=True)
    for training in (ordinary, released):
        training.run(range(12))
    assert same(snapshot(ordinary.inner), snapshot(released.inner))
    with pytest.raises(RuntimeError, match=r"has been released.*clip_grad_norm_"):
        released.run(range(2), clip=0.1)
