"""benchmarks/learning_rates.py: the tables on the pages are those of its committed runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
