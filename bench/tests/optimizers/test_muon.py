"""Muon with AdamW: which of them updates which parameter, and steps equal to torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.errors import ExperimentError
from apollo_bench.optimizers.muon import MuonAndAdamW, as_matrix, split
from apollo_bench.training.loop import train
from apollo_bench.workloads.image_classification.resnet import resnet
from apollo_bench.workloads.language_modeling.lstm import LanguageModel
from apollo_bench.workloads.translation.transformer import Transformer
from bench.tests.conftest import TINY
from bench.tests.helpers import assert_identical, prepared, result, stop_after


def names(network: nn.Module) -> set[str]:
    """Return the names of the parameters that Muon updates."""
    by_muon = {id(p) for p in split(network)[0]}
    return {name for name, p in network.named_parameters() if id(p) in by_muon}


def test_muon_has_the_matrices_within() -> None:
    images = resnet(8, width=4)
    assert names(images) == {name for name, p in images.named_parameters() if p.dim() == 4}, (
        "not the classifier"
    )
    words = LanguageModel(100, 8, 16, 1, 0.0, [20], 2.0)
    assert names(words) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    translator = Transformer(50, 8, 16, 2, 1, padding=0, max_length=16)
    found = names(translator)
    assert "embedding.weight" not in found
    assert {translator.get_parameter(name).dim() for name in found} == {2}
    assert len(found) == 6 + 10  # an encoder's and a decoder's layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_filter_as_a_matrix_is_the_same_memory(layout: torch.memory_format) -> None:
    x = torch.randn(6, 3, 5, 5).to(memory_format=layout)
    view = as_matrix(x)
    assert view.shape == (6, 75)
    view.zero_()
    assert not x.any()


def test_a_gradient_follows_the_layout_of_its_filter() -> None:
    p = torch.randn(6, 3, 5, 5).to(memory_format=torch.channels_last)
    g = torch.randn(6, 3, 5, 5)
    assert torch.equal(as_matrix(g, p), as_matrix(g.to(memory_format=torch.channels_last)))
    assert not torch.equal(as_matrix(g, p), as_matrix(g))


def network(layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 12))
    made.output = "2"  # type: ignore[assignment]
    return made.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


def steps(made: nn.Module, optimizers: list[torch.optim.Optimizer], count: int) -> None:
    for seed in range(count):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.zero_grad()
        made.zero_grad()
        made(images).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_muons_and_adamws(layout: torch.memory_format) -> None:
    ours, theirs = network(layout), network()
    steps(ours, [MuonAndAdamW(ours, 0.01, 0.1)], 3)

    # torch's Muon takes matrices only, so a filter is reshaped before
    filters = theirs[0].weight  # type: ignore[index]
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    muon = torch.optim.Muon([matrix], 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in theirs.parameters() if p is not filters]
    adamw = torch.optim.AdamW(rest, 0.01, weight_decay=0.1)

    class Outside(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            assert filters.grad is not None
            matrix.grad = filters.grad.flatten(1)
            muon.step()
            filters.data.copy_(matrix.data.view_as(filters))

    steps(theirs, [adamw, Outside([filters], 0.1)], 3)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_rate_of_a_schedule_reaches_both() -> None:
    made = network()
    before = [p.detach().clone() for p in made.parameters()]
    optimizer = MuonAndAdamW(made, 0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    steps(made, [optimizer], 1)
    for old, p in zip(before, made.parameters(), strict=True):
        assert torch.equal(old, p)


def test_a_loaded_state_continues_exactly() -> None:
    whole, pieces = network(), network()
    steps(whole, [MuonAndAdamW(whole, 0.01)], 2)
    first = MuonAndAdamW(pieces, 0.01)
    steps(pieces, [first], 1)
    second = MuonAndAdamW(pieces, 0.5)
    second.load_state_dict(first.state_dict())
    for seed in (1,):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        pieces.zero_grad()
        pieces(images).square().mean().backward()
        second.step()
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["muon", "nadamw"])
def test_a_run_that_is_stopped_is_equal_to_one_that_is_not(method: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    own = f'[optimizers.other]\nmethod = "{method}"\nlr = 0.01\nweight_decay = 0.1\n'
    path.write_text(TINY.replace("[quick]", f"{own}\n[quick]"))
    spec = recipe.load(str(path)).run("other", 3)
    whole, task = prepared(tmp_path / "whole", spec)
    assert train(whole, spec, task) == "finished"
    pieces, task = prepared(tmp_path / "pieces", spec)
    assert train(pieces, spec, task, stop_after(5)) == "stopped"
    assert train(pieces, spec, task) == "finished"
    assert_identical(result(whole), result(pieces))


def test_muon_is_not_sharded() -> None:
    spec = recipe.load("multi30k", ["optimizers.muon.method=muon", "optimizers.muon.lr=0.01"])
    with pytest.raises(ExperimentError, match=r"'muon' .* needs unsharded matrices"):
        Execution(devices=2, strategy="fsdp2").check(spec.run("muon", 1))


def test_a_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ExperimentError, match=r"needs torch 2\.9 or newer, got torch"):
        MuonAndAdamW(resnet(8, width=4), lr=0.01)
