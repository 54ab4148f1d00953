"""A state that is cut over processes which all have the whole of the parameters: ZeRO's first stage."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.core import GradientTransformation, check_transformation, in_form, transformation
from optfn.sharding import cut, gathered, is_ascending, is_sharded

__all__ = ["check_mesh", "shard_state"]


def shard_state(tx: GradientTransformation, mesh: Any) -> GradientTransformation:
    r"""Cut the state of a transformation over processes that all have the same parameters and gradients (ZeRO, stage 1).

    .. math::
        (u^{(r)}_t, s^{(r)}_t) &= \mathrm{update}(g^{(r)}_t, s^{(r)}_{t-1}, p^{(r)}_{t-1}) \\
        u_t &= \mathrm{all\_gather}_r\, u^{(r)}_t

    For :class:`torch.nn.parallel.DistributedDataParallel`, and for loops that average gradients by themselves. Process :math:`r`
    of :math:`W` computes with the :math:`r`-th piece of every tensor, and keeps that of the state. A tensor is cut in the dimension
    in which the largest piece is the smallest, the first of such; a 0-dim tensor is on all processes.

    *Communicated* in a step are the updates of all leaves, in one ``all_gather``, besides what ``tx`` needs of whole tensors: a
    global norm is one ``all_reduce``, Muon two ``all_to_all``. Leaves whose update is None, or which are hidden, do not travel.
    *Kept* is what ``tx`` keeps, with tensors that lie on several processes (DTensors) where it has the shape of a parameter. What
    the page "More than one process" says of these holds. The updates are plain, and equal on all processes.

    It belongs around all that keeps tensors. What stands before it in a chain is shown whole gradients, so a norm of them needs no
    communication: ``chain(clip_by_global_norm(1.0), shard_state(adamw(1e-3), mesh))``. A transformation that refuses leaves on
    several processes refuses them here too. All processes must have the same pattern of None among the gradients.

    Args:
        tx: the transformation. Extra arguments are handed on; a function among them is handed whole parameters.
        mesh: a mesh of one dimension with the processes, ``torch.distributed.init_device_mesh("cuda", (W,))``. Where nodes are
            linked slowly it may be that of a node, ``mesh["within"]``: each node then has all of the state.

    Raises:
        TypeError: ``tx`` is no transformation, ``mesh`` no mesh. From ``init`` and ``update``: a leaf that lies on several
            processes already, or is sparse.
        ValueError: the mesh has several dimensions, is without this process, or has processes in another than the ascending
            order. From ``init`` and ``update``: a leaf is on a device of another type than the mesh.
        RuntimeError: from ``update``: there is no derivative through what processes compute together.

    Reference:
        Rajbhandari, Rasley, Ruwase and He, `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
        <https://arxiv.org/abs/1910.02054>`_, 2019, section 5.1.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> tx = shard_state(optfn.sgd(lr=0.5, momentum=0.9), dist.init_device_mesh("cpu", (1,)))
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0, 0.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0., 2.])}
        >>> optfn.tree.get(state, "trace")["w"].to_local()
        tensor([2., 0.])
        >>> dist.destroy_process_group()
    """
    check_transformation(tx, "shard_state", "shard_state(tx, mesh)")
    check_mesh("shard_state", mesh)
    if not is_ascending(mesh):
        raise ValueError(f"shard_state: the processes of the mesh must be in ascending order, got {mesh.mesh.tolist()}")

    def pieces(of: Any, name: str) -> Any:
        found, spec = tree.checked(of, f"shard_state: {name}")
        return tree.unflatten(spec, [None if x is None else _piece(x, mesh, of, i) for i, x in enumerate(found)])

    def init(params: Any) -> Any:
        return tx.init(tree.map(torch.detach, pieces(params, "params")))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        extra = in_form(extra, params, lambda x: pieces(x, "an extra argument"), _whole)
        seen = None if params is None else pieces(params, "params")
        new, state = tx.update(pieces(updates, "updates"), state, seen, **extra)
        return _whole(new), state

    return transformation(init, update)


def check_mesh(owner: str, mesh: Any) -> None:
    """Raise if this is no mesh of one dimension with this process in it.

    Example:
        >>> check_mesh("shard_state", 4)
        Traceback (most recent call last):
        ...
        TypeError: shard_state takes a mesh, torch.distributed.init_device_mesh('cuda', (processes,)) perhaps, got int
    """
    if not isinstance(mesh, torch.distributed.device_mesh.DeviceMesh):
        got = type(mesh).__name__
        raise TypeError(f"{owner} takes a mesh, torch.distributed.init_device_mesh('cuda', (processes,)) perhaps, got {got}")
    if mesh.ndim != 1:
        advice = f", mesh[{mesh.mesh_dim_names[0]!r}] perhaps" if mesh.mesh_dim_names else ""
        raise ValueError(f"{owner} takes a mesh of one dimension, this one has {mesh.ndim}: give one of them{advice}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"{owner}: this process is not in the mesh")


def _piece(x: Tensor, mesh: Any, of: Any, i: int) -> Any:
    """What this process has of a whole tensor, in memory of its own: a rule may keep it."""
    if is_sharded(x):
        raise TypeError(_said(of, i, "lies on several processes already, and its state as it does: use the transformation itself"))
    if x.layout != torch.strided:
        raise TypeError(_said(of, i, "is sparse, which shard_state does not take: make it dense, .to_dense()"))
    if x.device.type != mesh.device_type and not x.is_meta:
        raise ValueError(_said(of, i, f"is on {x.device}, the mesh is one of {mesh.device_type}: both must be of one type"))
    return cut(x, _home(mesh, x.shape, x.dtype, torch.distributed.group.WORLD))


def _said(of: Any, i: int, what: str) -> str:
    path = tree.paths(of)[i]
    return f"shard_state: {repr(path) if path else 'the tensor'} {what}"


@functools.lru_cache(maxsize=4096)
def _home(mesh: Any, shape: torch.Size, dtype: torch.dtype, world: Any) -> Any:
    """A tensor of this shape as it is cut, without numbers. There is another world when processes are joined anew."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def largest(d: int) -> float:
        return math.ceil(shape[d] / mesh.size()) / max(shape[d], 1)

    placement = Shard(min(range(len(shape)), key=largest)) if shape else Replicate()
    whole = torch.empty(shape, dtype=dtype, device="meta")
    return DTensor.from_local(whole, mesh, [placement], run_check=False, shape=shape, stride=whole.stride())


def _whole(of: Any) -> Any:
    """A tree with its tensors whole and plain on every process."""
    found, spec = tree.flatten(of)
    away = [i for i, x in enumerate(found) if is_sharded(x)]
    for i, x in zip(away, gathered([found[i] for i in away]), strict=True):
        found[i] = x
    return tree.unflatten(spec, found)
