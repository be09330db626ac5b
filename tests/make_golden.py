"""Writes golden.json: trajectories of the NumPy reference from literal inputs.

Run ``python -m tests.make_golden`` to make it again, only after a change of the mathematics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.numpy_reference import ReferenceApollo, Settings

PATH = Path(__file__).with_name("golden.json")
STEPS = 12

THETA = [1.5, -0.75, 0.25, 2.0, -3.0, 0.125]
GRADIENTS = [
    [2.0, -1.0, 0.5, 3.0, -1.5, 0.25],
    [1.5, -1.25, -0.5, 2.0, -2.0, 0.75],
    [-1.0, 0.5, 1.5, 1.0, -1.0, -0.25],
    [0.75, -2.5, 1.0, -0.5, 3.5, 1.25],
]

CASES: dict[str, dict[str, Any]] = {
    "the paper's": {"lr": 0.5, "warmup_steps": 4, "warmup_init_lr": 0.01},
    "defaults": {},
    "sigma 0.01": {"lr": 0.005, "sigma": 0.01, "warmup_steps": 4, "warmup_init_lr": 1e-4},
    "L2": {"lr": 0.5, "weight_decay": 0.1, "warmup_steps": 0},
    "decoupled": {
        "lr": 0.5,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "warmup_steps": 0,
    },
    "belief": {"lr": 0.1, "rebound": "belief", "warmup_steps": 3},
    "belief decoupled": {
        "lr": 0.1,
        "rebound": "belief",
        "eps": 0.01,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "warmup_steps": 3,
    },
    "maximize": {"lr": 0.25, "beta": 0.5, "eps": 0.0, "maximize": True, "warmup_steps": 0},
}


def gradient(t: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the four gradients in turn, rotated by one element per cycle."""
    return np.roll(np.array(GRADIENTS[t % 4]), t // 4)


def main() -> None:
    result = {}
    for name, values in CASES.items():
        reference = ReferenceApollo(np.array(THETA), Settings(**values))
        path = []
        for t in range(STEPS):
            reference.step(gradient(t))
            path.append(reference.theta.tolist())
        result[name] = {
            "settings": values,
            "theta": path,
            "exp_avg": reference.m.tolist(),
            "hessian_diag": reference.B.tolist(),
        }
    PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
