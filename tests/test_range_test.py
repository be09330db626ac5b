"""The range test: restored states, diverging runs, and the proposal."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apollo_qn
from apollo_qn import Apollo, ApolloW, ApolloWarning, lr_range_test
from apollo_qn.range_test import RATES, propose
from tests.helpers import DEVICE, normal, same

RATES_AROUND = [0.05, 0.2, 1.0, 4.0, 20.0, 1e4]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1)
    )
    return layers.to(DEVICE)


def regression(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for i in range(count):
        x = normal((32, 6), "x", i, dtype=torch.float32)
        batches.append((x, x[:, :1] - 0.5 * x[:, 1:2].abs()))
    return batches


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


@pytest.fixture
def silent() -> Iterator[None]:
    """Ignore the warning that the best rate is the first or last one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApolloWarning)
        yield


def everything(model: nn.Module) -> list[Any]:
    return [
        [x.detach().clone() for x in (*model.parameters(), *model.buffers())],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
        torch.tensor(np.random.get_state()[1].astype(np.int64)),
        torch.tensor(random.getstate()[1]),
    ]


def test_it_proposes_a_rate_that_trains() -> None:
    model = network()
    result = lr_range_test(model, loss_of, regression(), RATES_AROUND, steps=40)
    assert result.rates == tuple(RATES_AROUND)
    assert len(result.losses) == len(result.curves) == len(RATES_AROUND)
    assert result.losses[-1] > 1.0  # far too large
    best = min(result.losses)
    assert best < 0.5 * result.curves[0][0]
    assert 0.2 < result.proposal < 20
    assert best == min(result.losses[1:-1])


def test_all_runs_start_from_the_same(silent: None) -> None:
    """All runs have the same weights, buffers, batches and dropout, so first losses are equal."""
    result = lr_range_test(network(), loss_of, regression(), RATES_AROUND, steps=12)
    assert len({curve[0] for curve in result.curves}) == 1
    assert len({curve[1] for curve in result.curves}) > 1
    again = lr_range_test(network(), loss_of, regression(), RATES_AROUND, steps=12)
    assert again == result


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [None, RuntimeError, Interrupted])
def test_everything_is_restored(error: Any, silent: None) -> None:
    model = network()
    model[0].eval()
    model[0].register_buffer("calls", torch.zeros(()))
    model[2].requires_grad_(False)
    loss_of(model, regression()[0]).backward()
    tensors = [*model.parameters(), *model.buffers()]
    before, seen = everything(model), []

    def drawing_loss(model: Any, batch: Any) -> Tensor:
        model[0].calls = model[0].calls + 1  # replaces the buffer by another tensor
        np.random.rand(), random.random()
        seen.append(model[0].training)
        if error and len(seen) == 15:
            raise error
        return loss_of(model, batch)

    if error:
        with pytest.raises(error):
            lr_range_test(model, drawing_loss, regression(), [0.1, 1.0], steps=10)
    else:
        lr_range_test(model, drawing_loss, regression(), [0.1, 1.0], steps=10)
    assert all(seen)  # the model was in training mode
    assert same(before, everything(model))
    # the same tensor objects, because an optimizer may hold their state
    for x, y in zip(tensors, (*model.parameters(), *model.buffers()), strict=True):
        assert x is y


def test_a_shuffling_loader_gives_all_runs_the_same_batches(silent: None) -> None:
    x = normal((64, 6), "loader", dtype=torch.float32)
    data = torch.utils.data.TensorDataset(x, x[:, :1])
    for generator in (None, torch.Generator().manual_seed(3)):
        loader = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=generator)
        state = None if generator is None else generator.get_state()
        result = lr_range_test(network(), loss_of, loader, [0.5, 1.0, 2.0], steps=10)
        assert len({curve[0] for curve in result.curves}) == 1
        assert generator is None or torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_run_that_is_not_finite_is_stopped_and_counts_as_infinite(
    value: float, silent: None
) -> None:
    def overflowing(model: nn.Module, batch: Any) -> Tensor:
        found = loss_of(model, batch)
        return found if found < 1e4 else found * 0 + value

    told: list[tuple[float, float]] = []
    result = lr_range_test(
        network(), overflowing, regression(), [0.01, 0.1, 1e5, 1e6], steps=20,
        callback=lambda *x: told.append(x),
    )  # fmt: skip
    assert result.losses[2:] == (math.inf, math.inf)
    assert len(result.curves[-1]) < 20
    assert all(map(math.isfinite, result.losses[:2]))
    assert result.proposal < 1
    assert told == list(zip(result.rates, result.losses, strict=True))


def test_no_rate_trains() -> None:
    def rising(model: nn.Module, batch: Any) -> Tensor:
        return -loss_of(model, batch) * 0 + calls.pop(0)

    calls = [1.0 + t for t in range(10)] * 2
    with pytest.warns(ApolloWarning, match=r"no rate of 1 to 2 lowered the loss.*smaller") as told:
        result = lr_range_test(network(), rising, regression(), [1.0, 2.0], steps=10)
    assert math.isnan(result.proposal)
    assert told[0].filename == __file__
    with pytest.raises(ValueError, match="lr must be a finite number"):
        Apollo(network().parameters(), lr=result.proposal)


@pytest.mark.parametrize(("rates", "what"), [([2.0, 50.0, 200.0], "first"), ([1e-4, 1e-3], "last")])
def test_a_best_rate_at_the_border_gives_a_warning(rates: list[float], what: str) -> None:
    with pytest.warns(ApolloWarning, match=f"best rate is the {what} that was tried") as told:
        lr_range_test(network(), loss_of, regression(), rates, steps=20)
    assert len(told) == 1  # no warning about small rates, which are tried on purpose


def test_progress_within_the_noise_of_the_batches_gives_a_warning() -> None:
    model = nn.Linear(1, 1, bias=False)
    batches = [torch.tensor(0.5), *map(torch.tensor, (-1.0, 1.0) * 10)]

    def loss(model: Any, batch: Tensor) -> Tensor:
        return model.weight.sum() * 0.1 + batch

    with pytest.warns(ApolloWarning, match=r"lowered the loss by 0\.\d+ only.*more steps"):
        lr_range_test(model, loss, batches, [0.001, 0.01, 0.1], steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApolloWarning)
        lr_range_test(network(), loss_of, regression(), RATES_AROUND, steps=40)


def test_the_schedule_of_a_run() -> None:
    """The rate rises over the warmup, is lr at its end, and falls to 0 at the end of the run."""
    used = []

    class Watched(Apollo):
        def step(self, closure: Any = None) -> Any:
            used.extend(self.effective_lrs())
            return super().step(closure)

    lr_range_test(network(), loss_of, regression(), [2.0], steps=20, optimizer=Watched)
    assert used[0] == pytest.approx(2e-3)
    assert used[:5] == sorted(used[:5])
    assert max(used) == used[4] == pytest.approx(2.0)
    assert used[4:] == pytest.approx([2.0 * (20 - t) / 16 for t in range(4, 20)])


def test_options(silent: None) -> None:
    made: list[Any] = []

    def make(params: Any, **settings: Any) -> Apollo:
        made.append(ApolloW(params, weight_decay=1e-3, **settings))
        return made[-1]

    model = network()
    model[0].weight.requires_grad_(False)
    norms = []

    def look(model: nn.Module, batch: Any) -> Tensor:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.extend([] if not grads else [float(nn.utils.get_total_norm(grads))])
        return loss_of(model, batch)

    optimizer = functools.partial(make, beta=0.5)
    lr_range_test(
        model, look, regression(), [0.5, 1.0, 2.0], steps=10, warmup_steps=3, clip_norm=0.01,
        optimizer=optimizer,
    )  # fmt: skip
    assert [o.param_groups[0]["warmup_base_lr"] for o in made] == [0.5, 1.0, 2.0]
    assert {o.param_groups[0]["warmup_steps"] for o in made} == {3}
    assert {o.param_groups[0]["beta"] for o in made} == {0.5}
    assert all(p is not model[0].weight for p in made[0].param_groups[0]["params"])


def test_the_gradient_is_clipped(silent: None) -> None:
    norms: list[float] = []

    def sgd(params: Any, lr: float, warmup_steps: int) -> Any:
        optimizer = torch.optim.SGD(params, lr=lr)

        def look(*_: Any) -> None:
            norms.append(float(nn.utils.get_total_norm([p.grad for p in params])))

        optimizer.register_step_pre_hook(look)
        return optimizer

    for clip in (None, 0.01):
        norms.clear()
        lr_range_test(
            network(), loss_of, regression(), [0.1, 0.2, 9], steps=10, clip_norm=clip, optimizer=sgd
        )
        assert (max(norms) <= 0.0101) == (clip is not None)


@pytest.mark.parametrize(
    ("losses", "proposal"),
    [
        ([3.0, 1.0, 3.0, math.inf], 2.0),
        ([3.0, 1.0, 1.01, math.inf], 2.83),  # two that are level, sqrt(8)
        ([1.0, 1.03, 1.02, 1.05], 2.0),
        ([1.0, 1.05, 1.05, 1.05], 1.0),
    ],
)
def test_the_proposal_is_the_middle_of_the_good_rates(losses: list[float], proposal: float) -> None:
    """A loss is good within 2 % of the best run's progress, here 0.04."""
    assert propose([1.0, 2.0, 4.0, 8.0], losses, 3.0) == proposal


def test_the_proposal_is_a_number_to_read() -> None:
    """The proposal is rounded: exp(log(5)) is not 5."""
    assert propose([2.0, 5.0, 10.0], [3.0, 1.0, 3.0], 3.0) == 5.0


def test_no_proposal_without_progress() -> None:
    assert math.isnan(propose([1.0, 2.0], [3.0, math.inf], 3.0))
    assert math.isnan(propose([1.0], [math.inf], math.inf))
    assert math.isnan(propose([1.0], [math.inf], math.nan))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rates": []}, "rates must be finite numbers > 0"),
    ({"rates": [1.0, 0.0]}, "rates must be finite numbers > 0"),
    ({"rates": [1.0, math.inf]}, "rates must be finite numbers > 0"),
    ({"steps": 9}, "steps must be a whole number >= 10, got 9"),
    ({"steps": 10.0}, "steps must be a whole number >= 10, got 10.0"),
    ({"steps": 20, "warmup_steps": 20}, r"warmup_steps must be in \[0, 20\), got 20"),
    ({"clip_norm": 0.0}, "clip_norm must be None or > 0, got 0.0"),
    ({"batches": []}, "batches must have at least one batch"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=str)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    settings = {"batches": regression(), "rates": [1.0], "steps": 10, **given}
    with pytest.raises(ValueError, match=message):
        lr_range_test(network(), loss_of, **settings)


def test_what_cannot_be_tested() -> None:
    with pytest.raises(TypeError, match="iterable more than once, got list_iterator"):
        lr_range_test(network(), loss_of, iter(regression()))
    with pytest.raises(ValueError, match="require a gradient, got none"):
        lr_range_test(network().requires_grad_(False), loss_of, regression())
    with pytest.raises(ValueError, match="run it once on a batch"):
        lr_range_test(nn.LazyLinear(1), loss_of, regression())
    with pytest.raises(ValueError, match="loss must return a tensor of one element"):
        lr_range_test(network(), lambda m, b: m(b[0]), regression())


def test_text_and_plot(silent: None) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    result = lr_range_test(network(), loss_of, regression(), [0.5, 1.0, 1e30], steps=10)
    assert f"proposal: lr={result.proposal:g}" in str(result)
    assert len(str(result).splitlines()) == 5
    figure = result.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    (axes,) = figure.axes
    shown = [x for x in result.losses if math.isfinite(x)]
    assert len(axes.lines[0].get_xdata()) == len(shown)
    assert axes.lines[1].get_xdata()[0] == result.proposal


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, silent: None) -> None:
    result = lr_range_test(network(), loss_of, regression(), [1.0], steps=10)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result.plot()


def test_it_is_public_and_imported_on_demand() -> None:
    assert callable(apollo_qn.lr_range_test)
    with pytest.raises(AttributeError, match="no attribute 'lr_range'"):
        _ = apollo_qn.lr_range
    assert list(RATES) == sorted(RATES)
