"""The norm of the gradient, and where it is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from apollo_bench.training.gradient_norm import gradient_norm
from apollo_bench.training.loop import train
from bench.tests.conftest import TINY
from bench.tests.helpers import prepared, spec_of


def test_the_norm_is_over_all_tensors() -> None:
    network = nn.Linear(2, 3)
    network.weight.grad = torch.full((3, 2), 2.0)
    assert float(gradient_norm(network)) == pytest.approx(24**0.5)  # one parameter has no gradient
    network.bias.grad = torch.ones(3)
    assert float(gradient_norm(network)) == pytest.approx(27**0.5)


def test_every_logged_step_has_the_norm_before_clipping(recipe_file: Path, tmp_path: Path) -> None:
    found = []
    for line in ("", "clip_norm = 1e9"):
        text = TINY.replace("[train]", f"[train]\n{line}").replace("epochs = 2", "epochs = 1")
        recipe_file.write_text(text)
        directory, task = prepared(tmp_path / f"run{line[:4]}", spec_of(recipe_file, "sgd"))
        train(directory, spec_of(recipe_file, "sgd"), task)
        steps = [record for record in directory.records() if record["kind"] == "step"]
        assert [record["step"] for record in steps] == [5, 10, 12]
        found.append([record["gradient_norm"] for record in steps])
    assert all(norm > 0 for norm in found[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
