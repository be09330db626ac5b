"""What Apollo's curvature looks like while it trains, and how near it is to the Hessian.

::

    from apollo_qn import diagnostics

    recorder = diagnostics.Recorder(optimizer, SummaryWriter(), every=100)  # until detach()

    for tensor in diagnostics.measure(optimizer):  # at any time, after a step
        print(tensor.name, tensor.negative, tensor.rectified, tensor.step_ratio)

Nothing of this is in an optimizer that is not measured: the recorder is two of its hooks.
"""

from apollo_qn.diagnostics.curvature import (
    Corrections,
    TensorDiagnostics,
    coming_corrections,
    measure,
    overall,
)
from apollo_qn.diagnostics.hessian import (
    Comparison,
    HessianDiagonal,
    compare,
    exact_hessian_diagonal,
    hessian_diagonal,
)
from apollo_qn.diagnostics.picture import plot
from apollo_qn.diagnostics.recorder import Recorder, to_tensorboard

__all__ = [
    "Comparison",
    "Corrections",
    "HessianDiagonal",
    "Recorder",
    "TensorDiagnostics",
    "coming_corrections",
    "compare",
    "exact_hessian_diagonal",
    "hessian_diagonal",
    "measure",
    "overall",
    "plot",
    "to_tensorboard",
]
