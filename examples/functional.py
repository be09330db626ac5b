"""torch.func with the functional form of Apollo: gradients by torch.func, an ensemble by vmap.

    pip install . ./bench
    python examples/functional.py

The caller owns the state. Apollo's sums run over each tensor. The weights of an ensemble are
stacked, so each model's part must become a tensor of its own: ``unbind`` gives views, which are
updated in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import apollo

MODELS = 3


def main() -> None:
    """Train, and print how the loss fell."""
    torch.manual_seed(0)
    images = fashion_mnist.load()
    inputs, labels = images.train_images.float() / 255, images.train_labels
    models = [
        nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
        for _ in range(MODELS)
    ]
    stacked, buffers = stack_module_state(models)  # each tensor has a first dimension of MODELS

    def loss_of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(models[0], (weights, buffers), (x,)), y)

    gradients_of = vmap(grad_and_value(loss_of), in_dims=(0, None, None))

    stacked = {name: tensor.detach() for name, tensor in stacked.items()}
    params = [part for tensor in stacked.values() for part in tensor.unbind()]
    exp_avgs = [torch.zeros_like(p) for p in params]
    hessian_diags = [torch.zeros_like(p) for p in params]
    steps = [torch.zeros(()) for _ in params]

    losses = []
    for batch in torch.randperm(len(inputs)).split(64)[:60]:
        stacked_gradients, loss = gradients_of(stacked, inputs[batch], labels[batch])
        grads = [part for name in stacked for part in stacked_gradients[name].unbind()]
        apollo(params, grads, exp_avgs, hessian_diags, steps, lr=0.5, warmup_steps=10)
        losses.append(loss.mean().item())
    first, last = (sum(part) / 5 for part in (losses[:5], losses[-5:]))
    print(f"loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
