"""Mixed precision: torch.autocast, and a torch.amp.GradScaler where gradients are float16.

    pip install . ./bench
    python examples/amp.py

If a gradient is infinite, the scaler skips the step, and Apollo's state and warmup do not change.
Apollo's state is float32 also for 16-bit parameters.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import Apollo


def main() -> None:
    """Train, and print how the loss fell."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    images = fashion_mnist.load()
    inputs, labels = images.train_images.to(device).float() / 255, images.train_labels.to(device)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=10)
    scaler = torch.amp.GradScaler(device)  # bfloat16 needs no scaler

    losses = []
    for batch in torch.randperm(len(inputs)).split(64)[:60]:
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before clipping, which needs the true norm
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    first, last = (sum(part) / 5 for part in (losses[:5], losses[-5:]))
    print(f"loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
