"""Comparison of Apollo's B with the diagonal of the Hessian, for small models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from apollo_qn.diagnostics.curvature import Names, check_apollo, last_rate, named
from apollo_qn.distributed import is_sharded
from apollo_qn.optimizer import Apollo
from apollo_qn.secant import accumulator
from apollo_qn.state import hyperparameters

Tensors: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class HessianDiagonal:
    """Diagonal of the Hessian: one float64 tensor per parameter name, in the parameter's shape.

    Attributes:
        mean: estimate of the diagonal.
        standard_error: standard error of each element; zeros if the diagonal is exact.
        probes: number of products with the Hessian.
    """

    mean: Tensors
    standard_error: Tensors
    probes: int


def hessian_diagonal(
    loss: Loss,
    params: Mapping[str, Tensor],
    probes: int = 100,
    *,
    generator: torch.Generator | None = None,
    at_once: int = 1,
) -> HessianDiagonal:
    """Estimate the diagonal of the Hessian by Hutchinson's probes.

    For a vector v of random signs, v * (H v) has the mean diag(H). The variance of an element is
    the sum of squares of the rest of its row (Bekas, Kokiopoulou & Saad, 2007). The estimate is
    therefore exact if H is diagonal. Otherwise its standard error falls with the root of
    ``probes``. ::

        def loss(params):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

        estimate = hessian_diagonal(loss, dict(model.named_parameters()), probes=200)

    H v is the forward derivative of ``torch.func.grad``, so the gradient of every operation of the
    loss needs a forward derivative. Linear, convolutional, embedding, norm, RNN and GRU layers have
    one. If the model has attention, call it under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``. If it has an LSTM on a CPU, call it under
    ``torch.backends.mkldnn.flags(enabled=False)``.

    The loss must be the same at every call: turn dropout off, and put batch normalization in
    ``eval()``. Curvature that lies in kinks of the loss (ReLU) is not seen.

    Args:
        loss: function of a dict like ``params`` that returns a scalar.
        params: full real tensors by name.
        probes: number of probes, >= 2. A probe costs about two gradients.
        generator: random generator of the probes, on the parameters' device.
        at_once: number of probes that go through the model together (``torch.func.vmap``), >= 1.
            More is faster on small models and needs that many times the memory.

    Raises:
        ValueError: ``probes`` or ``at_once`` are out of their range, or a parameter is complex,
            sharded or no floating tensor.
    """
    params = _checked(params)
    _check_count("probes", probes, 2)
    _check_count("at_once", at_once, 1)
    gradient = torch.func.grad(loss)

    def product(v: Tensors) -> Tensors:
        result: Tensors = torch.func.jvp(gradient, (params,), (v,))[1]
        return result

    mean = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in params.items()}
    squares = {name: torch.zeros_like(x) for name, x in mean.items()}
    for start in range(0, probes, at_once):
        # drawn one by one, so that the numbers do not depend on at_once
        signs = [_signs(params, generator) for _ in range(min(at_once, probes - start))]
        for i, (v, Hv) in enumerate(_products(product, signs), start + 1):
            for name in params:
                sample = (v[name] * Hv[name]).detach().to(mean[name].dtype)
                # Welford's algorithm gives a variance of exactly 0 for equal samples
                before = sample - mean[name]
                mean[name] += before / i
                squares[name] += before * (sample - mean[name])
    error = {name: (x / (probes * (probes - 1))).sqrt() for name, x in squares.items()}
    return HessianDiagonal(mean, error, probes)


def exact_hessian_diagonal(
    loss: Loss, params: Mapping[str, Tensor], *, at_once: int = 1
) -> HessianDiagonal:
    """Compute the diagonal exactly, with one product with the Hessian per element of ``params``.

    Arguments and errors are those of :func:`hessian_diagonal`. ::

        diagonal = exact_hessian_diagonal(loss, dict(model.named_parameters()), at_once=64)
        for comparison in compare(optimizer, diagonal, model.named_parameters()):
            print(comparison.name, comparison.spearman)
    """
    params = _checked(params)
    _check_count("at_once", at_once, 1)
    mean = {}
    for name, p in params.items():

        def gradient(theta: Tensor, name: str = name) -> Tensor:
            g: Tensor = torch.func.grad(loss)({**params, name: theta})[name]
            return g

        def product(v: Tensors, p: Tensor = p, gradient: Any = gradient) -> Tensors:
            return {"Hv": torch.func.jvp(gradient, (p,), (v["v"],))[1]}

        found = []
        for start in range(0, p.numel(), at_once):
            units = []
            for i in range(start, min(start + at_once, p.numel())):
                v = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
                v[i] = 1
                units.append({"v": v.view(p.shape)})
            for i, (_, Hv) in enumerate(_products(product, units), start):
                found.append(Hv["Hv"].detach().flatten()[i])
        mean[name] = (torch.stack(found).view(p.shape) if found else torch.zeros_like(p)).to(
            _wide(p)
        )
    error = {name: torch.zeros_like(x) for name, x in mean.items()}
    return HessianDiagonal(mean, error, sum(p.numel() for p in params.values()))


def _products(
    product: Callable[[Tensors], Tensors], vectors: list[Tensors]
) -> Iterator[tuple[Tensors, Tensors]]:
    """Yield each vector with its product."""
    if len(vectors) == 1:
        yield vectors[0], product(vectors[0])
        return
    stacked = {name: torch.stack([v[name] for v in vectors]) for name in vectors[0]}
    products = torch.func.vmap(product)(stacked)
    for i, v in enumerate(vectors):
        yield v, {name: x[i] for name, x in products.items()}


def _signs(params: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensors:
    return {
        name: torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype) * 2 - 1
        for name, p in params.items()
    }


def _wide(p: Tensor) -> torch.dtype:
    return accumulator(p.device)


def _checked(params: Mapping[str, Tensor]) -> Tensors:
    for name, p in params.items():
        if is_sharded(p) or not p.is_floating_point():
            kind = "a DTensor" if is_sharded(p) else str(p.dtype)
            raise ValueError(f"params must be full real tensors, got {kind} for {name!r}")
    return {name: p.detach() for name, p in params.items()}


def _check_count(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name} must be a whole number >= {smallest}, got {value!r}")


@dataclass(frozen=True)
class Comparison:
    """Apollo's B and the Hessian's diagonal of one tensor, as float64 vectors in CPU memory.

    Undefined numbers are NaN, such as the correlation of a single element.

    Attributes:
        name: name of the parameter.
        B: Apollo's B divided by the learning rate: an estimate of the loss's curvature.
        hessian: diagonal of the Hessian of the function that Apollo minimizes.
        standard_error: standard error of each element of ``hessian``.
    """

    name: str
    B: Tensor
    hessian: Tensor
    standard_error: Tensor

    @cached_property
    def pearson(self) -> float:
        """Return Pearson's correlation, in [-1, 1]."""
        return _correlation(self.B, self.hessian)

    @cached_property
    def spearman(self) -> float:
        """Return Spearman's rank correlation, in [-1, 1]. Ties share their mean rank."""
        return _correlation(_ranks(self.B), _ranks(self.hessian))

    @cached_property
    def signs(self) -> float:
        """Return the share of equal signs among elements more than two standard errors from 0."""
        known = self.hessian.abs() > 2 * self.standard_error
        if not bool(known.any()):
            return math.nan
        return float((self.B.sign() == self.hessian.sign())[known].double().mean())

    @cached_property
    def relative_error(self) -> float:
        """Return \\|\\|B - hessian\\|\\| / \\|\\|hessian\\|\\|, which is 1 for B = 0."""
        return _share(self.B - self.hessian, self.hessian)

    @cached_property
    def noise(self) -> float:
        """Return the relative error that too few probes alone explain, >= 0."""
        return _share(self.standard_error, self.hessian)

    @cached_property
    def trace_ratio(self) -> float:
        """Return the sum of B divided by the sum of hessian: 1 if the mean curvature is right."""
        total = float(self.hessian.sum())
        return float(self.B.sum()) / total if total else math.nan


def compare(
    optimizer: Apollo, diagonal: HessianDiagonal, names: Names | None = None
) -> list[Comparison]:
    """Compare Apollo's B with the Hessian's diagonal at the same parameters.

    Expect little agreement element by element. A tensor learns one number per step, the curvature
    along its own last displacement d, and spreads it as d^2. B holds what earlier steps left, the
    noise of batches, and the other elements of the Hessian, because d'Hd is not d'diag(H)d. The
    average of gradients delays B too. B is exact for tensors of one element without noise, at
    beta = 0 and eps = 0.

    An example is a network of three tanh layers after 120 full batches. The rank correlations were
    -0.2 to 0.5, and 40 to 70 per cent of the signs agreed. Sums (``trace_ratio``) were wrong by
    factors of 2 to 7, some in sign.

    B estimates the learning rate times the curvature (section 3.2 of the paper), so it is divided
    by the rate of the last step here. During warmup, or soon after a scheduler's step, B mixes
    several rates. The Hessian is that of the function that Apollo minimizes: L2 decay adds
    ``weight_decay``, and ``maximize`` changes the sign.

    Args:
        optimizer: an Apollo that has taken steps and holds the parameters of ``diagonal``.
        diagonal: the Hessian's diagonal for some or all parameters.
        names: (name, parameter) pairs as in :func:`apollo_qn.diagnostics.measure`, with the names
            of ``diagonal``.

    Returns:
        One comparison per name of ``diagonal``, in its order.

    Raises:
        TypeError: the optimizer is not an Apollo.
        ValueError: the diagonal has a name or a shape that no stepped parameter has.

    Example::

        estimate = hessian_diagonal(loss, dict(model.named_parameters()), probes=200)
        for comparison in compare(optimizer, estimate, model.named_parameters()):
            print(comparison.name, comparison.spearman, comparison.signs)
    """
    check_apollo(optimizer)
    known = {name: (p, group) for group, mine in named(optimizer, names) for name, p in mine}
    found = []
    for name, mean in diagonal.mean.items():
        if name not in known:
            raise ValueError(
                f"diagonal must hold names of parameters, got {name!r}, which is none of "
                f"{', '.join(known)}; give names=model.named_parameters()"
            )
        p, group = known[name]
        if "hessian_diag" not in optimizer.state.get(p, {}):
            raise ValueError(f"parameter {name!r} has not been stepped, it has no B to compare")
        B = optimizer.state[p]["hessian_diag"]
        if B.shape != mean.shape:
            raise ValueError(
                f"diagonal of {name!r} must have its parameter's shape {tuple(B.shape)}, "
                f"got {tuple(mean.shape)}"
            )
        h = hyperparameters(group)
        hessian = -mean if h.maximize else mean
        if h.l2:
            hessian = hessian + h.weight_decay
        found.append(
            Comparison(
                name,
                _vector(B) / last_rate(optimizer, p, group),
                _vector(hessian),
                _vector(diagonal.standard_error[name]),
            )
        )
    return found


def _vector(x: Tensor) -> Tensor:
    return x.detach().cpu().double().flatten()


def _share(part: Tensor, full: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(full))
    return float(torch.linalg.vector_norm(part)) / norm if norm else math.nan


def _correlation(x: Tensor, y: Tensor) -> float:
    if x.numel() < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    norms = float(torch.linalg.vector_norm(x)) * float(torch.linalg.vector_norm(y))
    return float(x @ y) / norms if norms else math.nan


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[place]
    return ranks
