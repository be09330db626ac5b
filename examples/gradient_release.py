"""Steps in the backward pass: gradients are never all in memory, and results are the same.

    pip install . ./bench
    python examples/gradient_release.py

The training loop does not change. Clipping over the model, GradScaler and several processes raise
an error. ``python benchmarks/gradient_release.py`` measures the memory.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import Apollo, GradientRelease

MICRO = 2  # batches per step


def main() -> None:
    """Train, and print how the loss fell."""
    torch.manual_seed(0)
    images = fashion_mnist.load()
    inputs, labels = images.train_images.float() / 255, images.train_labels
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=10)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    release = GradientRelease(optimizer)

    losses = []
    for batch in torch.randperm(len(inputs)).split(64)[:60]:
        micro = batch.chunk(MICRO)
        for i, part in enumerate(micro):
            with release.accumulate(i < MICRO - 1):  # all passes but the last only add up
                loss = functional.cross_entropy(model(inputs[part]), labels[part]) / MICRO
                loss.backward()
        optimizer.step()  # ends the step
        scheduler.step()
        optimizer.zero_grad()
        losses.append(MICRO * loss.item())
    release.remove()
    first, last = (sum(part) / 5 for part in (losses[:5], losses[-5:]))
    print(f"loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
