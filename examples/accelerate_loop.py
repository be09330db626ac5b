"""Apollo in a loop of Hugging Face Accelerate, with accumulation and clipping.

    pip install . ./bench accelerate
    python examples/accelerate_loop.py      # or: accelerate launch examples/accelerate_loop.py

With accumulation Apollo's warmup counts updates, not batches.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import Apollo


def main() -> None:
    """Train, and print how the loss fell."""
    set_seed(0)
    images = fashion_mnist.load()
    data = TensorDataset(images.train_images[:6000].float() / 255, images.train_labels[:6000])
    accelerator = Accelerator(gradient_accumulation_steps=2)

    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=10)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    losses = []
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    first, last = (sum(part) / 10 for part in (losses[:10], losses[-10:]))
    accelerator.print(f"loss {first:.3f} -> {last:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
