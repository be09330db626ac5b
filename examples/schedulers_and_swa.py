"""A schedule, then averaged weights: torch.optim.lr_scheduler and torch.optim.swa_utils.

    pip install . ./bench
    python examples/schedulers_and_swa.py

Apollo's warmup multiplies what the scheduler sets, so the schedule has no warmup of its own. All
rates are Apollo's: choose swa_lr as a fraction of lr.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import Apollo

STEPS, AVERAGE_FROM = 100, 60


def main() -> None:
    """Train, and print how the loss fell."""
    torch.manual_seed(0)
    images = fashion_mnist.load()
    inputs, labels = images.train_images.float() / 255, images.train_labels
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 14 * 14, 10),
    )
    optimizer = Apollo(model.parameters(), lr=0.5, weight_decay=5e-4, warmup_steps=10)
    cosine = CosineAnnealingLR(optimizer, AVERAGE_FROM, eta_min=0.1)
    constant = SWALR(optimizer, swa_lr=0.1, anneal_epochs=5)
    averaged = AveragedModel(model)  # multi_avg_fn=get_ema_multi_avg_fn(0.999) for a moving average

    losses = []
    batches = torch.randperm(len(inputs)).split(64)
    for step, batch in enumerate(batches[:STEPS]):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        if step < AVERAGE_FROM:
            cosine.step()
        else:
            averaged.update_parameters(model)
            constant.step()
        losses.append(loss.item())
    update_bn((inputs[batch] for batch in batches), averaged)

    averaged.eval()
    with torch.no_grad():
        outputs = averaged(images.test_images.float() / 255)
        accuracy = (outputs.argmax(1) == images.test_labels).double().mean().item()
    first, last = (sum(part) / 5 for part in (losses[:5], losses[-5:]))
    print(f"loss {first:.3f} -> {last:.3f}; test accuracy of the average {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
