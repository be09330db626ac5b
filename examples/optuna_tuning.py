"""Apollo's settings tuned by Optuna: the rate and the decay, on held-out images.

    pip install . ./bench optuna
    python examples/optuna_tuning.py

Only lr is searched, not sigma, because (lr, sigma) and (c lr, c sigma) give the same training
(Theorem 1 of the paper). Powers of ten on either side of 0.5 suit
convolutional networks, of 10 LSTMs and Transformers.
"""

from __future__ import annotations

import optuna
import torch
from torch import nn
from torch.nn import functional

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_qn import Apollo

STEPS, TRIALS = 40, 8

images = fashion_mnist.load()
inputs, labels = images.train_images.float() / 255, images.train_labels
held_out = slice(len(inputs) - 1000, len(inputs))


def held_out_loss(model: nn.Module) -> float:
    """Return the loss on images that no trial trains on."""
    with torch.no_grad():
        return functional.cross_entropy(model(inputs[held_out]), labels[held_out]).item()


def objective(trial: optuna.Trial) -> float:
    """Return the loss on held-out images after a short training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = Apollo(
        model.parameters(),
        lr=trial.suggest_float("lr", 0.01, 50, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-5, 1e-2, log=True),
        warmup_steps=4,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step, batch in enumerate(torch.randperm(held_out.start).split(64)[:STEPS]):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 9:
            trial.report(held_out_loss(model), step)
            if trial.should_prune():
                raise optuna.TrialPruned
    return held_out_loss(model)


def main() -> None:
    """Train, and print how the loss fell."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )
    study.enqueue_trial({"lr": 0.005, "weight_decay": 1e-4})  # a rate for Adam, to be beaten
    study.optimize(objective, TRIALS)
    first = study.trials[0].value
    assert first is not None
    print(f"best {study.best_params} of {len(study.trials)} trials")
    print(f"loss {first:.3f} -> {study.best_value:.3f}")


if __name__ == "__main__":
    main()
