"""The page: what it shows without a click, that it needs no network, and odd names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apollo_bench.config import recipe
from apollo_bench.report import curves, page
from apollo_bench.runs.run_directory import RunDirectory
from bench.tests.report.made_up_runs import made_up


def written(folder: Path, with_figures: bool = False) -> str:
    refresh = None if with_figures else 5.0
    page.write([folder], folder, refresh=refresh, with_figures=with_figures)
    return (folder / "report.html").read_text()


def data(html: str) -> list[list[dict[str, Any]]]:
    found = re.search(r'<script type="application/json" id="curves">(.*?)</script>', html)
    assert found is not None
    panels: list[list[dict[str, Any]]] = json.loads(found[1])
    return panels


@pytest.fixture
def compared(recipe_file: Path, tmp_path: Path) -> Path:
    plan = recipe.load(str(recipe_file))
    for name in ("sgd", "apollo"):
        for seed in (1, 2):
            made_up(tmp_path / "all", plan.run(name, seed), [50.0, 60.0 + seed])
    return tmp_path / "all"


def test_the_page_needs_no_network(compared: Path) -> None:
    html = written(compared, with_figures=True)
    assert html.count("<script>") == 2
    bokeh, own = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert "Bokeh" in bokeh
    assert "IntersectionObserver" in own
    rest = html.replace(bokeh, "")
    rest = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", rest)
    assert not re.search(r"https?:|<link|@import|url\(|fetch\(|XMLHttpRequest|\ssrc=\"(?!\")", rest)


def test_curves_come_first_and_the_wide_table_after_a_click(compared: Path) -> None:
    html = written(compared)
    order = ['data-panel="0"', "<table>", "<details>", "All columns", "Settings", "Runs", "notes"]
    body = html[html.index("<body") :]
    assert sorted(order, key=body.index) == order
    brief = body[body.index("<table>") : body.index("<details>")]
    titles = re.findall("<th>(.*?)</th>", brief)
    lead = "Apollo&#39;s lead [95 % interval]"
    assert titles == ["optimizer", "test accuracy (%)", lead, "runs"]
    everything = body[body.index("All columns") : body.index("Settings")]
    assert "optimizer step (ms)" in everything
    assert "wall time (s)" in everything


def test_figures_and_their_links_are_left_out_while_runs_go_on(compared: Path) -> None:
    html = written(compared)
    assert 'data-refresh="5.0"' in html
    assert "Figures for papers" not in re.sub("<noscript>.*</noscript>", "", html)
    assert not list(compared.glob("*.png"))
    html = written(compared, with_figures=True)
    assert "data-refresh" not in html[: html.index("<script")]
    for link in ("training_loss.png", "training_loss.svg"):
        assert f'href="{link}"' in html
        assert (compared / link).exists()


def test_every_run_says_where_it_comes_from(compared: Path, tmp_path: Path) -> None:
    [first, *_] = sorted((compared / "runs").iterdir())
    manifest = RunDirectory(first).read()
    manifest |= {"created": "2026-01-02T03:04:05+00:00", "commit": "0123abcd+changes"}
    manifest["command"] = ["/somewhere/apollo-bench", "compare", "my task"]
    (first / "run.json").write_text(json.dumps(manifest))
    (first / "tensorboard").mkdir()
    html = written(compared)
    row = next(row for row in html.split("<tr>") if f">{first.name}</a>" in row)
    assert f'<a href="runs/{first.name}">' in row
    assert f'<a href="runs/{first.name}/tensorboard">TensorBoard</a>' in row
    for text in ("2026-01-02T03:04:05+00:00", "0123abcd+changes", manifest["machine"]["cpu"]):
        assert text in row
    assert "apollo-bench compare &#39;my task&#39;" in row
    assert "tensorboard --logdir runs" in html
    # a manifest of an earlier version, and a report elsewhere
    for name in ("created", "commit", "search"):
        del manifest[name]
    (first / "run.json").write_text(json.dumps(manifest))
    page.write([compared], tmp_path / "else where", with_figures=False)
    text = (tmp_path / "else where" / "report.html").read_text()
    assert f'<a href="../all/runs/{first.name}">' in text


def test_the_cost_of_the_search_stands_beside_the_result(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file))
    for name, trials in (("sgd", 7), ("apollo", None)):
        directory = made_up(tmp_path, plan.run(name, 1), [50.0, 60.0])
        manifest = directory.read()
        manifest["search"] = trials and {"trials": trials, "seconds": 366.0}
        directory.manifest.write_text(json.dumps(manifest))
    html = written(tmp_path)
    brief = html[html.index("<table>") : html.index("<details>")]
    assert "search for settings" in brief
    assert "7 trials, 6.1 min" in brief


def test_a_text_cannot_end_the_script(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title = "accuracy</script><script>alert(1)</script>"
    monkeypatch.setattr(curves, "panels", lambda _: [[{"title": title, "curves": []}]])
    html = written(compared)
    assert "alert(1)</script>" not in html
    assert data(html)[0][0]["title"] == title
