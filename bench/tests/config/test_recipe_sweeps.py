"""The runs of a sweep: learning rates, decays, and a selection of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_bench.config import recipe
from apollo_bench.config.optimizer_settings import ApolloSettings
from apollo_bench.config.schema import SweepKind
from apollo_bench.errors import ExperimentError
from bench.tests.config.test_recipe import error_of
from bench.tests.conftest import TINY


def sweep_of(kind: SweepKind, lines: str, path: Path) -> list[recipe.RunSpec]:
    path.write_text(f"{TINY}\n[sweeps.{kind}]\n{lines}\n")
    return recipe.load(str(path)).sweep(kind, seeds=1)


def test_learning_rates_of_a_sweep_keep_the_strength_of_decay(recipe_file: Path) -> None:
    """Figure 2: rates x 0.2 ... 10, decay re-coupled by the factor."""
    plan = recipe.load(str(recipe_file))
    specs = sweep_of("lr-robustness", "values = [0.2, 1, 2, 10]", recipe_file)
    assert len(specs) == 4 * 4
    assert len({spec.label for spec in specs}) == len(specs)
    assert specs[0].label == "fashion-mnist-sgd-cosine-lr-x0.2-seed3"
    for spec in specs:
        base = plan.run(spec.name, 3).optimizer
        assert spec.sweep is not None
        factor = spec.sweep.value
        own = spec.optimizer
        assert own.lr == pytest.approx(factor * base.lr)
        assert own.lr * own.weight_decay == pytest.approx(base.lr * base.weight_decay)  # type: ignore[operator]
        if isinstance(own, ApolloSettings) and isinstance(base, ApolloSettings):
            assert base.warmup_init_lr is not None
            assert own.warmup_init_lr == pytest.approx(factor * base.warmup_init_lr)
        if factor == 1:
            assert own == base
        assert recipe.RunSpec.model_validate(spec.model_dump()) == spec


def test_decays_of_a_sweep(recipe_file: Path) -> None:
    """Figure 4: optimizers that state a number get the value; the others follow by eq. (14)."""
    specs = sweep_of("weight-decay", "values = [1e-4, 9e-4]", recipe_file)
    for spec in specs:
        assert spec.sweep is not None
        own = spec.optimizer
        if spec.name in ("sgd", "apollo"):
            assert own.weight_decay == spec.sweep.value
        else:
            assert own.weight_decay * own.lr == pytest.approx(spec.sweep.value * 0.5)  # type: ignore[operator]
    assert specs[-1].label == "fashion-mnist-apollo-cosine-decay-0.0009-seed3"


def test_a_sweep_of_some(recipe_file: Path) -> None:
    specs = sweep_of("weight-decay", 'values = [1e-4]\noptimizers = ["sgd"]', recipe_file)
    assert [spec.name for spec in specs] == ["sgd"]
    plan = recipe.load(str(recipe_file))
    assert {spec.name for spec in plan.sweep("weight-decay", ["adam", "radam"])} == {
        "adam",
        "radam",
    }
    with pytest.raises(ExperimentError, match=r"no table \[sweeps.lr-robustness\] in this recipe"):
        plan.sweep("lr-robustness")
    for wrong, expected in (
        ("values = [2, 1]", "values are [2.0, 1.0], allowed are increasing values"),
        ('values = [1]\noptimizers = ["x"]', "sweeps.weight-decay.optimizers is ['x'], allowed"),
        ('values = [1]\nschedules = ["x"]', "sweeps.weight-decay.schedules is ['x'], allowed"),
    ):
        text = f"{TINY}\n[sweeps.weight-decay]\n{wrong}\n"
        assert expected in error_of(text, recipe_file)
    text = f"{TINY}\n[sweeps.momentum]\nvalues = [1]\n"
    assert "'lr-robustness' or 'weight-decay'" in error_of(text, recipe_file)
    for text, expected in (
        ("compare.optimizers = ['x']\n", "compare.optimizers is ['x'], allowed are some of sgd, "),
        ("compare.schedules = ['x']\n", "compare.schedules is ['x'], allowed are some of cosine"),
    ):
        assert expected in error_of(text + TINY, recipe_file)
