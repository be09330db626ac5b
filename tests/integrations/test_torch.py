"""torch's own tools around the optimizer: AMP, averaged weights, hooks, clipping, torch.func."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional
from torch.optim import lr_scheduler, swa_utils

from apollo_qn import Apollo, ApolloW, apollo
from tests import tolerances
from tests.helpers import BACK_ENDS, normal, same, snapshot
from tests.integrations.data import batch, loss_of, network

MODES = [
    {},
    {"weight_decay": 0.01},
    {"weight_decay": 0.01, "decoupled_weight_decay": True},
    {"rebound": "belief", "lr": 0.01},
]


def train(model: nn.Module, optimizer: Apollo, steps: range) -> list[float]:
    losses = []
    for t in steps:
        optimizer.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# torch.amp.GradScaler


@BACK_ENDS
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_skipped_step_leaves_no_trace(mode: dict[str, Any], back_end: dict[str, Any]) -> None:
    """Training equals training without the batches whose gradients were not finite."""
    results = []
    spoilt = {0: float("inf"), 2: float("nan"), 5: float("inf")}
    for with_spoilt in (True, False):
        model = network()
        optimizer = Apollo(model.parameters(), **{"lr": 0.5, "warmup_steps": 4, **mode, **back_end})
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for t in range(8):
            if t in spoilt and not with_spoilt:
                continue
            optimizer.zero_grad()
            scaler.scale(loss_of(model, t)).backward()
            before = snapshot(optimizer)
            if t in spoilt:
                bias = model[0].bias.grad
                assert bias is not None
                bias[3] = spoilt[t]
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            if t in spoilt:
                assert same(before, snapshot(optimizer))
                assert scaler.get_scale() < scale
            else:
                assert not same(before, snapshot(optimizer))
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {5.0}
        results.append(snapshot(optimizer))
    # powers of two, so that scaling is exact
    assert same(*results)


def test_a_scaler_with_clipping_is_the_plain_step() -> None:
    results = []
    for scaled in (True, False):
        model = network()
        optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for t in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, t)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        results.append(snapshot(optimizer))
    assert same(*results)


# torch.optim.swa_utils


def test_averaged_weights_and_their_statistics() -> None:
    model = network(normalized=True)
    optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=2)
    averaged = swa_utils.AveragedModel(model)
    moving = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3, anneal_strategy="linear")
    kept: list[list[Tensor]] = []
    for t in range(6):
        train(model, optimizer, range(t, t + 1))
        averaged.update_parameters(model)
        moving.update_parameters(model)
        schedule.step()
        kept.append([p.detach().clone() for p in model.parameters()])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)

    mean = [torch.stack(column).mean(0) for column in zip(*kept, strict=True)]
    ema = kept[0]
    for weights in kept[1:]:
        ema = [0.5 * a + 0.5 * b for a, b in zip(ema, weights, strict=True)]
    for found, wanted in ((averaged, mean), (moving, ema)):
        for p, q in zip(found.module.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach(), q)

    data = [batch(t)[0] for t in range(10)]
    swa_utils.update_bn(data, averaged)
    first = averaged.module[0](torch.cat(data))
    torch.testing.assert_close(averaged.module[1].running_mean, first.mean(0))
    # training is unchanged
    alone = network(normalized=True)
    twin = Apollo(alone.parameters(), lr=0.5, warmup_steps=2)
    schedule = swa_utils.SWALR(twin, swa_lr=0.05, anneal_epochs=3, anneal_strategy="linear")
    for t in range(6):
        train(alone, twin, range(t, t + 1))
        schedule.step()
    assert same(snapshot(optimizer), snapshot(twin))


# hooks of torch.optim.Optimizer


# clipping and accumulation


@pytest.mark.parametrize("clip", ["norm", "value"])
@BACK_ENDS
def test_clipped_gradients_are_the_step_s(clip: str, back_end: dict[str, Any]) -> None:
    results = []
    for by_torch in (True, False):
        model = network()
        optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=2, **back_end)
        for t in range(4):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            if by_torch and clip == "norm":
                assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
            elif by_torch:
                nn.utils.clip_grad_value_(model.parameters(), 0.001)
            elif clip == "norm":
                norm = torch.stack([g.norm() for g in grads]).norm()
                for g in grads:
                    g.mul_((0.05 / (norm + 1e-6)).clamp(max=1.0))
            else:
                for g in grads:
                    g.clamp_(-0.001, 0.001)
            optimizer.step()
        results.append(snapshot(optimizer))
    assert same(*results)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_is_the_large_batch(parts: int) -> None:
    """Accumulation equals the large batch, also in warmup, which counts updates."""
    results = []
    for whole in (True, False):
        model = network().double()
        optimizer = Apollo(model.parameters(), lr=0.5, warmup_steps=4)
        for t in range(6):
            inputs, labels = batch(t)
            optimizer.zero_grad()
            for x, y in zip(
                inputs.chunk(1 if whole else parts),
                labels.chunk(1 if whole else parts),
                strict=True,
            ):
                loss = functional.cross_entropy(model(x.double()), y)
                (loss * len(x) / len(inputs)).backward()
            optimizer.step()
        assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=tolerances.ACCUMULATED * float(one.abs().max())
        )


# torch.compile of a full training step


def test_a_compiled_training_step_follows_eager() -> None:
    """Neither warmup nor a schedule makes the compiler run again."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = network()
        optimizer = ApolloW(
            model.parameters(), lr=torch.tensor(0.5), warmup_steps=3, capturable=True
        )
        schedule = lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

        def step(
            inputs: Tensor, labels: Tensor, model: nn.Module = model, optimizer: Apollo = optimizer
        ) -> Tensor:
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        counter = CompileCounter()
        if compiled:
            step = torch.compile(step, backend=counter)
        losses, graphs = [], []
        for t in range(8):
            losses.append(step(*batch(t)))
            schedule.step()
            graphs.append(counter.frame_count)
        assert (graphs[2] > 0) == compiled
        assert graphs[2:] == [graphs[2]] * 6  # the state appears in the first step
        assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}
        results.append([torch.stack(losses), *(p.detach() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerances.COMPILED)


# torch.func


def test_gradients_of_torch_func() -> None:
    """The functional form with torch.func equals the class with backward()."""
    model, twin = network(), network()
    optimizer = Apollo(twin.parameters(), lr=0.5, warmup_steps=3)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    exp_avgs, hessian_diags = ([torch.zeros_like(p) for p in weights.values()] for _ in range(2))
    steps = [torch.zeros(()) for _ in weights]

    def of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (x,)), y)

    for t in range(5):
        grads = list(grad(of)(weights, *batch(t)).values())
        apollo(
            list(weights.values()),
            grads,
            exp_avgs,
            hessian_diags,
            steps,
            lr=0.5,
            warmup_steps=3,
        )
        train(twin, optimizer, range(t, t + 1))
        assert same(list(weights.values()), [p.detach() for p in twin.parameters()])


def test_an_ensemble_by_vmap_is_each_model_alone() -> None:
    models = [network() for _ in range(3)]
    for i, model in enumerate(models):
        model[0].weight.data.mul_(1 + i / 4)
    twins = copy.deepcopy(models)
    stacked, buffers = stack_module_state(models)
    weights = {name: tensor.detach() for name, tensor in stacked.items()}
    params = [part for tensor in weights.values() for part in tensor.unbind()]
    exp_avgs, hessian_diags = ([torch.zeros_like(p) for p in params] for _ in range(2))
    steps = [torch.zeros(()) for _ in params]
    optimizers = [Apollo(twin.parameters(), lr=0.5, warmup_steps=3) for twin in twins]

    def of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(models[0], (weights, buffers), (x,)), y)

    for t in range(5):
        found = vmap(grad(of), in_dims=(0, None, None))(weights, *batch(t))
        grads = [part for name in weights for part in found[name].unbind()]
        apollo(params, grads, exp_avgs, hessian_diags, steps, lr=0.5, warmup_steps=3)
        for twin, optimizer in zip(twins, optimizers, strict=True):
            train(twin, optimizer, range(t, t + 1))
    for i, twin in enumerate(twins):
        for name, p in twin.named_parameters():
            torch.testing.assert_close(
                weights[name][i], p.detach(), rtol=0, atol=tolerances.BATCHED
            )


def test_steps_may_be_differentiated_by_torch_func() -> None:
    """The derivative of two steps by the rate equals a finite difference."""
    start = [p.detach().double() for p in network().parameters()]
    gradients = [normal(p.shape, "g", i) for i, p in enumerate(start)]

    def after(lr: Tensor) -> Tensor:
        params = [p.clone() for p in start]
        state: list[list[Any]] = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = [torch.zeros(()) for _ in params]
        for _ in range(2):
            apollo(params, gradients, *state, steps, lr=lr, warmup_steps=0, differentiable=True)
        return torch.stack([p.square().sum() for p in params]).sum()

    lr = torch.tensor(0.3, dtype=torch.float64)
    found = grad(after)(lr)
    wanted = (after(lr + 1e-6) - after(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(found, wanted, rtol=tolerances.DIFFERENCE, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_default_compiler_follows_eager() -> None:
    """Inductor fuses the update; it must keep the rounding error of a 16-bit parameter."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        p = nn.Parameter(normal((6, 5), "theta", dtype=torch.bfloat16))
        optimizer = ApolloW(
            [p], lr=0.3, weight_decay=0.05, warmup_steps=0, rounding="kahan", capturable=True
        )
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for t in range(3):
            p.grad = normal((6, 5), "g", t, dtype=torch.bfloat16)
            step()
        low = optimizer.state[p]["compensation"]
        assert low.count_nonzero() > 20
        results.append(p.detach().double() + low.double())
    one, other = results
    assert float((one - other).abs().max()) <= tolerances.COMPENSATED[torch.bfloat16] * float(
        one.abs().max()
    )
