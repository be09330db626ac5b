"""The comparison of lengths: the chosen settings, and the tables."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from apollo_bench.config import recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lengths() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lengths", ROOT / "scripts" / "lengths.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trial_of(spec: Any, value: float | None) -> SimpleNamespace:
    """Return a run as load_runs does, with this validation perplexity; None: diverged."""
    return SimpleNamespace(
        spec=spec,
        verdict="diverged" if value is None else "finished",
        result={},
        final=lambda name: value if name == "valid_perplexity" else None,
    )


@pytest.fixture
def searched(
    lengths: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[SimpleNamespace]]:
    """Return a folder with a search in which each optimizer's second trial is best."""
    (tmp_path / "multi30k").mkdir()
    for length in ("16th", "quarter", "whole"):
        name = f"multi30k/length-{length}.toml"
        shutil.copy(ROOT / "results" / name, tmp_path / name)
    planned = lengths.planned("multi30k/length-quarter-tuning", tmp_path)
    runs = [trial_of(spec, 10.0 if spec.sweep.value == 2 else 20.0) for spec in planned]
    monkeypatch.setattr(lengths.loading, "load_runs", lambda paths: runs)
    return tmp_path, runs


def test_every_optimizer_has_six_trials(lengths: ModuleType) -> None:
    for task in lengths.TASKS:
        planned = lengths.planned(f"{task}/length-16th-tuning")
        by_method: dict[str, int] = {}
        for spec in planned:
            method = spec.name.removesuffix(lengths.OTHER_WARMUP)
            by_method[method] = by_method.get(method, 0) + 1
        assert set(by_method.values()) == {6}
        assert set(by_method) <= set(lengths.LABELS)


def test_the_short_warmup_wins_a_tie(
    lengths: ModuleType, searched: tuple[Path, list[SimpleNamespace]]
) -> None:
    plan = lengths.chosen("multi30k", "quarter", searched[0])
    assert list(plan.optimizers) == ["sgd", "adamw", "radam", "muon", "apollo"]
    assert plan.optimizers["sgd"].lr == 0.158
    assert plan.optimizers["apollo"].lr == 1.58


def test_the_better_warmup_is_chosen(
    lengths: ModuleType, searched: tuple[Path, list[SimpleNamespace]]
) -> None:
    folder, runs = searched
    for run in runs:
        if run.spec.name == "apollo-long-warmup" and run.spec.sweep.value == 3:
            run.final = lambda name: 5.0
    plan = lengths.chosen("multi30k", "quarter", folder)
    assert "apollo" not in plan.optimizers
    assert plan.optimizers["apollo-long-warmup"].lr == 15.8


def test_a_warmup_that_always_diverged_is_not_chosen(
    lengths: ModuleType, searched: tuple[Path, list[SimpleNamespace]]
) -> None:
    folder, runs = searched
    runs[:] = [trial_of(run.spec, None) if run.spec.name == "sgd" else run for run in runs]
    assert "sgd-long-warmup" in lengths.chosen("multi30k", "quarter", folder).optimizers


def test_rates_are_multiples_of_the_best(
    lengths: ModuleType, searched: tuple[Path, list[SimpleNamespace]]
) -> None:
    best = lengths.chosen("multi30k", "quarter", searched[0]).optimizers["apollo"]
    planned = lengths.planned("multi30k/length-quarter-rates", searched[0])
    assert [spec.optimizer.lr / best.lr for spec in planned] == pytest.approx(
        [0.1, 0.316, 1, 3.16, 10]
    )
    decay = {round(spec.optimizer.lr * spec.optimizer.weight_decay, 12) for spec in planned}
    assert decay == {1e-7}  # as in all trials
    assert {(spec.name, spec.seed) for spec in planned} == {("apollo", 1)}


def test_weights_stand_still_after_half_of_a_run(
    lengths: ModuleType, searched: tuple[Path, list[SimpleNamespace]]
) -> None:
    [spec] = lengths.planned("multi30k/length-quarter-still", searched[0])
    [moving] = lengths.planned("multi30k/length-quarter-curvature", searched[0])
    assert spec.optimizer == moving.optimizer
    schedule, before = spec.train.schedule, moving.train.schedule
    assert (schedule.milestones[0], schedule.factor) == (0.5 * schedule.updates, 1e-6)
    assert schedule.model_copy(update={"factor": before.factor}) == before


@pytest.mark.parametrize("length", ["quarter", "whole"])
def test_the_options_make_the_recipe_what_was_chosen(
    lengths: ModuleType, searched: tuple[Path, list[SimpleNamespace]], length: str
) -> None:
    plan = lengths.chosen("multi30k", length, searched[0])
    words = lengths.options(plan)
    settings = words[3::2]
    assert words[:3] == ["--optimizers", ",".join(plan.optimizers), "--set"]
    made = recipe.load(str(searched[0] / "multi30k" / f"length-{length}.toml"), settings)
    assert made.runs(list(plan.optimizers)) == plan.runs()
    assert made.runs(list(plan.optimizers)) == lengths.planned(
        f"multi30k/length-{length}-comparison", searched[0]
    )


def test_the_lead_is_positive_where_apollo_is_better(
    lengths: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"apollo": {1: 3.0, 2: 4.0, 3: 5.0}, "sgd": {1: 2.0, 2: 2.0, 3: 2.0}}
    runs = {
        name: [
            SimpleNamespace(spec=SimpleNamespace(seed=seed), final=lambda _, value=value: value)
            for seed, value in of_seed.items()
        ]
        for name, of_seed in values.items()
    }
    monkeypatch.setattr(lengths, "by_method", lambda path: runs)
    bleu = lengths.lead("multi30k", "whole", "sgd", lengths.FAMILIES["multi30k"].final)
    # interval of 1, 2, 3: 2 ± 4.303 / sqrt(3)
    assert (bleu.low, bleu.high) == pytest.approx((-0.4842, 4.4842), abs=1e-4)
    perplexity = lengths.FAMILIES["multi30k"].monitored  # less is better
    assert lengths.lead("multi30k", "whole", "sgd", perplexity).mean == -2.0


@pytest.mark.parametrize(
    ("lr", "end"), [(0.5, ", the smallest tried"), (1.0, ""), (2.0, ", the largest tried")]
)
def test_a_rate_at_an_end_of_the_search_is_marked(lengths: ModuleType, lr: float, end: str) -> None:
    run = SimpleNamespace(
        spec=SimpleNamespace(name="sgd", seed=1, optimizer=SimpleNamespace(lr=lr)),
        verdict="finished",
        final=lambda name: 3.0,
    )
    cell = lengths._score([run], "accuracy", [0.5, 1.0, 2.0])
    assert cell == f"3.00 (lr {lr:.3g}{end}, warmup 2 %)"


def test_the_rates_of_both_warmups_were_tried(lengths: ModuleType) -> None:
    assert lengths.tried("cifar10", "whole", "apollo") == [0.632, 2.0, 6.32]


def test_the_figure_shows_every_measured_lead(lengths: ModuleType) -> None:
    drawn = lengths.figure()
    for axes, task in zip(drawn.axes, lengths.TASKS, strict=True):
        there = [
            lengths.by_method(lengths.RESULTS / f"{task}/length-{x}-comparison")
            for x in lengths.drawn_lengths(task)
            if f"{task}/length-{x}-comparison" in lengths.measured()
        ]
        others = ("sgd", "adamw", "radam", "muon")  # all images have no RAdam and no Muon
        expected = [sum(name in found for found in there) for name in others]
        assert [len(bars.lines[0].get_xdata()) for bars in axes.containers] == (
            expected if there else []
        )


def test_missing_measurements_are_reported(lengths: ModuleType, tmp_path: Path) -> None:
    [line] = lengths.tables("wordnet", tmp_path)
    assert line == (
        "Not measured yet: wordnet, length 1/16; length 1/4; length 1; "
        "length 1, better of two rates."
    )
    assert list(lengths.curvature(tmp_path)) == ["Not measured yet."]
    assert list(lengths.rates(tmp_path)) == ["Not measured yet."]


def test_all_images_have_the_settings_of_the_search(lengths: ModuleType) -> None:
    whole, everything = (lengths.chosen("cifar10", length) for length in ("whole", "all"))
    assert len(everything.optimizers) == 3
    for name, settings in everything.optimizers.items():
        length = {"warmup_steps"}  # of Apollo; follows the length of the training
        expected = whole.optimizers[name].model_dump(exclude=length)
        assert settings.model_dump(exclude=length) == expected
    assert "length-all" not in " ".join(n for n in lengths.pieces() if "cifar10" not in n)


def test_a_lower_rate_keeps_all_else(
    lengths: ModuleType, searched: tuple[Path, list[SimpleNamespace]]
) -> None:
    whole, lower = (
        lengths.chosen("multi30k", length, searched[0]).optimizers for length in ("whole", "lower")
    )
    for name, settings in lower.items():
        before = whole[name]
        assert settings.lr == pytest.approx(before.lr / 10**0.5, rel=5e-3)
        decay = before.lr * before.weight_decay  # of equal strength
        assert settings.lr * settings.weight_decay == pytest.approx(decay)


def test_the_better_of_two_rates_counts(
    lengths: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By validation perplexity, which must be finite in all runs."""

    def run_of(name: str, value: float | None) -> SimpleNamespace:
        spec = SimpleNamespace(name=name, seed=1)
        return SimpleNamespace(spec=spec, final=lambda metric: value)

    values: dict[str, dict[str, float | None]] = {
        "whole": {"sgd": 15.0, "adamw": 14.6, "apollo": 14.5},
        "lower": {"sgd": 15.5, "adamw": 12.4, "apollo": None},
    }

    def by_method(path: Path) -> dict[str, list[SimpleNamespace]]:
        given = values[path.name.split("-")[1]]
        return {name: [run_of(name, value)] for name, value in given.items()}

    monkeypatch.setattr(lengths, "by_method", by_method)
    better = lengths.runs_of("multi30k", "lower")
    assert {name: run.final("") for name, [run] in better.items()} == {
        "sgd": 15.0,
        "adamw": 12.4,
        "apollo": 14.5,
    }
