"""``compare --against`` trains only the new optimizer, and refuses settings that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apollo_bench.cli import selection
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.report import page
from apollo_bench.runs import archive, compatibility
from apollo_bench.runs.baseline import Baseline
from apollo_bench.training.loop import train
from bench.tests.conftest import TINY
from bench.tests.helpers import prepared

TASK = "fashion-mnist"


@pytest.fixture
def kept(finished: Path, tmp_path: Path) -> Path:
    """Return an archive of both runs of SGD and the first of Apollo."""
    directories = compatibility.find_run_directories(finished)
    archive.write((one for one in directories if one.verdict() is not None), tmp_path / "kept")
    return tmp_path / "kept"


def chosen(kept: Path, *settings: str, task: str = TASK, **more: Any) -> list[RunSpec]:
    options = {"settings": list(settings), "optimizers": "adagrad", "schedules": None, **more}
    found = selection.select(task, against=kept, **options)  # type: ignore[arg-type]
    assert found.baseline is not None
    specs = found.recipe.runs(found.optimizers, None, found.schedules)
    found.baseline.check(specs)
    return specs


def test_everything_but_the_optimizer_is_the_archives(kept: Path) -> None:
    specs = chosen(kept, "optimizer.lr=0.05")
    assert [(spec.name, spec.seed) for spec in specs] == [("adagrad", 3), ("adagrad", 4)]
    old = Baseline(kept, TASK).runs[0].spec
    for spec in specs:
        assert spec.shared() == old.shared()
        assert spec.optimizer.lr == 0.05


def test_decay_and_schedule_of_its_own(kept: Path, tmp_path: Path) -> None:
    """Decay is coupled to the archive's Apollo; one optimizer's schedule affects no other."""
    path = tmp_path / "own.toml"
    own = '[optimizers.mine]\nmethod = "adagrad"\nlr = 0.04\n'
    text = TINY.replace("lr = 0.5", "lr = 7.0").replace("width = 2", "width = 4")
    own += 'weight_decay = { equal_strength_to = "apollo" }\n'
    shape = '[schedules.cosine.overrides]\nmine = { kind = "constant" }\n'
    path.write_text(f"{text}\n{shape}{own}")
    [first, _] = chosen(kept, task=str(path), optimizers="mine")
    assert first.optimizer.weight_decay == pytest.approx(4e-4 * 0.5 / 0.04)
    assert first.train.schedule.overrides["mine"].kind == "constant"
    assert str(first.model) == "ResNet-8, width 2"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizers": "sgd"}, "holds runs of sgd already; select others with --optimizers, or"),
        ({"optimizers": None}, "it needs --optimizers"),
        ({"quick": True}, "--quick cannot be used with it"),
        (
            {"settings": ["train.batch_size=64"]},
            "(train.batch_size: 32 there, 64 asked for)",
        ),
        ({"settings": ["model.width=4"]}, "differ (model.width: 2 there, 4 asked for)"),
        ({"settings": ["seeds=[3, 9]"]}, "no run of the seed 9; there are 3, 4"),
        ({"task": "wordnet"}, "no runs of wordnet, only fashion-mnist"),
    ],
)
def test_what_does_not_fit_is_refused(kept: Path, options: dict[str, Any], expected: str) -> None:
    settings = options.pop("settings", [])
    with pytest.raises(ExperimentError) as caught:
        chosen(kept, *settings, **options)
    assert expected in str(caught.value)
    assert str(kept) in str(caught.value)


def test_other_data_are_refused(kept: Path) -> None:
    baseline = Baseline(kept, TASK)
    own = baseline.runs[0].manifest["data"]["fingerprint"]
    baseline.check_data({TASK: own, "wordnet": "x"})
    with pytest.raises(ExperimentError, match=f"other data .fingerprint {own[:12]} there"):
        baseline.check_data({TASK: "0" * 64})


def test_a_report_shows_all(kept: Path, tmp_path: Path) -> None:
    [spec, _] = chosen(kept, "optimizer.lr=0.05")
    directory, workload = prepared(tmp_path / "own" / "runs" / spec.label, spec)
    train(directory, spec, workload)
    [summary] = page.write([tmp_path / "own", kept], tmp_path / "own")
    counts = {row.name: len(row.runs) for row in summary.rows}
    assert counts == {"sgd": 2, "apollo": 1, "adagrad": 1}
