"""Whether a step is traced, by a compiler or by a transform of torch.func."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Return whether a tracer or a transform of torch.func sees the operations of this step."""
    if torch.compiler.is_compiling():
        return True
    mode, key = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return (
        mode(key.PROXY) is not None
        or mode(key.FAKE) is not None
        or mode(key.FUNCTIONAL) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
