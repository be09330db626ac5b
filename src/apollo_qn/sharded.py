"""Sums over whole tensors whose parts lie on several ranks; only this module knows of meshes.

The secant condition holds for a tensor as a whole. Where a parameter is a ``DTensor``, a back end
takes the sums over the local part, they travel together in one all-reduce a step and mesh, and the
back end does the step of its part with the sums of the whole.

What travels is float64: for a float32 state two numbers a tensor, whose range no fourth power of a
float32 number leaves. A maximum (belief), and sums of a float64 state with their scale, travel in a
slot for each rank: zeros everywhere else make the sum a gathering.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_qn import rounding
from apollo_qn.backends import Group
from apollo_qn.rule import Sums, arithmetic

Mesh: TypeAlias = Any  # torch.distributed.device_mesh.DeviceMesh, which this does not import

# Of a scale 2^e: its inverse and itself are normal numbers of the state's type.
_MOST = {torch.float32: 120, torch.float64: 1000}


@dataclass(frozen=True, slots=True)
class _Part:
    """How a tensor that is a part of another is spread: over which dimensions of which mesh."""

    mesh: Mesh
    spread: tuple[int, ...]
    dtype: torch.dtype  # of the arithmetic
    belief: bool
    index: int  # of this rank's part; replicas have the same


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, whatever its placements."""
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def _dtensor() -> Any:
    """The type; None: no one has imported it, so that there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def check_parameter(p: Any) -> None:
    """Raise ValueError for the flat parameters of FSDP1, which hide the tensors' boundaries."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            "params must be whole tensors or DTensors, got one that FullyShardedDataParallel "
            "(FSDP1) has flattened: Apollo's sums run over each tensor, whose boundaries are lost "
            "there. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )


def placed_as(p: Any, tensor: Any) -> Any:
    """A saved state with the placements of its parameter; all ranks must have it whole."""
    if not is_sharded(p):
        return tensor
    if is_sharded(tensor):
        return _like(tensor, p)
    from torch.distributed.tensor import distribute_tensor

    # every rank cuts its part out of its own copy
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def localized(
    groups: list[Group], before: Reduction | None
) -> tuple[list[Group], Reduction | None]:
    """The groups with the local parts of their tensors, and how their sums become whole.

    Args:
        groups: ``shared`` is written here.
        before: what the last call returned; it is kept where nothing has changed.

    Raises:
        RuntimeError: a sharded parameter that cannot be served.
    """
    kind = _dtensor()
    types = set() if kind is None else {type(p) for group in groups for p in group.params}
    if not any(issubclass(one, kind) for one in types):
        return groups, None
    parts: list[_Part] = []
    devices: set[torch.device] = set()
    local = []
    for group in groups:
        if group.differentiable and any(isinstance(p, kind) for p in group.params):
            raise RuntimeError(
                "differentiable=True does not support sharded parameters (DTensor); use a whole one"
            )
        shared = []
        known: dict[Hashable, _Part | None] = {}  # most tensors are spread alike
        for p, m in zip(group.params, group.exp_avgs, strict=True):
            part = None
            if isinstance(p, kind):
                key = (id(p.device_mesh), p.placements, p.dtype, m.dtype)
                if key not in known:
                    known[key] = _part(p, m, group)
                part = known[key]
            shared.append(-1 if part is None else len(parts))
            if part is not None:
                parts.append(part)
                devices.add(p.device)
        streams = group.streams and [
            stream if i < 0 else rounding.part(stream, parts[i].index)
            for stream, i in zip(group.streams, shared, strict=True)
        ]
        lows = group.compensations and [
            low if low is None else _local([low], [p], kind)[0]
            for low, p in zip(group.compensations, group.params, strict=True)
        ]
        local.append(
            replace(
                group,
                params=_local(group.params, group.params, kind),
                grads=_local(group.grads, group.params, kind),
                exp_avgs=_local(group.exp_avgs, group.params, kind),
                hessian_diags=_local(group.hessian_diags, group.params, kind),
                compensations=lows,
                streams=streams,
                shared=shared,
            )
        )
    if not parts:
        return local, None
    if len(devices) > 1:
        raise RuntimeError(
            f"sharded parameters must lie on one device, got {', '.join(map(str, devices))}; give "
            "those of each device an optimizer of their own"
        )
    if before is None or before.parts != parts:
        before = Reduction(parts, devices.pop())
    return local, before


def _part(p: Any, m: Tensor, group: Group) -> _Part | None:
    """None: the local tensor is the whole one."""
    mesh, placements = p.device_mesh, p.placements
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"a parameter must be sharded or replicated, got the placements {placements} for one "
            f"of shape {tuple(p.shape)}"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None  # this rank has none of it
    spread = tuple(
        i
        for i, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    )
    dtype = arithmetic(p.dtype, m.dtype).to_real()
    index = 0
    for i in spread:
        index = index * mesh.size(i) + coordinate[i]
    return _Part(mesh, spread, dtype, group.h.belief, index) if spread else None


def _local(tensors: list[Tensor], params: list[Tensor], kind: Any) -> list[Tensor]:
    """The local parts of parameters, or of gradients or states placed as they are."""
    return [
        _part_of(_like(x, p)) if isinstance(p, kind) else x
        for x, p in zip(tensors, params, strict=True)
    ]


def _like(tensor: Any, p: Any) -> Any:
    """A gradient or state with the placements of its parameter, which is a DTensor."""
    if tensor is p:
        return p
    if not is_sharded(tensor):
        raise RuntimeError(
            f"the gradient and state of a sharded parameter of shape {tuple(p.shape)} must be "
            f"sharded as it is, got a plain tensor of shape {tuple(tensor.shape)}"
        )
    mesh = tensor.device_mesh
    same = (mesh is p.device_mesh or mesh == p.device_mesh) and tensor.placements == p.placements
    return tensor if same else tensor.redistribute(p.device_mesh, p.placements)


def _part_of(tensor: Any) -> Tensor:
    # of a parameter to_local() makes a new object at each call
    local = tensor.to_local() if torch.is_grad_enabled() else tensor._local_tensor
    # of a collective that is still under way
    ready: Tensor = local.wait() if hasattr(local, "wait") else local
    return ready


class Reduction:
    """Sums over parts of tensors become sums over whole tensors.

    They lie in a table with a row for each tensor: scale, q4, k and largest of
    :class:`apollo_qn.rule.Sums`.
    """

    def __init__(self, parts: list[_Part], device: torch.device) -> None:
        self.parts = parts
        self.device = device
        meshes: dict[Mesh, list[int]] = {}
        for i, part in enumerate(parts):
            meshes.setdefault(part.mesh, []).append(i)
        self._meshes = [_OfMesh(parts, rows, device) for rows in meshes.values()]
        self._indices: dict[Hashable, Tensor] = {}

    def table(self) -> Tensor:
        """One for this step; the rows of parts that hold no element remain zeros."""
        return torch.zeros(len(self.parts), 4, dtype=torch.float64, device=self.device)

    def put(self, table: Tensor, rows: list[int], sums: Sums) -> None:
        """Write the sums over parts into their rows."""
        largest = torch.zeros_like(sums.k) if sums.largest is None else sums.largest
        columns = [column.to(table) for column in (sums.scale, sums.q4, sums.k, largest)]
        table.index_copy_(0, self._index(rows), torch.stack(columns, 1))

    def take(self, table: Tensor, rows: list[int]) -> Sums:
        """The sums of these rows."""
        scale, q4, k, largest = table.index_select(0, self._index(rows)).unbind(1)
        return Sums(scale, q4, k, largest if self.parts[rows[0]].belief else None)

    def reduce_(self, table: Tensor) -> None:
        """Make the sums over parts those over whole tensors, with a scale that is a power of 2."""
        for mesh in self._meshes:
            mesh.reduce_(table)

    def totals_(self, sums: Tensor, largest: Tensor) -> None:
        """Make other numbers of parts those of whole tensors, with a row for each part.

        Args:
            sums: to be added up over the parts, shape (parts, any), floating.
            largest: of which the largest is wanted, likewise; NaN may be lost.
        """
        for mesh in self._meshes:
            mesh.totals_(sums, largest)

    def _index(self, rows: list[int]) -> Tensor:
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = torch.tensor(rows, device=self.device)
        return self._indices[key]


class _OfMesh:
    """The rows of one mesh: one all-reduce."""

    def __init__(self, parts: list[_Part], rows: list[int], device: torch.device) -> None:
        self.mesh = parts[rows[0]].mesh
        coordinate = self.mesh.get_coordinate()

        def index(which: list[int]) -> Tensor:
            return torch.tensor(which, dtype=torch.int64, device=device)

        self.rows = index(rows)
        self.summed = index([i for i in rows if parts[i].dtype is torch.float32])
        self.gathered = index([i for i in rows if parts[i].dtype is not torch.float32])
        self.largest = index([i for i in rows if parts[i].belief])
        # of replicas one speaks, so that all ranks of the mesh end with the same bits
        silent = [
            i
            for i in rows
            if any(at and k not in parts[i].spread for k, at in enumerate(coordinate))
        ]
        self.silent = index(silent) if silent else None

    @cached_property
    def group(self) -> Any:
        return _group(self.mesh)

    def reduce_(self, table: Tensor) -> None:
        if self.silent is not None:
            table.index_fill_(0, self.silent, 0)
        scale, q4, k, _ = table.index_select(0, self.summed).unbind(1)
        slots = (dist.get_world_size(self.group), dist.get_rank(self.group))
        columns = [
            q4 * scale**4,
            k * scale,
            _in_slot(table.index_select(0, self.gathered)[:, :3], *slots),
            _in_slot(table.index_select(0, self.largest)[:, 3:], *slots),
        ]
        buffer = torch.cat([column.flatten() for column in columns])
        buffer = _all_reduced(buffer, self.mesh, self.group)
        pieces = buffer.split_with_sizes([column.numel() for column in columns])
        q4, k, gathered, largest = (
            piece.view(column.shape) for piece, column in zip(pieces, columns, strict=True)
        )
        _write(table, self.summed, _scaled(torch.ones_like(q4), q4, k, _MOST[torch.float32]))
        of_parts = Sums(*gathered.unbind(2))
        whole = of_parts.merged()
        _write(table, self.gathered, _scaled(whole.scale, whole.q4, whole.k, _MOST[torch.float64]))
        table[:, 3].index_copy_(0, self.largest, largest[..., 0].amax(0))

    def totals_(self, sums: Tensor, largest: Tensor) -> None:
        if self.silent is not None:
            sums.index_fill_(0, self.silent, 0)
        for table, op in ((sums, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
            whole = _all_reduced(table.index_select(0, self.rows), self.mesh, self.group, op)
            table.index_copy_(0, self.rows, whole)


def _in_slot(values: Tensor, ranks: int, rank: int) -> Tensor:
    """Shape (ranks, *values.shape): zeros but for this rank."""
    slots = values.new_zeros(ranks, *values.shape)
    slots[rank] = values
    return slots


def _scaled(scale: Tensor, q4: Tensor, k: Tensor, most: int) -> Tensor:
    """The same sums with a scale 2^e near ||d||_4, |e| <= most, as columns."""
    # not frexp, whose float64 form inductor (torch 2.13) does not compile
    exponent = (
        torch.log2(scale * q4.sqrt().sqrt()).floor().nan_to_num(0, neginf=0).clamp(-most, most)
    )
    # from its bits: exp2 and ldexp are not exact everywhere
    power = ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    share = scale / power
    return torch.stack([power, q4 * share**4, k * share], 1)


def _write(table: Tensor, rows: Tensor, columns: Tensor) -> None:
    table[:, :3].index_copy_(0, rows, columns)


def _all_reduced(buffer: Tensor, mesh: Mesh, group: Any, op: Any = None) -> Tensor:
    home = buffer.device
    if mesh.device_type != home.type:  # parameters that wait in host memory
        buffer = buffer.to(mesh.device_type)
    dist.all_reduce(buffer, dist.ReduceOp.SUM if op is None else op, group=group)
    return buffer.to(home)


_groups: WeakKeyDictionary[Mesh, tuple[Any, Any]] = WeakKeyDictionary()


def _group(mesh: Mesh) -> Any:
    """The process group of all ranks of a mesh."""
    first = mesh.get_group(0)
    if mesh.ndim == 1:
        return first
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    known = _groups.get(mesh)
    if known is None or known[0] is not first:  # an equal mesh of processes set up anew
        group = dist.new_group(ranks, use_local_synchronization=True)
        known = _groups[mesh] = (first, group)
    return known[1]
