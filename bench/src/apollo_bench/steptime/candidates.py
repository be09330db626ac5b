"""The optimizers that are timed, by name: every back end of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from apollo_bench.errors import ExperimentError
from apollo_qn import Apollo, ApolloW

Make: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]

PEER = "AdamW fused"
REFERENCE = "Apollo reference"
COMPILED = "AdamW compiled"
_MAX_COMPILED = 1000  # tensors; the compiler unrolls the loop over them


@dataclass(frozen=True)
class Candidate:
    """An optimizer that can be made for any parameters.

    ``family`` gives its color. ``values_moved`` is the smallest number of values per parameter that
    a step reads and writes. It follows from the algorithm, not from the implementation.
    """

    name: str
    family: str
    values_moved: int
    make: Make


def _torch(
    family: str, cls: Any, values_moved: int, fused: bool, **settings: Any
) -> list[Candidate]:
    back_ends = {"loop": {"foreach": False}, "foreach": {"foreach": True}}
    if fused:
        back_ends["fused"] = {"fused": True}
    return [
        Candidate(
            f"{cls.__name__} {name}", family, values_moved, partial(cls, **settings, **back_end)
        )
        for name, back_end in back_ends.items()
    ]


def _apollo(name: str, cls: Any = Apollo, **settings: Any) -> Candidate:
    return Candidate(name, "apollo", 7, partial(cls, **settings))


def _compiled_adamw(params: list[nn.Parameter]) -> Optimizer:
    if len(params) > _MAX_COMPILED:
        raise RuntimeError(f"{len(params):,} tensors would take long to compile")
    made = torch.optim.AdamW(params, capturable=not params[0].is_cpu)
    made.step = torch.compile(made.step)  # type: ignore[method-assign]
    return made


def _pytorch_optimizer(params: list[nn.Parameter]) -> Optimizer:
    from pytorch_optimizer import ApolloDQN  # type: ignore[import-not-found, unused-ignore]

    made: Optimizer = ApolloDQN(params, lr=1e-2)
    return made


CANDIDATES = {
    candidate.name: candidate
    for candidate in [
        # reads g, momentum and theta, writes the two last
        *_torch("sgd", torch.optim.SGD, 5, True, lr=1e-3, momentum=0.9),
        # reads g, m, v and theta, writes the three last
        *_torch("adam", torch.optim.Adam, 7, True),
        *_torch("adam", torch.optim.AdamW, 7, True),
        Candidate(COMPILED, "adam", 7, _compiled_adamw),
        *_torch("radam", torch.optim.RAdam, 7, False),
        _apollo(REFERENCE, foreach=False, fused=False),
        _apollo("Apollo foreach", foreach=True),
        _apollo("Apollo fused", fused=True),
        _apollo("Apollo fused L2", fused=True, weight_decay=5e-4),
        _apollo("ApolloW fused", ApolloW, fused=True, weight_decay=5e-4),
        _apollo("Apollo fused belief", fused=True, rebound="belief"),
        Candidate("pytorch-optimizer ApolloDQN", "other", 7, _pytorch_optimizer),
    ]
}


def choose_candidates(names: list[str] | None, device: str = "cpu") -> list[Candidate]:
    """Return the named candidates and always ``PEER``; None: all that are installed.

    On a CPU the compiled one must be named, because it takes minutes to compile.

    Raises:
        ExperimentError: unknown name.
    """
    for name in names or []:
        if name not in CANDIDATES:
            raise ExperimentError(f"no optimizer {name!r}; there are {', '.join(CANDIDATES)}")
    if names is None:
        names = [name for name in CANDIDATES if "pytorch-optimizer" not in name]
        if device == "cpu":
            names.remove(COMPILED)
        if find_spec("pytorch_optimizer") is not None:
            names.append("pytorch-optimizer ApolloDQN")
    return [c for c in CANDIDATES.values() if c.name in names or c.name == PEER]
