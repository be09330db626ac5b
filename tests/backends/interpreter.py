"""Triton's interpreter on CPU tensors, with small blocks and without needless work."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

AVAILABLE = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
REASON = "Triton's interpreter is for machines without a GPU, and needs Triton"

SetSizes = Callable[..., None]

# sizes of a block and of the smallest run, and the most runs of a tensor: small, for borders
BLOCK, RUN, RUNS = 64, 128, 4


def interpret(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the Triton back end serve the CPU; return a function that sets other sizes."""
    import triton.language as tl
    from triton.runtime import interpreter

    from apollo_qn.backends import triton

    monkeypatch.setattr(triton, "DEVICES", {"cuda", "cpu"})

    # each call of a helper patches Triton's language for the interpreter; once per launch suffices
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    # the interpreter truncates where a GPU rounds to nearest (Triton 3.7)
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        bits = rounded.view(torch.uint16).numpy().reshape(source.data.shape)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)

    return set_sizes(monkeypatch)


def set_sizes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set small blocks and runs; return a function that sets others."""
    from apollo_qn.backends.triton import kernel, launch_schedule

    def sizes(block: int = BLOCK, run: int = RUN, runs: int = RUNS, cache: int = 1 << 20) -> None:
        monkeypatch.setattr(kernel, "BLOCK", block)
        monkeypatch.setattr(kernel, "RUNS", runs)
        monkeypatch.setattr(launch_schedule, "RUN", run)
        monkeypatch.setattr(launch_schedule, "_budget", lambda _: launch_schedule.WINDOW * cache)

    sizes()
    return sizes
