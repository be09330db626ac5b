"""Diagnostics against NumPy on real trajectories."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apollo_qn import Apollo, diagnostics
from apollo_qn.diagnostics import Recorder, TensorDiagnostics
from tests import tolerances
from tests.helpers import (
    BACK_ENDS,
    as_numpy,
    give_gradients,
    make,
    normal,
    parameters,
    references,
    run_steps,
    same,
    snapshot,
    step_references,
)
from tests.numpy_reference import ReferenceApollo, Settings

LR = 0.3
MODES = {
    "plain": Settings(lr=LR, warmup_steps=4),
    "l2": Settings(lr=LR, warmup_steps=0, weight_decay=0.05, maximize=True, sigma=3.0),
    "decoupled": Settings(
        lr=LR, warmup_steps=4, weight_decay=0.05, decoupled_weight_decay=True, sigma=0.3
    ),
    "belief": Settings(lr=LR, warmup_steps=4, rebound="belief"),
}


def wanted(
    name: str, reference: ReferenceApollo, before: dict[str, Any], rate: float, threshold: float
) -> TensorDiagnostics:
    """Return the same numbers in NumPy, from arrays that the reference keeps."""
    B, n = reference.B, reference.B.size
    s = reference.settings
    corrected = 1 - s.beta**reference.t
    offset = s.eps * corrected / (1 - s.beta) if s.rebound == "belief" else 0.0
    D = np.maximum(np.abs(B), threshold) + offset
    change = B - before["B"]
    step = np.linalg.norm((reference.theta - before["theta"]).ravel())
    size = np.linalg.norm(reference.theta.ravel())
    return TensorDiagnostics(
        name=name,
        numel=n,
        step=reference.t,
        lr=rate,
        threshold=threshold,
        negative=float(np.mean(B < 0)),
        rectified=float(np.mean(np.abs(B) < threshold)),
        curvature_mean=float(np.mean(B)),
        curvature_rms=float(np.sqrt(np.mean(B**2))),
        curvature_min=float(np.min(B)),
        curvature_max=float(np.max(B)),
        secant_correction=float(np.sqrt(np.mean(change**2)) * np.sign(np.sum(change))),
        parameter_norm=float(size),
        step_norm=float(step),
        step_ratio=float(step / size),
        rate_min=float(rate / np.max(D)),
        rate_max=float(rate / np.min(D)),
    )


def check(found: TensorDiagnostics, expected: TensorDiagnostics, tolerance: float) -> None:
    for field in dataclasses.fields(TensorDiagnostics):
        value, right = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(right, float) and field.name not in ("negative", "rectified"):
            # a correction is a difference of two B, and has their error
            scale = abs(right)
            if field.name.startswith(("curvature", "secant")):
                scale = max(scale, expected.curvature_rms)
            assert abs(value - right) <= tolerance * scale, (field.name, value, right)
        else:
            assert value == right, (field.name, value, right)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@BACK_ENDS
def test_every_number_on_a_trajectory(
    mode: str, dtype: torch.dtype, back_end: dict[str, Any]
) -> None:
    """In ten steps of each mode the recorder gives the numbers of NumPy."""
    settings = MODES[mode]
    params = parameters(dtype=dtype)
    optimizer = make(
        [(f"p{i}", p) for i, p in enumerate(params)],
        settings,
        **({} if dtype.is_complex and "fused" in back_end else back_end),
    )
    alone = references(params, settings)
    for i, (p, one) in enumerate(zip(params, alone, strict=True)):
        # gradients that do not depend on theta would leave B far below sigma
        B = 2 * normal(p.shape, "B", i, dtype=dtype)
        one.B = as_numpy(B)
        state = {"exp_avg": torch.zeros_like(B), "hessian_diag": B.clone()}
        optimizer.state[p] = {"step": torch.tensor(0.0), **state}
    records: list[list[TensorDiagnostics]] = []
    with Recorder(optimizer, lambda _, measured: records.append(measured), every=1):
        for t in range(10):
            give_gradients(params, t)
            thresholds = [belief(one, p) for one, p in zip(alone, params, strict=True)]
            before = [{"B": one.B, "theta": one.theta} for one in alone]
            rates = [one.rate() for one in alone]
            optimizer.step()
            step_references(params, alone)
            expected = [
                wanted(f"p{i}", one, old, rate, threshold)
                for i, (one, old, rate, threshold) in enumerate(
                    zip(alone, before, rates, thresholds, strict=True)
                )
                if one.B.size
            ]
            assert [one.name for one in records[t]] == [one.name for one in expected]
            for found, right in zip(records[t], expected, strict=True):
                check(found, right, tolerances.DIAGNOSTICS)
    for share in ("negative", "rectified"):
        large = [getattr(one, share) for record in records for one in record if one.numel > 200]
        assert 0 < np.median(large) < 1, "the case says nothing of shares"


def belief(reference: ReferenceApollo, p: nn.Parameter) -> float:
    s = reference.settings
    if s.rebound == "constant" or p.numel() == 0:
        return s.sigma
    assert p.grad is not None
    return float(np.max(np.abs(as_numpy(p.grad) - reference.m)))


def test_half_precision_and_capturable() -> None:
    """The state is float32, parameters have 16 bits; capturable changes no number."""
    params = parameters(dtype=torch.bfloat16)
    optimizer = Apollo(params, lr=LR, warmup_steps=2, capturable=True)
    run_steps(optimizer, range(5))
    for one, p in zip(
        diagnostics.measure(optimizer), [p for p in params if p.numel()], strict=True
    ):
        B = as_numpy(optimizer.state[p]["hessian_diag"])
        assert one.step == 5
        assert one.lr == pytest.approx(LR)
        assert one.negative == np.mean(B < 0)
        assert one.rectified == np.mean(np.abs(B) < 1)
        assert one.parameter_norm == pytest.approx(float(p.detach().double().norm()), rel=1e-6)
        assert one.secant_correction is None


def test_what_is_not_there_is_left_out() -> None:
    params = parameters()
    optimizer = Apollo([{"params": params[3:5]}, {"params": params[5:8]}])
    assert diagnostics.measure(optimizer) == []
    assert diagnostics.coming_corrections(optimizer) == {}
    params[4].grad, params[6].grad = (torch.ones_like(p) for p in (params[4], params[6]))
    optimizer.step()
    assert len(optimizer.state) == 2
    params[4].grad = None
    coming = diagnostics.coming_corrections(optimizer)
    assert list(coming) == [params[6]]
    assert len(optimizer.state) == 2, "measuring makes no state"
    B = {p: optimizer.state[p]["hessian_diag"].clone() for p in (params[4], params[6])}
    optimizer.step()
    measured = diagnostics.measure(optimizer, coming)
    assert [one.name for one in measured] == ["0.1", "1.1"]
    assert measured[0].secant_correction == 0.0  # this parameter had no gradient
    change = optimizer.state[params[6]]["hessian_diag"] - B[params[6]]
    assert measured[1].secant_correction == pytest.approx(
        float(change.mean()), rel=tolerances.DIAGNOSTICS_OF_FLOAT32
    )
    names = [("weight", params[4]), ("bias", params[6])]
    assert [one.name for one in diagnostics.measure(optimizer, names=names)] == ["weight", "bias"]


def test_nothing_waits_but_for_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of all tensors are fetched once, corrections never."""
    params = parameters()
    optimizer = Apollo(params)
    run_steps(optimizer, range(2))
    give_gradients(params, 2)
    calls: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def counted(
            self: Tensor, *arguments: Any, name: str = name, original: Any = original
        ) -> Any:
            steps = [state["step"] for state in optimizer.state.values()]
            if not any(self is step for step in steps):  # they lie on the host
                calls.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(Tensor, name, counted)
    coming = diagnostics.coming_corrections(optimizer)
    assert calls == []
    diagnostics.measure(optimizer, coming)
    assert calls == ["tolist"]


@pytest.mark.parametrize("mode", MODES)
def test_a_measured_trajectory_is_the_same_to_the_bit(mode: str) -> None:
    """Also with a closure; after detach the optimizer keeps nothing of the recorder."""
    found = []
    for recording in (False, True):
        params = parameters(dtype=torch.float32)
        optimizer = make(params, MODES[mode])
        records: list[Any] = []
        recorder = None
        if recording:

            def keep(*record: Any, records: list[Any] = records) -> None:
                records.append(record)

            recorder = Recorder(optimizer, keep, every=2, step=3)
        for t in range(6):

            def closure(params: Any = params, t: int = t) -> float:
                give_gradients(params, t)
                return float(t)

            if t % 2:
                assert optimizer.step(closure) == t
            else:
                closure()
                optimizer.step()
        found.append(snapshot(optimizer))
        if recorder is not None:
            assert [step for step, _ in records] == [4, 6, 8]
            recorder.detach()
            assert not recorder.due
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert same(*found)


def test_with_a_closure_the_correction_is_that_of_its_gradients() -> None:
    found = []
    for closing in (False, True):
        params = parameters()
        optimizer = Apollo(params, lr=LR, warmup_steps=0)
        records: list[list[TensorDiagnostics]] = []
        with Recorder(optimizer, lambda _, one, records=records: records.append(one), every=3):
            for t in range(3):
                if closing:
                    give_gradients(params, 77)  # gradients of another batch
                    optimizer.step(
                        closure=lambda params=params, t=t: give_gradients(params, t)  # type: ignore[misc]
                    )
                else:
                    give_gradients(params, t)
                    optimizer.step()
        found.append(records)
    assert len(found[0]) == 1
    assert found[0] == found[1]


def test_a_step_that_fails_is_not_counted() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Apollo([p])
    with Recorder(optimizer, None, every=1) as recorder:
        p.grad = torch.ones(3, 2).to_sparse()
        with pytest.raises(RuntimeError, match="dense gradients"):
            optimizer.step()
        assert recorder.step == 0
        p.grad = torch.ones(3, 2)
        optimizer.step()
        assert recorder.step == 1


def test_several_tensors_as_one() -> None:
    params = parameters(dtype=torch.float64)
    optimizer = Apollo(params, lr=LR, warmup_steps=0)
    run_steps(optimizer, range(4))
    give_gradients(params, 4)
    before = concatenated(optimizer, params)
    coming = diagnostics.coming_corrections(optimizer)
    old = torch.cat([p.detach().flatten() for p in params])
    optimizer.step()
    B = concatenated(optimizer, params)
    theta = torch.cat([p.detach().flatten() for p in params])
    one = diagnostics.overall(diagnostics.measure(optimizer, coming))
    assert (one.name, one.numel, one.step, one.lr, one.threshold) == ("all", len(B), 5, LR, 1.0)
    expected = {
        "negative": (B < 0).double().mean(),
        "rectified": (B.abs() < 1).double().mean(),
        "curvature_mean": B.mean(),
        "curvature_rms": (B**2).mean().sqrt(),
        "curvature_min": B.min(),
        "curvature_max": B.max(),
        "secant_correction": ((B - before) ** 2).mean().sqrt(),
        "step_ratio": (theta - old).norm() / theta.norm(),
        "rate_min": LR / B.abs().max().clamp(min=1),
        "rate_max": LR / B.abs().min().clamp(min=1),
    }
    for name, value in expected.items():
        assert getattr(one, name) == pytest.approx(float(value), rel=tolerances.DIAGNOSTICS), name
    with pytest.raises(ValueError, match="tensors must be at least one"):
        diagnostics.overall([])


def concatenated(optimizer: Apollo, params: list[nn.Parameter]) -> Tensor:
    return torch.cat([optimizer.state[p]["hessian_diag"].flatten() for p in params])


def test_zeros() -> None:
    """No division by a norm that is 0, no warning."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = Apollo([p], lr=LR, warmup_steps=0)
    p.grad = torch.zeros(4)
    optimizer.step()
    [one] = diagnostics.measure(optimizer)
    assert math.isnan(one.step_ratio)
    assert (one.rectified, one.negative, one.step_norm) == (1, 0, 0)
    q = nn.Parameter(torch.full((4,), 0.5))
    optimizer = Apollo([q], lr=0.5, warmup_steps=0)
    q.grad = torch.ones(4)
    optimizer.step()
    [one] = diagnostics.measure(optimizer)
    assert (one.parameter_norm, one.step_norm, one.step_ratio) == (0, 1, math.inf)


class Written:
    """Writer that keeps what is written."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert (tag, global_step) not in self.numbers
        self.numbers[tag, global_step] = scalar_value


def test_tensorboard(tmp_path: Path) -> None:
    """A real SummaryWriter gets the same numbers as any writer with its method."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written = Written()
    writer = tensorboard.SummaryWriter(str(tmp_path))
    params = parameters()[3:5]
    optimizer = Apollo([("a.weight", params[0]), ("b", params[1])])
    last: list[TensorDiagnostics] = []
    with (
        Recorder(optimizer, written, every=2),
        Recorder(optimizer, writer, every=2),
        Recorder(optimizer, lambda _, measured: last.__setitem__(slice(None), measured), every=4),
    ):
        run_steps(optimizer, range(5))
    writer.close()
    assert {step for _, step in written.numbers} == {2, 4}
    assert written.numbers["curvature.negative/a.weight", 4] == last[0].negative
    assert written.numbers["curvature.step_ratio/b", 4] == last[1].step_ratio
    both = diagnostics.overall(last)
    assert written.numbers["curvature.secant_correction/all", 4] == both.secant_correction
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    shown = {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    assert shown == {key: pytest.approx(value, rel=1e-6) for key, value in written.numbers.items()}


def test_refusals() -> None:
    p = nn.Parameter(torch.ones(2))
    ours, theirs = Apollo([p]), torch.optim.SGD([p], 0.1)
    anything: Any = theirs
    for call in (diagnostics.measure, diagnostics.coming_corrections):
        with pytest.raises(TypeError, match="optimizer must be an Apollo, got SGD"):
            call(anything)
    with pytest.raises(TypeError, match="optimizer must be an Apollo, got SGD"):
        Recorder(anything, None)
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"every must be a whole number >= 1, got {every}"):
            Recorder(ours, None, every=every)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be a whole number >= 0, got -1"):
        Recorder(ours, None, step=-1)
    with pytest.raises(TypeError, match="to must be a writer with add_scalar"):
        Recorder(ours, "runs")  # type: ignore[arg-type]
    assert not ours._optimizer_step_pre_hooks


WITHOUT = """
import sys
sys.modules["matplotlib"] = None
sys.modules["tensorboard"] = None
from apollo_qn import diagnostics
import torch
zero = torch.zeros(2)
try:
    diagnostics.plot([diagnostics.Comparison("a", zero, zero, zero)])
except ImportError as error:
    print(error)
print(sorted(name for name in sys.modules if name.startswith(("scipy", "apollo_qn.exp"))))
"""


def test_torch_is_enough() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "plot needs the package matplotlib, which is not installed; pip install 'matplotlib'",
        "[]",
    ]
