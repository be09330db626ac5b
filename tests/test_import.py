"""``import apollo_qn`` needs torch alone and costs little beyond it."""

from __future__ import annotations

import json
import subprocess
import sys

import apollo_qn

SCRIPT = """
import json, sys, time
import torch
brought = set(sys.modules)
start = time.process_time()
import apollo_qn
seconds = time.process_time() - start
print(json.dumps({"new": sorted(set(sys.modules) - brought), "seconds": seconds}))
"""


def test_import_brings_torch_alone() -> None:
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    ).stdout
    result = json.loads(out.splitlines()[-1])
    allowed = ("apollo_qn", "torch")
    foreign = {name.split(".")[0] for name in result["new"]} - set(allowed)
    assert foreign <= set(sys.stdlib_module_names)
    assert not any(name.startswith("apollo_bench") for name in result["new"])
    assert "apollo_qn.range_test" not in result["new"]  # imported when it is used
    assert result["seconds"] < 0.5


def test_all_names_can_be_imported_and_completed() -> None:
    assert "lr_range_test" in apollo_qn.__all__
    assert set(apollo_qn.__all__) <= set(dir(apollo_qn))
    for name in apollo_qn.__all__:
        assert getattr(apollo_qn, name).__module__.startswith("apollo_qn.")
