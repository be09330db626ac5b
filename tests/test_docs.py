"""The code of the documentation's pages runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[1] / "docs/low_precision.md"


def test_low_precision() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    optimizer = names["optimizer"]
    optimizer.step()
    for state in optimizer.state.values():
        assert state["hessian_diag"].dtype is torch.float32
        assert state["compensation"].dtype is torch.bfloat16
