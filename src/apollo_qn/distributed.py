"""Global sums over sharded tensors. Only this module knows of device meshes.

The secant condition holds for the full tensor. If a parameter is a ``DTensor``, a back end takes
the sums over the local shard. One all-reduce per step and mesh adds up the sums of all tensors. The
back end then updates its shard with the global sums.

The all-reduce is in float64. A float32 state needs two numbers per tensor, because float64 holds
the fourth power of every float32 number. The sums of a float64 state, with their scale, and the
maximum of belief have one slot per rank in the buffer. A rank leaves the other slots 0, so that the
sum over ranks gathers all slots.
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
from apollo_qn.backends.base import Describe, TensorLists, unnamed
from apollo_qn.hyperparameters import Hyperparameters
from apollo_qn.secant import Sums, arithmetic

Group: TypeAlias = tuple[TensorLists, Hyperparameters]
Mesh: TypeAlias = Any  # torch.distributed.device_mesh.DeviceMesh, which is not imported here

# Largest |e| of a scale 2^e, so that 2^e and 2^-e are normal numbers of the state's type.
_LARGEST_EXPONENT = {torch.float32: 120, torch.float64: 1000}

_CACHED_INDICES = 64  # lists of rows that a reduction keeps on the device


@dataclass(frozen=True, slots=True)
class _Shard:
    """Placement of a sharded tensor: its mesh, and the mesh dimensions that it is sharded over."""

    mesh: Mesh
    sharded_dims: tuple[int, ...]
    dtype: torch.dtype  # type of the arithmetic
    belief: bool
    index: int  # index of this rank's shard; replicas share an index


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, with any placements."""
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def _dtensor() -> Any:
    """Return the class ``DTensor``, or None if nobody has imported it and none can exist."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def check_parameter(p: Any) -> None:
    """Raise ValueError for the flat parameters of FSDP1, which hide the tensors' boundaries."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            "params must be full tensors or DTensors, got one that FullyShardedDataParallel "
            "(FSDP1) has flattened: Apollo's sums run over each tensor, whose boundaries are lost "
            "there. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )


def place_like(p: Any, tensor: Any) -> Any:
    """Return a saved state tensor with the placements of its parameter.

    A plain ``tensor`` must be the full tensor, on all ranks.
    """
    if not is_sharded(p):
        return tensor
    if is_sharded(tensor):
        return _placed_like(tensor, p)
    from torch.distributed.tensor import distribute_tensor

    # None makes every rank take its shard from its own copy
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def localize(
    groups: list[Group],
    before: Reduction | None,
    describe: Describe = unnamed,
) -> tuple[list[Group], Reduction | None]:
    """Return the groups with local shards, and the reduction of their sums to global sums.

    Args:
        groups: groups whose parameters are full tensors or DTensors.
        before: reduction that the last call returned. It is reused if nothing has changed.
        describe: function that returns the name of a parameter for a message.

    Raises:
        RuntimeError: a sharded parameter that cannot be served.
    """
    kind = _dtensor()
    if kind is None or not any(isinstance(p, kind) for lists, _ in groups for p in lists.params):
        return groups, None
    shards: list[_Shard] = []
    local = [(_local_lists(lists, h, kind, shards, describe), h) for lists, h in groups]
    if not shards:
        return local, None
    devices = {
        p.device
        for lists, _ in local
        for p, row in zip(lists.params, lists.rows, strict=True)
        if row >= 0
    }
    if len(devices) > 1:
        raise RuntimeError(
            f"sharded parameters must lie on one device, got {', '.join(map(str, devices))}; give "
            "those of each device an optimizer of their own"
        )
    if before is None or before.shards != shards:
        before = Reduction(shards, devices.pop())
    return local, before


def _local_lists(
    lists: TensorLists,
    h: Hyperparameters,
    kind: Any,
    shards: list[_Shard],
    describe: Describe,
) -> TensorLists:
    """Return the local tensors of one group, and append its shards to ``shards``."""
    if h.differentiable and any(isinstance(p, kind) for p in lists.params):
        raise RuntimeError(
            "differentiable=True does not support sharded parameters (DTensor); use a full tensor"
        )
    rows = []
    known: dict[Hashable, _Shard | None] = {}  # most tensors share their placements
    for p, m in zip(lists.params, lists.exp_avgs, strict=True):
        shard = None
        if isinstance(p, kind):
            key = (id(p.device_mesh), p.placements, p.dtype, m.dtype)
            if key not in known:
                known[key] = _shard(p, m, h.belief, describe)
            shard = known[key]
        rows.append(-1 if shard is None else len(shards))
        if shard is not None:
            shards.append(shard)

    def local_state(column: list[Any], name: str) -> list[Any]:
        return [
            _local_shard(_checked_state(x, p, name, describe))
            if isinstance(p, kind) and x is not None
            else x
            for x, p in zip(column, lists.params, strict=bool(column))
        ]

    return replace(
        lists,
        params=[_local_shard(p) if isinstance(p, kind) else p for p in lists.params],
        grads=[
            _local_shard(_placed_like(g, p, describe)) if isinstance(p, kind) else g
            for g, p in zip(lists.grads, lists.params, strict=True)
        ],
        exp_avgs=local_state(lists.exp_avgs, "exp_avg"),
        hessian_diags=local_state(lists.hessian_diags, "hessian_diag"),
        compensations=local_state(lists.compensations, "compensation"),
        rng_keys=[
            key if row < 0 else rounding.shard_key(key, shards[row].index)
            for key, row in zip(lists.rng_keys, rows, strict=bool(lists.rng_keys))
        ],
        rows=rows,
    )


def _shard(p: Any, m: Tensor, belief: bool, describe: Describe) -> _Shard | None:
    """Return the placement of a sharded parameter; None if the local tensor is the full one."""
    mesh, placements = p.device_mesh, p.placements
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"{describe(p)} must be sharded or replicated, got the placements {placements}"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None  # this rank is not in the mesh
    sharded_dims = tuple(
        i
        for i, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    )
    dtype = arithmetic(p.dtype, m.dtype).to_real()
    index = 0
    for i in sharded_dims:
        index = index * mesh.size(i) + coordinate[i]
    return _Shard(mesh, sharded_dims, dtype, belief, index) if sharded_dims else None


def _placed_like(tensor: Any, p: Any, describe: Describe = unnamed) -> Any:
    """Return a gradient or loaded state with the placements of its parameter ``p``, a DTensor."""
    if not is_sharded(tensor):
        raise RuntimeError(
            f"the gradient and state of {describe(p)}, which is a DTensor, must be DTensors too, "
            f"got a plain tensor of shape {tuple(tensor.shape)}"
        )
    return (
        tensor if _same_placement(tensor, p) else tensor.redistribute(p.device_mesh, p.placements)
    )


def _same_placement(tensor: Any, p: Any) -> bool:
    mesh = tensor.device_mesh
    return bool(mesh is p.device_mesh or mesh == p.device_mesh) and bool(
        tensor.placements == p.placements
    )


def _checked_state(tensor: Any, p: Any, name: str, describe: Describe) -> Any:
    """Return the state tensor, or raise RuntimeError if its parameter was resharded since."""
    if not is_sharded(tensor) or not _same_placement(tensor, p):
        found = tensor.placements if is_sharded(tensor) else "a plain tensor"
        raise RuntimeError(
            f"{name} of {describe(p)} has the placements {found}, the parameter itself "
            f"{p.placements}: it was resharded after its state had been made. Save the "
            "state dict before, reshard, and load the state dict again"
        )
    return tensor


def _local_shard(tensor: Any) -> Tensor:
    # to_local() of a parameter returns a new object at each call
    local = tensor.to_local() if torch.is_grad_enabled() else tensor._local_tensor
    # wait for a collective that is still running
    ready: Tensor = local.wait() if hasattr(local, "wait") else local
    return ready


class Reduction:
    """Reduction of the sums over shards to global sums.

    The sums are rows of a table, one row per tensor, with the columns scale, q4, k and largest of
    :class:`apollo_qn.secant.Sums`.
    """

    def __init__(self, shards: list[_Shard], device: torch.device) -> None:
        self.shards = shards
        self.device = device
        meshes: dict[Mesh, list[int]] = {}
        for i, part in enumerate(shards):
            meshes.setdefault(part.mesh, []).append(i)
        self._meshes = [_MeshReduction(shards, rows, device) for rows in meshes.values()]
        self._indices: dict[Hashable, Tensor] = {}

    def table(self) -> Tensor:
        """Return a table of zeros for this step. Rows of shards without elements remain zeros."""
        return torch.zeros(len(self.shards), 4, dtype=torch.float64, device=self.device)

    def put(self, table: Tensor, rows: list[int], sums: Sums) -> None:
        """Write the sums over shards into their rows."""
        largest = torch.zeros_like(sums.k) if sums.largest is None else sums.largest
        columns = [column.to(table) for column in (sums.scale, sums.q4, sums.k, largest)]
        table.index_copy_(0, self._index(rows), torch.stack(columns, 1))

    def take(self, table: Tensor, rows: list[int]) -> Sums:
        """Return the sums in the given rows."""
        scale, q4, k, largest = table.index_select(0, self._index(rows)).unbind(1)
        return Sums(scale, q4, k, largest if self.shards[rows[0]].belief else None)

    def reduce_(self, table: Tensor) -> None:
        """Replace the sums over shards by global sums, with a scale that is a power of 2."""
        for mesh in self._meshes:
            mesh.reduce_(table)

    def totals_(self, sums: Tensor, largest: Tensor) -> None:
        """Replace other values of shards by values of the full tensors, in place.

        Args:
            sums: values to add up over the shards, floating, shape (tensors, any).
            largest: values to take the maximum of, of the same form. NaN may be lost.
        """
        for mesh in self._meshes:
            mesh.totals_(sums, largest)

    def _index(self, rows: list[int]) -> Tensor:
        key = tuple(rows)
        if key not in self._indices:
            if len(self._indices) >= _CACHED_INDICES:  # the subsets of tensors differ at each step
                self._indices.clear()
            self._indices[key] = torch.tensor(rows, device=self.device)
        return self._indices[key]


class _MeshReduction:
    """All-reduce of the rows of one mesh."""

    def __init__(self, shards: list[_Shard], rows: list[int], device: torch.device) -> None:
        self.mesh = shards[rows[0]].mesh
        coordinate = self.mesh.get_coordinate()

        def index(which: list[int]) -> Tensor:
            return torch.tensor(which, dtype=torch.int64, device=device)

        self.rows = index(rows)
        self.summed = index([i for i in rows if shards[i].dtype is torch.float32])
        self.gathered = index([i for i in rows if shards[i].dtype is not torch.float32])
        self.largest = index([i for i in rows if shards[i].belief])
        # only one replica contributes, so that the result is bit-identical on all ranks
        silent = [
            i
            for i in rows
            if any(at and k not in shards[i].sharded_dims for k, at in enumerate(coordinate))
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
        _write(
            table,
            self.summed,
            _scaled(torch.ones_like(q4), q4, k, _LARGEST_EXPONENT[torch.float32]),
        )
        full = Sums(*gathered.unbind(2)).merged()
        columns_64 = _scaled(full.scale, full.q4, full.k, _LARGEST_EXPONENT[torch.float64])
        _write(table, self.gathered, columns_64)
        table[:, 3].index_copy_(0, self.largest, largest[..., 0].amax(0))

    def totals_(self, sums: Tensor, largest: Tensor) -> None:
        if self.silent is not None:
            sums.index_fill_(0, self.silent, 0)
        for table, op in ((sums, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
            full = _all_reduced(table.index_select(0, self.rows), self.mesh, self.group, op)
            table.index_copy_(0, self.rows, full)


def _in_slot(values: Tensor, ranks: int, rank: int) -> Tensor:
    """Return ``values`` in the slot of this rank, zeros elsewhere: (ranks, *values.shape)."""
    slots = values.new_zeros(ranks, *values.shape)
    slots[rank] = values
    return slots


def _scaled(scale: Tensor, q4: Tensor, k: Tensor, most: int) -> Tensor:
    """Return the sums as columns, with a scale 2^e near ||d||_4 where |e| <= most."""
    # log2 instead of frexp, because inductor (torch 2.13) does not compile frexp in float64
    exponent = (
        torch.log2(scale * q4.sqrt().sqrt()).floor().nan_to_num(0, neginf=0).clamp(-most, most)
    )
    # build 2^e from its bits, because exp2 and ldexp are not exact on every device
    power = ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    share = scale / power
    return torch.stack([power, q4 * share**4, k * share], 1)


def _write(table: Tensor, rows: Tensor, columns: Tensor) -> None:
    table[:, :3].index_copy_(0, rows, columns)


def _all_reduced(buffer: Tensor, mesh: Mesh, group: Any, op: Any = None) -> Tensor:
    device = buffer.device
    if mesh.device_type != device.type:  # parameters are offloaded to host memory
        buffer = buffer.to(mesh.device_type)
    dist.all_reduce(buffer, dist.ReduceOp.SUM if op is None else op, group=group)
    return buffer.to(device)


_groups: WeakKeyDictionary[Mesh, tuple[Any, Any]] = WeakKeyDictionary()


def _group(mesh: Mesh) -> Any:
    """Return the process group of all ranks of a mesh."""
    first = mesh.get_group(0)
    if mesh.ndim == 1:
        return first
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    known = _groups.get(mesh)
    if known is None or known[0] is not first:  # the process groups were created again
        group = dist.new_group(ranks, use_local_synchronization=True)
        known = _groups[mesh] = (first, group)
    return known[1]
