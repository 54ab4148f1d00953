"""Tensors that lie on several processes, DTensors: the piece of this process, and what all of them agree on.

A rule is never shown such a tensor: it sees the piece where entries are all that it needs, else the whole tensor. Everything here
is decided from global metadata, which is the same on all processes, so that none waits for another in vain.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.numerics import as_complex, as_real, real_dtype, widened_scalar

__all__ = [
    "NO_DERIVATIVE",
    "Exchange",
    "Shares",
    "all_reduced",
    "check_agreement",
    "copied_as",
    "cut",
    "drawn",
    "entrywise",
    "gathered",
    "group_of",
    "in_blocks",
    "is_ascending",
    "is_debugging",
    "is_sharded",
    "joint_extremes",
    "joint_norms",
    "joint_sums",
    "like",
    "local",
    "numel",
    "of_spec",
    "placed_as",
    "replicas",
    "rows_of",
    "same_layout",
    "stand_in",
    "whole",
    "with_dims",
]

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(x: Any) -> bool:
    """Whether a tensor lies on several processes, a piece on each.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    if type(x) in _PLAIN or not isinstance(x, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # who has such a tensor has imported it
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Any:
    """The piece of this process; anything else as it is. A sum over processes that is still to be made is made."""
    if not is_sharded(x):
        return x
    placements = _settled(x)
    settled = x if placements is x.placements else x.redistribute(placements=placements)
    return settled.to_local() if torch.is_grad_enabled() else settled._local_tensor


def _settled(x: Any) -> tuple[Any, ...]:
    """The placements of a tensor, or of a spec, once its sums over processes are made: then all of them have the total."""
    if not any(p.is_partial() for p in x.placements):
        return x.placements
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if p.is_partial() else p for p in x.placements)


def whole(x: Any) -> Any:
    """The whole tensor, plain, on every process; anything else as it is."""
    return x.full_tensor() if is_sharded(x) else x


def like(piece: Any, home: Any) -> Any:
    """A piece as a tensor that lies on the processes as ``home`` does; as it is where that is a plain one."""
    if not is_sharded(home) or not isinstance(piece, Tensor):
        return piece
    if torch.is_grad_enabled() and piece.requires_grad:
        return _recorded(piece, home, _settled(home), home.shape, home.stride())
    spec = home._spec
    if spec.tensor_meta.dtype != piece.dtype or any(p.is_partial() for p in spec.placements):
        spec = _spec(spec, _settled(spec), spec.shape, spec.stride, piece.dtype)
    return of_spec(piece, spec)


def _recorded(piece: Tensor, home: Any, placements: tuple[Any, ...], shape: Sequence[int], stride: Sequence[int]) -> Any:
    """A piece as a tensor on the mesh of another one, through which there is a derivative."""
    return type(home).from_local(
        piece, home.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def of_spec(piece: Tensor, spec: Any) -> Any:
    """A piece as a tensor that lies on the processes as a spec says; in a tenth of the time of ``from_local``."""
    return sys.modules["torch.distributed.tensor"].DTensor(piece, spec, requires_grad=False)


@functools.lru_cache(maxsize=4096)
def _spec(spec: Any, placements: tuple[Any, ...], shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The spec of another tensor on the mesh of one."""
    return type(spec)(spec.mesh, placements, tensor_meta=type(spec.tensor_meta)(shape, stride, dtype))


def numel(x: Tensor) -> int:
    """The entries of the whole tensor, those of a complex one twice."""
    return x.numel() * (2 if x.is_complex() else 1)


def same_layout(x: Any, y: Any) -> bool:
    """Whether two tensors have their pieces in the same places; plain ones do."""
    if not (is_sharded(x) and is_sharded(y)):
        return is_sharded(x) == is_sharded(y)
    return x._spec is y._spec or (x.device_mesh == y.device_mesh and x.placements == y.placements)


def placed_as(x: Any, home: Any) -> Any:
    """A tensor with its pieces where those of ``home`` are; one that is whole on every process is cut."""
    if not is_sharded(home) or not isinstance(x, Tensor) or same_layout(x, home):
        return x
    sharded: Any = x
    if is_sharded(x) and sharded.device_mesh == home.device_mesh:
        return sharded.redistribute(placements=_settled(home))
    return cut(whole(x), home)


def cut(x: Tensor, home: Any, device: Any = None) -> Any:
    """A tensor that is whole on every process, with its pieces where those of ``home`` are; on its own device by default."""
    return like(_cut(x, rows_of(home)).to(x.device if device is None else device, copy=True), home)


def stand_in(x: Any) -> Any:
    """What has the shape of a tensor that lies on several processes, without its numbers; any other tensor as it is."""
    return local(x).new_zeros(()).expand(x.shape) if is_sharded(x) else x


def copied_as(x: Tensor, home: Any) -> Any:
    """A copy of a tensor in memory of its own, with dtype and device of ``home``, that lies where ``home`` does."""
    here = placed_as(x, home) if is_sharded(home) else whole(x)
    return like(torch.empty_like(local(home)).copy_(local(here)), home)


def with_dims(piece: Any, home: Any, count: int) -> Any:
    """A piece that has more dimensions in front than ``home``, by ``count``, or fewer; all processes have all of these.

    Raises:
        TypeError: ``home`` is cut in a dimension that the piece lacks.
    """
    if not is_sharded(home) or piece is None or count == 0:
        return like(piece, home)
    placements = _shifted(home, count)
    if any(hasattr(p, "dim") and p.dim < 0 for p in placements):
        raise TypeError("a tensor is cut over the processes in a dimension that all of them must have")
    shape = (*piece.shape[:count], *home.shape) if count >= 0 else home.shape[-count:]
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if torch.is_grad_enabled() and piece.requires_grad:
        return _recorded(piece, home, placements, shape, stride)
    return of_spec(piece, _spec(home._spec, placements, torch.Size(shape), stride, piece.dtype))


def has_dims_more(x: Any, home: Any, count: int) -> bool:
    """Whether a tensor has its pieces where those of ``home`` are, but for some dimensions in front."""
    if not is_sharded(home) or not is_sharded(x):
        return is_sharded(home) == is_sharded(x)
    return x.device_mesh == home.device_mesh and tuple(x.placements) == _shifted(home, count) and x.shape[count:] == home.shape


def _shifted(home: Any, count: int) -> tuple[Any, ...]:
    from torch.distributed.tensor import Shard

    def shifted(p: Any) -> Any:
        if not hasattr(p, "dim"):
            return p
        split = getattr(p, "split_factor", None)
        return Shard(p.dim + count) if split is None else type(p)(p.dim + count, split_factor=split)

    return tuple(map(shifted, _settled(home)))


def drawn(sampler: Callable[..., Tensor], key: Tensor, x: Tensor, home: Any, dtype: torch.dtype) -> Tensor:
    """Random numbers for a tensor, or for its piece ``x``: those that the whole tensor has there.

    Args:
        sampler: one of :mod:`optfn.random`.
        key: a key.
        x: ``home``, or the piece of it that is here.
        home: the tensor.
        dtype: of the numbers.
    """
    if is_sharded(home) and x.shape != home.shape:
        return sampler(key, home.shape, dtype, part=rows_of(home))
    return sampler(key, x.shape, dtype)


def entrywise(f: Callable[..., Any], *tensors: Any) -> Any:
    """``f`` of the pieces, for a function of which each entry of the result depends on that entry alone; laid out as the first.

    Numbers and 0-dim tensors among the arguments belong to all entries.

    Raises:
        ValueError: a piece of the result has another shape, as what ``f`` knows besides was made for the whole tensor.
    """
    home = next((x for x in tensors if is_sharded(x)), None)
    if home is None:
        return f(*tensors)
    pieces = [local(placed_as(x, home)) if is_sharded(x) or _fits(x, home) else x for x in tensors]
    result, shape = f(*pieces), local(home).shape
    if isinstance(result, Tensor) and result.shape != shape:
        said = f"a piece of shape {tuple(shape)} became one of {tuple(result.shape)}"
        raise ValueError(f"{said}: of tensors that lie on several processes only numbers and 0-dim tensors belong to all entries")
    return like(result, home)


def _fits(x: Any, home: Tensor) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.shape == home.shape


# Sums


def joint_sums(sums: Sequence[Tensor], homes: Sequence[Any]) -> list[Tensor]:
    """Sums over the entries of pieces as sums over all entries: one all_reduce for all of them.

    Args:
        sums: 0-dim tensors, each of one piece; a plain tensor's is its own.
        homes: the tensor that each is of.
    """
    places = [k for k, h in enumerate(homes) if is_sharded(h)]
    if not places:
        return list(sums)
    device, shares = sums[places[0]].device, Shares([homes[k] for k in places])
    # Float64, so that counts are exact; complex sums as two. Equal pieces count once.
    wide = [widened_scalar(as_real(sums[k]).reshape(-1)).to(device) for k in places]
    totals = shares.totals(*(x / part for x, part in zip(wide, shares.parts, strict=True)))
    found = list(sums)
    for k, total in zip(places, totals, strict=True):
        x = sums[k]
        total = total.to(real_dtype(x.dtype)).to(x.device)
        found[k] = as_complex(total) if x.is_complex() else total.reshape(())
    return found


def joint_norms(norms: Sequence[Tensor], homes: Sequence[Any], order: float = 2.0) -> list[Tensor]:
    """Vector norms of pieces as those of whole tensors: one all_reduce for all of them.

    A piece without entries has none for an order below 0: give ``inf``.
    """
    if not any(map(is_sharded, homes)):
        return list(norms)
    if math.isinf(order) or order == 0:
        return joint_extremes(norms, homes, largest=order >= 0)
    # NaN, inf and 0 come through as they are. Squares of float32 are no overflow in float64.
    wide = [widened_scalar(x) for x in norms]
    powers = joint_sums([x**order if is_sharded(h) else x for x, h in zip(wide, homes, strict=True)], homes)
    found = (x ** (1 / order) if is_sharded(h) else x for x, h in zip(powers, homes, strict=True))
    return [y.to(x.dtype) if is_sharded(h) else x for x, y, h in zip(norms, found, homes, strict=True)]


def joint_extremes(values: Sequence[Tensor], homes: Sequence[Any], *, largest: bool) -> list[Tensor]:
    """The largest (or smallest) of numbers of pieces, for each tensor that they are of: one all_reduce; NaN where one is."""
    places = [k for k, h in enumerate(homes) if is_sharded(h)]
    if not places:
        return list(values)
    sign = 1 if largest else -1
    device = values[places[0]].device
    flat = torch.stack([sign * widened_scalar(values[k]).to(device) for k in places])
    top = sign * _greatest(flat, group_of([homes[k] for k in places]))
    found = list(values)
    for k, x in zip(places, top.unbind(), strict=True):
        found[k] = x.to(values[k].dtype).to(values[k].device)
    return found


def _greatest(x: Tensor, group: Any) -> Tensor:
    """Of a vector on each process, entry by entry the largest; NaN where one is."""
    nan = x.isnan()  # which of two a maximum takes is not said where one is NaN
    top, nan = all_reduced(torch.cat([torch.where(nan, -math.inf, x), nan.to(x.dtype)]), group, "max").chunk(2)
    return torch.where(nan > 0, math.nan, top)


class Shares:
    """What each process adds to sums over tensors, of which it has pieces, or all.

    Attributes:
        group: the processes on which these tensors have pieces; None where all tensors are plain.
        parts: of each tensor, how many processes add the same; one that is None has no entries.

    Example:
        >>> Shares([torch.ones(2)]).totals(torch.tensor(3.0), torch.ones(2))
        [tensor(3.), tensor([1., 1.])]
    """

    def __init__(self, homes: Sequence[Any]) -> None:
        sharded = [h for h in homes if is_sharded(h)]
        self.group = group_of(sharded) if sharded else None
        self.size = len(torch.distributed.get_process_group_ranks(self.group)) if sharded else 1
        self.parts = [replicas(h, self.group) if is_sharded(h) else self.size for h in homes]

    def totals(self, *sums: Tensor) -> list[Tensor]:
        """Tensors summed over the processes, entry by entry: one all_reduce; as they are where there is no group."""
        if self.group is None:
            return list(sums)
        flat = [widened_scalar(x.reshape(-1)) for x in sums]
        parts = all_reduced(torch.cat(flat), self.group).split([len(x) for x in flat])
        return [total.reshape(x.shape).to(x.dtype) for total, x in zip(parts, sums, strict=True)]

    def of_mean(self, x: Any, like: Tensor) -> Any:
        """What this process adds to the mean of a number of which each has one; the number where there is no group."""
        if self.group is None:
            return x
        return torch.as_tensor(whole(x)).detach().to(like) / self.size

    def largest(self, x: Tensor) -> Tensor:
        """The largest of all entries that are at least 0, of all processes; NaN if one is."""
        if self.group is None:
            return x.max()
        top = x.max() if x.numel() else x.new_zeros(())
        return _greatest(top.reshape(1), self.group).reshape(())


def all_reduced(x: Tensor, group: Any, op: str = "sum") -> Tensor:
    """A tensor reduced over the processes of a group, as a new one; it can be traced."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(NO_DERIVATIVE)
    return _waited(torch.ops._c10d_functional.all_reduce.default(x.detach().contiguous(), op, group.group_name))


def is_debugging() -> bool:
    """Whether torch's own switch, ``TORCH_DISTRIBUTED_DEBUG=DETAIL``, asks for checks that cost time."""
    distributed: Any = torch.distributed
    return distributed.get_debug_level() == distributed.DebugLevel.DETAIL


def check_agreement(said: str, homes: Iterable[Any], what: str) -> None:
    """Raise on all processes if they do not say the same. It costs an all_reduce, and waits for it.

    Raises:
        RuntimeError: they do not.
    """
    digest = int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "big")
    away = [h for h in homes if is_sharded(h)]
    low, high = all_reduced(torch.tensor([-digest, digest], device=away[0].device), group_of(away), "max").tolist()
    if -low != high:
        raise RuntimeError(f"processes differ in {what}; this one has {said}")


NO_DERIVATIVE = (
    "there is no derivative through what several processes compute together: make the update under torch.no_grad(), or with "
    "gradients and parameters that do not require grad"
)


def _waited(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor.default(x)


# Groups


class Mesh(NamedTuple):
    """The processes of a mesh, as a group has them."""

    group: Any
    size: int
    rank: int  # of this process in the group
    coordinates: tuple[tuple[int, ...], ...]  # of each process of the group in the mesh


def _mesh(mesh: Any) -> Mesh:
    return _mesh_of(mesh, torch.distributed.group.WORLD)  # another one when processes are joined anew


@functools.cache
def _mesh_of(mesh: Any, world: Any) -> Mesh:
    distributed: Any = torch.distributed
    ranks = _ranks(mesh)
    if not is_ascending(mesh):
        raise ValueError(
            f"the processes of a mesh must be in ascending order along each of its dimensions, got {mesh.mesh.tolist()}: tensors "
            "lie there in another order than the mesh says (torch 2.13)"
        )
    if mesh.ndim == 1:
        group = mesh.get_group()
    elif sorted(ranks) == [*range(distributed.get_world_size())]:
        group = world
    else:
        group = _joined(tuple(sorted(ranks)), world)
    order = distributed.get_process_group_ranks(group)
    places = {rank: tuple((mesh.mesh == rank).nonzero()[0].tolist()) for rank in ranks}
    return Mesh(group, len(order), order.index(distributed.get_rank()), tuple(places[rank] for rank in order))


def is_ascending(mesh: Any) -> bool:
    """Whether processes are in ascending order along each dimension: torch (2.13) takes pieces in that order."""
    return all(bool((mesh.mesh.diff(dim=d) > 0).all()) for d in range(mesh.ndim))


@functools.cache
def _ranks(mesh: Any) -> tuple[int, ...]:
    return tuple(mesh.mesh.flatten().tolist())


@functools.cache
def _joined(ranks: tuple[int, ...], world: Any) -> Any:
    return torch.distributed.new_group([*ranks], use_local_synchronization=True)


def group_of(homes: Iterable[Any]) -> Any:
    """The group of all processes on which these tensors have pieces."""
    meshes = {h.device_mesh: None for h in homes}
    largest = max(meshes, key=lambda mesh: mesh.size())
    if len(meshes) == 1:
        return _mesh(largest).group
    processes = {*_ranks(largest)}
    if all(processes.issuperset(_ranks(mesh)) for mesh in meshes):
        return _mesh(largest).group
    everybody = {rank for mesh in meshes for rank in _ranks(mesh._get_root_mesh())}
    world = torch.distributed.group.WORLD
    return world if len(everybody) == torch.distributed.get_world_size() else _joined(tuple(sorted(everybody)), world)


def replicas(home: Any, group: Any) -> int:
    """How many processes of a group have each piece of a tensor."""
    size = len(torch.distributed.get_process_group_ranks(group))
    distinct = math.prod(home.device_mesh.size(d) for d, p in enumerate(_settled(home)) if not p.is_replicate())
    return size // distinct


# Pieces


Indices = tuple[Any, ...]
"""Of one piece: for each dimension of the whole tensor a slice, or a tuple of indices."""


@functools.lru_cache(maxsize=4096)
def _pieces(spec: Any) -> tuple[Indices, ...]:
    """Where the piece of each process of the mesh's group lies in the whole tensor."""
    return tuple(_indices(spec, coordinate) for coordinate in _mesh(spec.mesh).coordinates)


def _indices(spec: Any, coordinate: tuple[int, ...]) -> Indices:
    axes: list[Sequence[int]] = [range(n) for n in spec.shape]
    for d, placement in enumerate(spec.placements):
        if placement.is_replicate() or placement.is_partial():
            continue
        # FSDP2 cuts what tensor parallelism has cut before, though its dimension of the mesh comes first.
        before = _chunks(axes[placement.dim], getattr(placement, "split_factor", 1))
        mine = [_chunks(part, spec.mesh.size(d))[coordinate[d]] for part in before]
        axes[placement.dim] = mine[0] if len(mine) == 1 else [i for part in mine for i in part]
    return tuple(map(_as_slice, axes))


def _chunks(x: Sequence[int], count: int) -> list[Sequence[int]]:
    """As :func:`torch.chunk`, with empty ones at the end so that there are ``count``."""
    size = -(-len(x) // count)
    return [x[k * size : (k + 1) * size] for k in range(count)]


def _as_slice(indices: Sequence[int]) -> Any:
    start = indices[0] if len(indices) else 0
    span = range(start, start + len(indices))
    return slice(span.start, span.stop) if isinstance(indices, range) or indices == [*span] else tuple(indices)


def rows_of(home: Any) -> Indices:
    """Where the piece of this process lies in the whole tensor."""
    return _pieces(home._spec)[_rank(home)]


def in_blocks(home: Any) -> bool:
    """Whether the piece of every process is a block of the whole tensor, rows and columns without gaps."""
    return all(isinstance(index, slice) for piece in _pieces(home._spec) for index in piece)


def _rank(home: Any) -> int:
    return _mesh(home.device_mesh).rank


def _cut(x: Tensor, piece: Indices) -> Tensor:
    """A piece of the whole tensor."""
    for dim, index in enumerate(piece):
        if isinstance(index, slice):
            x = x.narrow(dim, index.start, index.stop - index.start)
        else:
            x = x.index_select(dim, torch.tensor(index, device=x.device))
    return x


def _joined_pieces(shape: Sequence[int], parts: Sequence[tuple[Indices, Tensor]], like: Tensor) -> Tensor:
    """The whole tensor of its pieces, each given with its place."""
    x = like.new_empty(shape)
    for index, part in parts:
        if all(isinstance(i, slice) for i in index):
            x[index].copy_(part)
        else:
            places = [
                torch.arange(n, device=x.device)[i if isinstance(i, slice) else [*i]] for i, n in zip(index, shape, strict=True)
            ]
            x.index_put_(torch.meshgrid(*places, indexing="ij"), part)
    return x


def _shape(piece: Indices) -> tuple[int, ...]:
    return tuple(i.stop - i.start if isinstance(i, slice) else len(i) for i in piece)


def gathered(tensors: Sequence[Any]) -> list[Tensor]:
    """Tensors that one mesh of one dimension cuts, whole and plain on every process: one all_gather for all of them.

    The processes of the mesh are in ascending order. What every process has all of does not travel.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(NO_DERIVATIVE)
    found = [local(x) for x in tensors]
    away = [(k, p.dim) for k, x in enumerate(tensors) for p in x.placements if p.is_shard() and numel(x)]
    if not away:
        return found
    mesh = _mesh(tensors[away[0][0]].device_mesh)
    raw = len({real_dtype(found[k].dtype) for k, _ in away}) > 1  # tensors of several dtypes travel as bytes
    packed: list[Tensor] = []
    shapes: list[torch.Size] = []
    for k, dim in away:
        # All send as much: the first piece is the largest, and those that are not full are the last.
        x, short = found[k], list(found[k].shape)
        short[dim] = -(-tensors[k].shape[dim] // mesh.size) - x.shape[dim]
        x = as_real(torch.cat([x, x.new_zeros(short)], dim) if short[dim] else x).contiguous()
        shapes.append(x.shape)
        packed.append(x.reshape(-1).view(torch.uint8) if raw else x.reshape(-1))
    # The operator itself: its function has another name from one torch to the next.
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    came = _waited(gather(torch.cat(packed), mesh.size, mesh.group.group_name)).view(mesh.size, -1)
    parts = came.split([len(x) for x in packed], 1)
    for (k, dim), shape, part in zip(away, shapes, parts, strict=True):
        if raw:
            part = part.clone(memory_format=torch.contiguous_format).view(real_dtype(found[k].dtype))
        x = part.reshape(mesh.size, *shape).movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, tensors[k].shape[dim])
        found[k] = as_complex(x.clone()) if found[k].is_complex() else x
    return found


# Owners


class Plan(NamedTuple):
    """Who computes what of tensors that have pieces on the processes of one mesh.

    Attributes:
        mesh: its processes.
        owners: of each tensor, the process that computes with the whole of it.
        pieces: of each tensor and process, where the piece lies.
        senders: of each tensor, the processes that send their piece to the owner: of those with equal pieces one.
    """

    mesh: Mesh
    owners: tuple[int, ...]
    pieces: tuple[tuple[Indices, ...], ...]
    senders: tuple[frozenset[int], ...]


@functools.lru_cache(maxsize=256)
def _plan(specs: tuple[Any, ...], world: Any) -> Plan:
    mesh = _mesh(specs[0].mesh)
    load, owners = [0.0] * mesh.size, [0] * len(specs)
    costs = [_cost(tuple(spec.shape)) for spec in specs]
    for i in sorted(range(len(specs)), key=lambda i: (-costs[i], i)):  # the costly ones first, each to who has the least to do
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    pieces = tuple(map(_pieces, specs))
    senders: list[frozenset[int]] = []
    for i, of in enumerate(pieces):
        by_piece: dict[str, list[int]] = {}
        for rank, piece in enumerate(of):
            by_piece.setdefault(repr(piece), []).append(rank)
        senders.append(frozenset(owners[i] if owners[i] in same else same[i % len(same)] for same in by_piece.values()))
    return Plan(mesh, tuple(owners), pieces, tuple(senders))


def _cost(shape: tuple[int, ...]) -> float:
    """Of a product of a matrix with itself transposed, up to a factor."""
    return float(math.prod(shape) * (min(shape[-2:]) if len(shape) > 1 else 1)) + 1.0


class Exchange:
    """Tensors that have their pieces on the processes of one mesh, brought whole to one owner each, and back.

    The owners are balanced by cost, so that each whole is computed with once. All tensors travel together: there in one
    all_to_all, and back in one.
    """

    def __init__(self, homes: Sequence[Any]) -> None:
        self.homes = homes
        self.plan = _plan(tuple(h._spec for h in homes), torch.distributed.group.WORLD)
        self.owned = [owner == self.plan.mesh.rank for owner in self.plan.owners]

    def to_owners(self, items: Sequence[tuple[int, Tensor]]) -> list[Any]:
        """Pieces of this process, each with its tensor's number, as whole tensors where this process is the owner, else None."""
        plan, me = self.plan, self.plan.mesh.rank
        sent = [[x for i, x in items if plan.owners[i] == rank and me in plan.senders[i]] for rank in range(plan.mesh.size)]
        mine = [(i, x) for i, x in items if self.owned[i]]
        wanted = [
            [x.new_empty(_shape(plan.pieces[i][rank])) for i, x in mine if rank in plan.senders[i]]
            for rank in range(plan.mesh.size)
        ]
        came = [iter(parts) for parts in self._swapped(sent, wanted, [x for _, x in items])]
        wholes: list[Tensor] = []
        for i, x in mine:
            parts = [(plan.pieces[i][rank], next(came[rank])) for rank in sorted(plan.senders[i])]
            wholes.append(_joined_pieces(self.homes[i].shape, parts, x))
        found = iter(wholes)
        return [next(found) if self.owned[i] else None for i, _ in items]

    def from_owners(self, items: Sequence[tuple[int, Any, Tensor, bool]]) -> list[Tensor]:
        """What owners have computed, as pieces, or whole on every process.

        Args:
            items: the number of the tensor, the result, which is there on the owner alone, what it is like here, and whether
                every process is sent all of it.
        """
        plan = self.plan

        def part(i: int, x: Tensor, everywhere: bool, rank: int) -> Tensor:
            return x if everywhere else _cut(x, plan.pieces[i][rank])

        sent = [
            [part(i, x.to(here.dtype), everywhere, rank) for i, x, here, everywhere in items if self.owned[i]]
            for rank in range(plan.mesh.size)
        ]
        wanted = [[here for i, _, here, _ in items if plan.owners[i] == rank] for rank in range(plan.mesh.size)]
        came = [iter(parts) for parts in self._swapped(sent, wanted, [here for _, _, here, _ in items])]
        return [next(came[plan.owners[i]]) for i, _, _, _ in items]

    def _swapped(self, sent: list[list[Tensor]], wanted: list[list[Tensor]], every: list[Tensor]) -> list[list[Tensor]]:
        """What each process has sent to this one: like ``wanted``. All of them see ``every`` kind of tensor that travels."""
        if torch.is_grad_enabled() and any(x.requires_grad for part in (*sent, every) for x in part):
            raise RuntimeError(NO_DERIVATIVE)
        kinds = {real_dtype(x.dtype) for x in every}
        raw = len(kinds) > 1  # tensors of several dtypes travel as bytes

        def flat(x: Tensor) -> Tensor:
            x = as_real(x.detach()).reshape(-1)
            return x.contiguous().view(torch.uint8) if raw else x

        def size(x: Tensor) -> int:
            return numel(x) * (real_dtype(x.dtype).itemsize if raw else 1)

        there, back = [sum(map(size, part)) for part in sent], [sum(map(size, part)) for part in wanted]
        device = self.homes[0].device
        packed = [flat(x) for part in sent for x in part]
        buffer = torch.cat(packed) if packed else torch.empty(0, dtype=torch.uint8 if raw else kinds.pop(), device=device)
        came = _waited(torch.ops._c10d_functional.all_to_all_single.default(buffer, back, there, self.plan.mesh.group.group_name))

        def unpacked(x: Tensor, like: Tensor) -> Tensor:
            x = x.clone().view(real_dtype(like.dtype)) if raw else x
            return as_complex(x.reshape(*like.shape, 2)) if like.is_complex() else x.reshape(like.shape)

        parts = came.split(back)
        return [
            [unpacked(x, like) for x, like in zip(part.split([size(y) for y in of]), of, strict=True)] if of else []
            for part, of in zip(parts, wanted, strict=True)
        ]
