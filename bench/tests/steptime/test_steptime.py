"""`apollo-bench steptime`: parameter sets, arithmetic, files and errors."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.errors import ExperimentError
from apollo_bench.interrupts import Interrupted
from apollo_bench.steptime import (
    benchmark,
    candidates,
    measurement,
    parameter_sets,
    presentation,
    timing,
)
from apollo_bench.steptime.candidates import CANDIDATES, PEER, REFERENCE, Candidate
from apollo_bench.steptime.measurement import SetResult, Timings
from bench.tests.helpers import PATIENCE


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet-110", 335, 1_730_714),
        ("resnext-50", 161, 25_028_904),
        ("transformer-base", 253, 63_082_496),
        ("one-tensor", 1, 64_000_000),
        ("decoder-1.3b", 218, 1_317_373_952),
        ("many-tensors", 10_000, 640_000),
    ],
)
def test_parameter_sets_are_those_of_the_models(name: str, tensors: int, parameters: int) -> None:
    (chosen,) = parameter_sets.choose_sets([name])
    shapes = chosen.shapes()
    assert len(shapes) == tensors
    assert parameter_sets.numel(shapes) == parameters


def test_the_language_model_is_scaled_by_its_vocabulary() -> None:
    whole, eighth = parameter_sets.choose_sets(["one-billion-word/1", "one-billion-word"])
    sizes = [parameter_sets.numel(chosen.shapes()) for chosen in (whole, eighth)]
    lstm = 2 * 4 * 2048 + 4 * 2048 * (300 + 2048) + 2 * 4 * 2048 + 4 * 2048 * (2048 + 2048)
    assert 793_471 * 300 + lstm < sizes[0] < 2 * 793_471 * 300 + 2 * lstm + 150e6
    assert sizes[1] < sizes[0] / 3
    assert "1/8 of the vocabulary" in eighth.title


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet-11", "no parameter set 'resnet-11'; there are resnet-110, "),
        ("resnet-110/2", "resnet-110 has one size only"),
        ("one-tensor/0", "the scale must be a whole number"),
    ],
)
def test_unknown_parameter_sets(name: str, said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        parameter_sets.choose_sets([name])


def test_the_reference_is_always_measured() -> None:
    assert [c.name for c in candidates.choose_candidates(["Apollo fused"])] == [
        PEER,
        "Apollo fused",
    ]
    with pytest.raises(ExperimentError, match="no optimizer 'Apolo'; there are SGD loop, "):
        candidates.choose_candidates(["Apolo"])


def test_candidates_of_a_gpu() -> None:
    assert candidates.COMPILED not in [c.name for c in candidates.choose_candidates(None)]
    assert candidates.COMPILED in [c.name for c in candidates.choose_candidates(None, "cuda")]
    too_many = [torch.nn.Parameter(torch.zeros(1)) for _ in range(1001)]
    with pytest.raises(RuntimeError, match="1,001 tensors would take long to compile"):
        CANDIDATES[candidates.COMPILED].make(too_many)
    by_default = [chosen.name for chosen in parameter_sets.choose_sets(None, "cuda")]
    assert by_default == ["resnet-110", "resnext-50", "transformer-base", "decoder-1.3b/1"]
    assert "decoder-1.3b/1" not in [chosen.name for chosen in parameter_sets.choose_sets(None)]


def test_a_decoder_is_halved_three_times() -> None:
    sizes = []
    (chosen,) = parameter_sets.choose_sets(["decoder-1.3b"])
    smaller: parameter_sets.ParameterSet | None = chosen
    while smaller is not None:
        sizes.append(parameter_sets.numel(smaller.shapes()))
        smaller = smaller.smaller()
    ratios = [one / other for one, other in itertools.pairwise(sizes)]
    assert ratios == pytest.approx([2.0, 2.0, 2.0], rel=1e-3)


def test_gradient_and_state_that_no_cache_holds_are_read_twice() -> None:
    timings = Timings("Apollo fused", "apollo", 7, [1.0], [1.0], state_bytes=8000)
    result = SetResult("set", "Set", 1, 1000, 4, [10.0], [timings])
    assert result.bandwidth(timings) == 7 * 1000 * 4 / 1e-3
    assert result.bandwidth(timings, twice=True) == 10 * 1000 * 4 / 1e-3
    assert "at 10 values per parameter" not in " ".join(presentation.cells(result, timings))
    result.reads_twice = True
    assert "at 10 values per parameter" in " ".join(presentation.cells(result, timings))
    timings.state_bytes = None
    assert result.bandwidth(timings, twice=True) == 10 * 1000 * 4 / 1e-3


def taken(name: str, times: list[float], peer: list[float], values_moved: int = 7) -> Timings:
    return Timings(name, "apollo", values_moved, times, peer)


def test_a_timer_counts_milliseconds() -> None:
    assert timing.CpuTimer().milliseconds(lambda: time.sleep(0.02)) >= 20


def test_ratios_are_of_the_same_round() -> None:
    # a disturbance of all optimizers in the second round does not change the ratio
    assert taken("a", [2.0, 20.0, 2.2, 2.0], [1.0, 10.0, 1.0, 1.0]).ratio == 2.0
    peer, reference = (
        taken(PEER, [1.0, 1.0], [1.0, 1.0]),
        taken(REFERENCE, [12.0, 14.0], [1.0, 1.0]),
    )
    result = SetResult("set", "Set", 1, 1000, 4, [10.0], [peer, reference])
    assert result.speedup_over_reference(peer) == 13.0
    assert result.bandwidth(peer) == 7 * 1000 * 4 / 1e-3
    assert SetResult("set", "Set", 1, 1000, 4, [10.0], [peer]).speedup_over_reference(peer) is None


def test_the_slow_take_part_in_the_first_rounds_only() -> None:
    slow = Candidate("slow", "other", 7, Sleeper)
    (chosen,) = parameter_sets.choose_sets(["many-tensors/1000"])
    reports: list[tuple[str, int, int]] = []
    result = measurement.measure(
        chosen,
        [CANDIDATES[PEER], slow],
        repeats=9,
        budget=60.0,
        dtype=torch.float32,
        seed=0,
        report_progress=lambda *what: reports.append(what),
        stop=lambda: False,
    )
    rounds = {t.name: len(t.times) for t in result.taken}
    assert rounds == {PEER: 9, "slow": measurement.FEWEST}
    assert len(result.copy_times) == 9
    assert reports[-1] == (chosen.title, 8, 9)


class Sleeper(torch.optim.SGD):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        time.sleep(0.02)


def test_a_candidate_that_cannot_be_made_is_shown_and_stops_nobody() -> None:
    def fail(params: object) -> torch.optim.Optimizer:
        raise RuntimeError("no kernel\nand more")

    (chosen,) = parameter_sets.choose_sets(["many-tensors/1000"])
    result = measurement.measure(
        chosen,
        [CANDIDATES[PEER], Candidate("broken", "apollo", 7, fail)],
        repeats=2,
        budget=60.0,
        dtype=torch.bfloat16,
        seed=0,
        report_progress=lambda *_: None,
        stop=lambda: False,
    )
    peer, broken = result.taken
    assert broken.unavailable == "no kernel"
    assert presentation.cells(result, broken)[0] == "broken: not available, no kernel"
    assert len(peer.times) == 2
    assert peer.state_bytes is not None
    # AdamW keeps bfloat16 moments for bfloat16 parameters, and one step per tensor
    assert peer.state_bytes == 2 * 2 * result.parameters + 4 * result.tensors


def test_groups_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (chosen,) = parameter_sets.choose_sets(["one-tensor"])
    every = candidates.choose_candidates(None)
    for gigabytes in (6, 8, 12, 1000):
        monkeypatch.setattr(timing.CPU_TIMER, "available", lambda n=gigabytes: n * 10**9)
        same, groups = measurement.fit_into_memory(chosen, every, torch.float32)
        assert same == chosen
        assert all(PEER in [c.name for c in lot] for lot in groups)
        assert {c.name for lot in groups for c in lot} == {c.name for c in every}
        largest = max(map(len, groups))
        assert largest == len(every) or largest * 64e6 * 12 < gigabytes * 1e9
    monkeypatch.setattr(timing.CPU_TIMER, "available", lambda: 10**9)
    smaller, groups = measurement.fit_into_memory(chosen, every, torch.float32)
    assert smaller.name == "one-tensor/4"
    assert smaller.title == "One tensor of 64 M, 1/4 of the elements"
    monkeypatch.setattr(timing.CPU_TIMER, "available", lambda: 10**6)
    (whole,) = parameter_sets.choose_sets(["resnet-110"])
    with pytest.raises(ExperimentError, match="ResNet-110: two optimizers need"):
        measurement.fit_into_memory(whole, every, torch.float32)


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "apollo_bench", "steptime", *options]


@pytest.mark.slow
def test_the_command_writes_its_files(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    done = subprocess.run(
        command("--sets", "many-tensors/100,one-tensor/1000", "--repeats", "2", "--out", str(out)),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "steptime.json").read_text())
    assert [found["name"] for found in record["sets"]] == ["many-tensors/100", "one-tensor/1000"]
    for found in record["sets"]:
        by_name = {t["name"]: t for t in found["taken"]}
        assert {PEER, REFERENCE, "Apollo foreach"} <= by_name.keys()
        assert len(by_name[PEER]["times"]) == 2
        assert by_name["Apollo foreach"]["state_bytes"] >= 8 * found["parameters"]
    assert record["command"].startswith("apollo-bench steptime --sets")
    assert {"torch", "apollo_qn", "python", "machine", "seed"} <= record.keys()
    text = (out / "steptime.md").read_text()
    assert "| AdamW fused |" in text
    assert "10,000 tensors of 64, 1/100 of the tensors: 100 tensors, 6,400 parameters" in text
    assert (out / "steptime.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "steptime.svg").read_bytes()
    assert "Apollo fused" in done.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_what_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    sets = "many-tensors/1000,resnet-110"
    process = subprocess.Popen(
        command("--sets", sets, "--repeats", "100000", "--seconds", "3", "--out", str(out)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE
    while not (out / "steptime.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "the complete results are in" in errors
    record = json.loads((out / "steptime.json").read_text())
    assert record["sets"][0]["name"] == "many-tensors/1000"
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_an_interrupted_set_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first set is complete; the second is interrupted before anything is measured."""
    made = iter(
        [
            SetResult("one", "One", 1, 10, 4, [1.0], [taken(PEER, [1.0], [1.0])]),
            SetResult("two", "Two", 1, 10, 4, [], [], interrupted=True),
        ]
    )

    def measured(*_: object, **__: object) -> SetResult:
        result = next(made)
        if result.interrupted:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(benchmark, "measure", measured)
    options = benchmark.BenchmarkOptions(
        ["one-tensor/1000", "many-tensors/1000"], [PEER], 1, 1.0, None, "float32", 0
    )
    shown: list[SetResult] = []
    with pytest.raises(Interrupted):
        benchmark.run(options, tmp_path, "command", lambda *_: None, shown.append)
    assert [result.name for result in shown] == ["one"]
    record = json.loads((tmp_path / "steptime.json").read_text())
    assert [found["name"] for found in record["sets"]] == ["one"]


def test_a_bad_option_is_one_line() -> None:
    done = CliRunner().invoke(app, ["steptime", "--dtype", "float8"])
    assert done.exit_code == 2
    assert "--dtype is 'float8', allowed are float32, bfloat16, float64" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "--device is 'gpu', allowed are cpu, cuda, cuda:1 and so on"),
        ("cuda:99", r"--device is 'cuda:99', but torch .* sees \d+ GPUs here"),
    ],
)
def test_unknown_devices(device: str, said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        timing.timer_for(device)
