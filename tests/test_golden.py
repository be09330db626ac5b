"""Every back end follows the trajectories that are committed in golden.json."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from apollo_qn import Apollo
from tests import make_golden, tolerances
from tests.helpers import BACK_ENDS, DEVICE, Comparison

GOLDEN: dict[str, dict[str, Any]] = json.loads(make_golden.PATH.read_text())


@pytest.mark.parametrize("block", [4, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@BACK_ENDS
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(
    name: str, back_end: dict[str, Any], dtype: torch.dtype, block: int, set_block: Any
) -> None:
    set_block(block)
    wanted = GOLDEN[name]
    p = torch.nn.Parameter(torch.tensor(make_golden.THETA, dtype=dtype, device=DEVICE))
    optimizer = Apollo([p], **back_end, **wanted["settings"])
    compare = Comparison()
    limit, limit_B = tolerances.GOLDEN[dtype]
    for t, theta in enumerate(wanted["theta"]):
        p.grad = torch.from_numpy(make_golden.gradient(t)).to(DEVICE, dtype)
        optimizer.step()
        compare.check("theta", p, np.array(theta), limit)
    state = optimizer.state[p]
    compare.check("m", state["exp_avg"], np.array(wanted["exp_avg"]), limit)
    compare.check("B", state["hessian_diag"], np.array(wanted["hessian_diag"]), limit_B)


def test_golden_is_what_the_script_writes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_golden, "PATH", tmp_path / "golden.json")
    make_golden.main()
    made = json.loads((tmp_path / "golden.json").read_text())
    assert made.keys() == GOLDEN.keys()
    for name, case in GOLDEN.items():
        assert made[name]["settings"] == case["settings"]
        np.testing.assert_allclose(made[name]["theta"], case["theta"], rtol=1e-10)
