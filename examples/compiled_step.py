"""A compiled training step: forward, backward and Apollo's step in one function.

    pip install . ./bench
    python examples/compiled_step.py [--backend inductor]

In eager mode Apollo's fused kernel updates CPU tensors. Under torch.compile the plain algorithm is
traced, and the compiler fuses it. With ``capturable=True`` and a tensor as lr, the number of
the step and the rate are tensors, so that a change of them does not compile the step again.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import Apollo


def main() -> None:
    """Train, and print how the loss fell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    backend = parser.parse_args().backend

    torch.manual_seed(0)
    images = fashion_mnist.load()
    inputs, labels = images.train_images.float() / 255, images.train_labels
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = Apollo(model.parameters(), lr=torch.tensor(0.5), warmup_steps=10, capturable=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)

    @torch.compile(backend=backend)
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = []
    for batch in torch.randperm(len(inputs)).split(64)[:60]:
        losses.append(float(step(inputs[batch], labels[batch])))
        scheduler.step()
    first, last = (sum(part) / 5 for part in (losses[:5], losses[-5:]))
    print(f"loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
