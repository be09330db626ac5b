"""Measurements of Apollo's curvature during training, and its comparison with the Hessian.

Example::

    from apollo_qn import diagnostics

    recorder = diagnostics.Recorder(optimizer, SummaryWriter(), every=100)  # until detach()

    for tensor in diagnostics.measure(optimizer):  # at any time, after a step
        print(tensor.name, tensor.negative, tensor.rectified, tensor.step_ratio)

An optimizer that is not measured runs none of this code. A recorder is two hooks of the optimizer.
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
