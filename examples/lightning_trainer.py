"""Apollo in Lightning's Trainer: a small convolutional network on Fashion-MNIST.

pip install . ./bench
python examples/lightning_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import Apollo

STEPS = 60


class Network(LightningModule):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 10),
        )
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        loss = functional.cross_entropy(self.layers(images), labels)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the rate of the step that follows, with Apollo's warmup."""
        self.log("lr", optimizer.effective_lrs()[0])

    def configure_optimizers(self) -> Any:
        """Return Apollo, and a schedule that advances at each step."""
        optimizer = Apollo(self.parameters(), lr=0.5, weight_decay=5e-4, warmup_steps=10)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main() -> None:
    """Train, and print how the loss fell."""
    seed_everything(0, verbose=False)
    images = fashion_mnist.load()
    data = TensorDataset(images.train_images[:4000].float() / 255, images.train_labels[:4000])
    network = Network()
    trainer = Trainer(
        max_steps=STEPS,
        gradient_clip_val=1.0,
        accumulate_grad_batches=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, DataLoader(data, batch_size=64, shuffle=True))
    first, last = (sum(part) / 5 for part in (network.losses[:5], network.losses[-5:]))
    print(f"loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
