"""Rates of the docs: tables of benchmarks/learning_rates.py, and clipping with LoRA."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from apollo_qn import Apollo

pytest.importorskip("apollo_bench")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("small_tasks", "learning_rates"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import learning_rates

    return learning_rates


def test_the_tables_are_those_of_the_committed_runs(script: ModuleType, tmp_path: Path) -> None:
    runs = script.Runs(RESULTS / "learning_rates.json", limit=0.0)
    tables = {
        "finetuning": [script.losses_by_rate, script.beside_adamw],
        "choosing": [script.range_tests],
    }
    tasks = script.small_tasks.tasks(tmp_path)
    text = (RESULTS / "learning_rates.md").read_text(encoding="utf-8")
    assert script.report(runs, tasks).splitlines()[5:] == text.splitlines()[5:]
    for page, makers in tables.items():
        shown = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for make in makers:
            more = [script.OTHERWISE_CLIPPED] if make is script.losses_by_rate else []
            assert make(runs, tasks, *more) in shown, (page, make.__name__)
    assert not runs.missing
    assert not list(tmp_path.iterdir())  # nothing was trained


def test_every_proposal_is_within_a_factor_of_2() -> None:
    results = json.loads((RESULTS / "learning_rates.json").read_text())
    proposals = {key.split()[0]: x[0] for key, x in results.items() if key.endswith("range test")}
    assert len(proposals) == 6
    for name, proposal in proposals.items():
        losses: dict[float, float] = {}
        clip = "None" if name in ("cnn", "mlp") else "1.0"
        for key, loss in results.items():
            words = key.split()
            if words[:2] == [name, "apollo"] and f"clip={clip}" in words:
                rate = float(words[2].removeprefix("lr="))
                losses[rate] = losses.get(rate, 0.0) + loss
        grid = [rate for rate in losses if math.log2(rate).is_integer()]
        best = min(grid, key=losses.__getitem__)
        assert max(best / proposal, proposal / best) <= 2.0, name


def test_a_run_that_is_missing_is_made_once_and_kept(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    for limit, wanted in ((0.0, None), (60.0, 1.5), (0.0, 1.5)):
        runs = script.Runs(file, limit)
        assert runs.get(("a", 1), lambda: 1.5) == wanted
        assert runs.missing == (wanted is None)


class LoRA(torch.nn.Module):
    """A linear layer whose weights are fixed, and a trained update of rank 4."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        self.a = torch.nn.Parameter(torch.randn(4, inputs) / inputs**0.5)
        self.b = torch.nn.Parameter(torch.zeros(outputs, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize(("lr", "clip"), [(5.0, True), (10.0, True), (10.0, False)])
def test_lora_of_an_mlp_trains_at_5_if_the_gradient_is_clipped(lr: float, clip: bool) -> None:
    """The cells of the table in docs/finetuning.md, with its first seed."""
    torch.manual_seed(0)
    gelu = torch.nn.GELU()
    model = torch.nn.Sequential(LoRA(32, 64), gelu, LoRA(64, 64), gelu, LoRA(64, 5))
    x = torch.randn(1024, 32)
    y = (x @ torch.randn(32, 5)).argmax(1)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = Apollo(params, lr=lr, warmup_steps=30)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    loss = torch.zeros(())
    for step in range(300):
        optimizer.zero_grad()
        inputs, labels = batches[step % len(batches)]
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()
    if not clip:
        assert math.isnan(loss.item())
    elif lr == 5.0:
        assert loss.item() < 0.1
    else:
        assert loss.item() > 1.5
