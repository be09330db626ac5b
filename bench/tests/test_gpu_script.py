"""benchmarks/gpu.py: a small run on the CPU, and its verdicts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.parametrize("package", ["apollo_qn", "apollo_bench", "tests"])
def test_the_parts_import_from_the_checkout(script: Any, package: str) -> None:
    """They need no installed package."""
    assert any((Path(folder) / package / "__init__.py").is_file() for folder in script.SOURCES)


@pytest.mark.slow
def test_a_small_form_on_the_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "parts.json").read_text())
    assert [one["part"] for one in outcomes] == ["about", "tests:quick", "bench:many-tensors/1000"]
    assert "passed" in outcomes[1]["message"]
    record = json.loads((tmp_path / "bench-many-tensors-1000.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["AdamW fused"]["ratio"] == 1.0
    assert rows["Apollo foreach"]["milliseconds"] > 0
    assert "Apollo foreach" in done.stdout
    assert (tmp_path / "summary.txt").read_text() in done.stdout


def test_without_a_gpu_one_part_says_so(script: Any, tmp_path: Path) -> None:
    part = script.Part("about", 60.0, [sys.executable, str(SCRIPT), "--part", "about"])
    part.command += ["--device", "cuda:99", "--out", str(tmp_path)]
    outcome = script.run_part(part, 60.0, "cpu", tmp_path)
    assert outcome["exit_status"] == 1
    assert "sees" in outcome["message"]


def test_a_part_that_takes_too_long_is_ended(script: Any, tmp_path: Path) -> None:
    part = script.Part("slow", 1.0, [sys.executable, "-c", "import time; time.sleep(60)"])
    outcome = script.run_part(part, 0.3, "cpu", tmp_path)
    assert (outcome["exit_status"], outcome["message"]) == (None, "out of time")
    assert outcome["seconds"] < 30


def test_verdicts(script: Any, tmp_path: Path) -> None:
    row = {"name": script.MINE, "ratio": 1.2, "speedup over the reference": 12.0}
    about = {"element_bytes": 4, "parameters": 1_300_000_000, "copy, GB/s": 4000.0}
    window = {"window": 1e9, "milliseconds": 14.5}  # 52 GB in 14.5 ms: 3,586 GB/s
    for name in ("transformer-base", "decoder-1.3b"):
        (tmp_path / f"bench-{name}.json").write_text(json.dumps({"rows": [row], **about}))
        few = {"window": 0.6, "milliseconds": 9.0}  # fewer values: not the criterion
        (tmp_path / f"sweep-{name}.json").write_text(json.dumps({"rows": [few, window]}))
    done = [{"part": "tests:cuda", "exit_status": 1, "message": "1 failed"}]
    found = {what: verdict for what, _, verdict in script.criteria(tmp_path, done)}
    assert found["tests:cuda"] == "MISSED"
    assert found["transformer-base: step <= 1.15 x AdamW fused"] == "MISSED"
    assert found["decoder-1.3b: step <= 1.45 x AdamW fused"] == "pass"
    assert found["decoder-1.3b: >= 10 x the speed of the reference"] == "pass"
    assert found["decoder-1.3b: >= 85% of a copy's bandwidth at 10 values"] == "pass"
    assert found["resnext-50: AdamW compiled measured"] == "MISSED"
    assert found["resnet-110: step <= 1.0 x AdamW fused"] == "MISSED"  # not measured


def test_a_sweep_begins_and_ends_with_the_shipped_values(script: Any) -> None:
    shipped = script.Tunables(8192, 0.3, 1024, 4)
    found = script.tunables(shipped)
    assert found[0] == found[-1] == shipped
    assert len(set(found)) == len(found) - 1 == 9


def test_the_times_of_all_parts_but_compiling_fit(script: Any, tmp_path: Path) -> None:
    needed = [part for part in script.parts("cuda", False, tmp_path)]
    seconds = sum(p.seconds for p in needed if not p.name.startswith("compiled"))
    assert seconds <= script.TOTAL < 9 * 60
