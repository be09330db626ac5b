"""Lightning's Trainer: saved and resumed, accumulation, clipping, gradient release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from apollo_qn import Apollo, GradientRelease
from tests.helpers import same, snapshot
from tests.integrations.data import images, loss_of, network

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.slow
ModelCheckpoint = lightning.callbacks.ModelCheckpoint

STEPS = 12


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, release: bool = False) -> None:
        super().__init__()
        self.layers = network()
        self.release = release

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        inputs, labels = batch
        return functional.cross_entropy(self.layers(inputs), labels)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.layers)
        if self.release:
            GradientRelease(optimizer)
        schedule = {"scheduler": schedule_of(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def optimizer_of(model: nn.Module) -> Apollo:
    return Apollo(model.parameters(), lr=0.5, warmup_steps=4, rebound="belief", weight_decay=1e-3)


def schedule_of(optimizer: Apollo) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def trained(module: Module, steps: int, resume: Path | None = None, **settings: Any) -> Any:
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **settings},
    )
    loader = DataLoader(TensorDataset(*images()), batch_size=32)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def test_it_is_the_plain_loop() -> None:
    trainer = trained(Module(), STEPS, gradient_clip_val=0.1)
    model = network()
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    assert same(snapshot(trainer.optimizers[0]), snapshot(optimizer))


class ByStep(Module):
    """Takes the batch of the step's number, because a resumed DataLoader starts again."""

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return loss_of(self.layers, self.trainer.global_step)


def test_saved_in_mid_run_and_resumed(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    whole = trained(ByStep(), STEPS, callbacks=[keep], enable_checkpointing=True)
    resumed = trained(ByStep(), STEPS, resume=tmp_path / "step=5.ckpt")
    assert resumed.global_step == STEPS
    assert same(snapshot(whole.optimizers[0]), snapshot(resumed.optimizers[0]))


def test_accumulation_counts_updates() -> None:
    trainer = trained(Module(), 4, accumulate_grad_batches=3)
    model = network()
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer)
    for t in range(12):
        (loss_of(model, t) / 3).backward()
        if t % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert same(snapshot(trainer.optimizers[0]), snapshot(optimizer))
    assert {float(s["step"]) for s in trainer.optimizers[0].state.values()} == {4.0}


def test_gradient_release() -> None:
    ordinary, released = trained(Module(), 6), trained(Module(release=True), 6)
    assert same(snapshot(ordinary.optimizers[0]), snapshot(released.optimizers[0]))
    with pytest.raises(RuntimeError, match=r"has been released.*clip_grad_norm_"):
        trained(Module(release=True), 6, gradient_clip_val=0.1)
    with pytest.raises(RuntimeError, match=r"under\s+release\.accumulate"):
        trained(Module(release=True), 6, accumulate_grad_batches=2)
